"""Train a small ResNet on handwritten digits with any norm, on all devices.

From the root of the repository, in about a minute on two CPU cores:

    python examples/01_train_digits.py
    python examples/01_train_digits.py --norm group --api nnx --out runs/group

Without accelerators the CPU is split into 8 virtual devices, so the same code runs
everywhere: each device takes its share of a batch, batch statistics are synchronized,
and the last, ragged batch of an epoch is padded to the usual shape and masked.

--out receives config.json, metrics.jsonl (a line per epoch), curves.png, checkpoints/.
After an interruption, --resume goes on from the last checkpoint and ends with the same
bits as an uninterrupted run (on GPUs with XLA_FLAGS=--xla_gpu_deterministic_ops=true).
"""

import argparse
import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxnorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx

AXIS = "data"  # the mesh axis that batches are split along
WIDTHS, STRIDES = (16, 32, 64), (1, 2, 2)  # of the residual blocks

# For norms that pool statistics over devices.
POOLED = {"momentum": 0.9, "axis_name": AXIS}

# The norms to choose from: another one is another line.
NORMS = {
    "batch": jaxnorm.BatchNorm(**POOLED),
    "layer": jaxnorm.LayerNorm(),
    "rms": jaxnorm.RMSNorm(),
    "group": jaxnorm.GroupNorm(num_groups=8),
    "instance": jaxnorm.InstanceNorm(),
    "ghost": jaxnorm.GhostBatchNorm(size=8, **POOLED),
    "renorm": jaxnorm.BatchRenorm(**POOLED),
    "eval": jaxnorm.EvalNorm(weight=1 / 64, **POOLED),
    "online": jaxnorm.OnlineNorm(momentum=0.99, axis_name=AXIS),
    "moving-average": jaxnorm.MovingAverageBatchNorm(**POOLED),
    "power": jaxnorm.PowerNorm(**POOLED),
    "virtual": jaxnorm.VirtualBatchNorm(size=4, axis_name=AXIS),
    "iter": jaxnorm.IterNorm(group_size=8, **POOLED),
    "l1": jaxnorm.L1BatchNorm(**POOLED),
    "range": jaxnorm.RangeBatchNorm(**POOLED),
    "running-instance": jaxnorm.RunningInstanceNorm(**POOLED),
    "switchable": jaxnorm.SwitchableNorm(**POOLED),
    "filter-response": jaxnorm.FilterResponseNorm(),
    "evo-b0": jaxnorm.EvoNormB0(**POOLED),
    "evo-s0": jaxnorm.EvoNormS0(num_groups=8),
    "positional": jaxnorm.PositionalNorm(),
    "scale": jaxnorm.ScaleNorm(),
    "global-response": jaxnorm.GlobalResponseNorm(),
    "local-response": jaxnorm.LocalResponseNorm(),
    "dynamic-tanh": jaxnorm.DynamicTanh(initial_alpha=4.0),
    "divisive": jaxnorm.DivisiveNorm(window=3, window_axes=(1, 2), initial_sigma=0.1),
}

# What these do depends on how a batch is spread over devices: each reads its share as a
# stream, or takes the first examples of it for reference.
SPREAD = ("online", "virtual")

# A step on all devices adds the same float32 numbers, of order 1, as on one device, in
# another order: 1e-7 each time, and a hundredfold for what the layers make of it. A
# forgotten sum over the devices changes them by 1e-3 and more.
TOLERANCE = 1e-5


class BadInput(ValueError):
    """Options or files that cannot be used; the message is for the user."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


# ---- The network, in Linen and in NNX ---------------------------------------------
#
# All else knows of either only its params, its batch_stats, and a pure function:
# apply(params, batch_stats, images, mask, train) -> logits, batch_stats


class LinenResNet(nn.Module):
    norm: jaxnorm.Norm
    classes: int

    @nn.compact
    def __call__(self, x, mask, train):
        def conv_norm(x, features, kernel=3, stride=1):
            x = nn.Conv(features, (kernel, kernel), stride, use_bias=False)(x)
            return jl.Norm(self.norm)(x, use_running_average=not train, mask=mask)

        x = nn.silu(conv_norm(x, WIDTHS[0]))
        for features, stride in zip(WIDTHS, STRIDES, strict=True):
            y = nn.silu(conv_norm(x, features, stride=stride))
            y = conv_norm(y, features)
            x = nn.silu(y + conv_norm(x, features, kernel=1, stride=stride))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def linen_model(norm, image_shape, classes: int, seed: int) -> tuple:
    network = LinenResNet(norm, classes)

    def apply(params, batch_stats, images, mask, train):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = network.apply(
            variables, images, mask, train, mutable=["batch_stats"]
        )
        return logits, changed.get("batch_stats", {})

    image, mask = jnp.zeros((1, *image_shape)), jnp.ones((1, 1, 1, 1), bool)
    init = jax.jit(partial(network.init, train=False))
    variables = init(jax.random.key(seed), image, mask)
    return variables["params"], variables.get("batch_stats", {}), apply


class NnxConvNorm(nnx.Module):
    def __init__(self, norm, inputs, features, kernel=3, stride=1, *, rngs):
        self.conv = nnx.Conv(
            inputs, features, (kernel, kernel), stride, use_bias=False, rngs=rngs
        )
        self.norm = jx.Norm(norm, features)

    def __call__(self, x, mask):
        return self.norm(self.conv(x), mask=mask)


class NnxBlock(nnx.Module):
    def __init__(self, norm, inputs, features, stride, *, rngs):
        conv_norm = partial(NnxConvNorm, norm, rngs=rngs)
        self.first = conv_norm(inputs, features, stride=stride)
        self.second = conv_norm(features, features)
        self.shortcut = conv_norm(inputs, features, kernel=1, stride=stride)

    def __call__(self, x, mask):
        y = nnx.silu(self.first(x, mask))
        return nnx.silu(self.second(y, mask) + self.shortcut(x, mask))


class NnxResNet(nnx.Module):
    def __init__(self, norm, channels, classes, *, rngs):
        self.stem = NnxConvNorm(norm, channels, WIDTHS[0], rngs=rngs)
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        self.blocks = nnx.List(
            NnxBlock(norm, *sizes, rngs=rngs)
            for sizes in zip(inputs, WIDTHS, STRIDES, strict=True)
        )
        self.head = nnx.Linear(WIDTHS[-1], classes, rngs=rngs)

    def __call__(self, x, mask):
        x = nnx.silu(self.stem(x, mask))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(axis=(1, 2)))


def nnx_model(norm, image_shape, classes: int, seed: int) -> tuple:
    network = NnxResNet(norm, image_shape[-1], classes, rngs=nnx.Rngs(seed))
    graph, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def apply(params, batch_stats, images, mask, train):
        network = nnx.merge(graph, params, batch_stats)
        network.train() if train else network.eval()
        logits = network(images, mask)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), apply


MODELS = {"linen": linen_model, "nnx": nnx_model}


# ---- Steps, data-parallel over devices --------------------------------------------


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Job(NamedTuple):
    state: State  # to begin with
    train_step: Callable[[State, dict], tuple[State, dict]]
    eval_step: Callable[[State, dict], dict]


def make_job(model: tuple, optimizer, devices: list) -> Job:
    """The jitted steps; state is replicated over the devices, batches are split."""
    params, batch_stats, apply = model
    mesh, specs = Mesh(np.array(devices), (AXIS,)), (P(), P(AXIS))
    replicated, split = (NamedSharding(mesh, spec) for spec in specs)

    def over_devices(step):
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(step, in_shardings=(replicated, split))

    state = State(params, batch_stats, optimizer.init(params))
    state = jax.device_put(state, replicated)
    return Job(state, *map(over_devices, device_steps(apply, optimizer)))


def device_steps(apply: Callable, optimizer) -> tuple[Callable, Callable]:
    """What each device does in a training step and in an evaluation step."""

    def loss_fn(params, batch_stats, batch, train):
        labels, valid = batch["label"], batch["valid"]
        mask = valid[:, None, None, None]
        logits, batch_stats = apply(params, batch_stats, batch["image"], mask, train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        sums = {
            "loss": jnp.sum(losses, where=valid),
            "correct": jnp.sum(logits.argmax(-1) == labels, where=valid),
            "count": jnp.sum(valid),
        }
        # A device may hold few valid rows, or none: first sum over all, then divide.
        sums = jax.lax.psum(sums, AXIS)
        return sums["loss"] / sums["count"], (sums, batch_stats)

    def train_step(state, batch):
        # The parameters are replicated and the loss is a sum over the devices, so
        # jax.shard_map sums the gradient over the devices, too.
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (sums, batch_stats) = grad_fn(
            state.params, state.batch_stats, batch, train=True
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), sums

    def eval_step(state, batch):
        _, (sums, _) = loss_fn(state.params, state.batch_stats, batch, train=False)
        return sums

    return train_step, eval_step


# ---- Data -------------------------------------------------------------------------


class Split(NamedTuple):
    images: np.ndarray  # float32, (N, H, W, C), from 0 to 1
    labels: np.ndarray  # int32, (N,)


def load_digits() -> tuple[Split, Split]:
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    parts = order[360:], order[:360]
    train, test = (Split(images[i], labels[i].astype(np.int32)) for i in parts)
    return train, test


def load_npz(path: Path) -> tuple[Split, Split]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            arrays = {key: npz[key] for key in keys if key in npz}
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise BadInput(f"{path} is no readable npz file: {error}") from None
    missing = [key for key in keys if key not in arrays]
    require(not missing, f"{path} lacks {', '.join(missing)}")
    try:
        train = checked(arrays, "x_train", "y_train")
        test = checked(arrays, "x_test", "y_test")
        shapes = [split.images.shape[1:] for split in (train, test)]
        require(shapes[0] == shapes[1], f"x_train and x_test hold images of {shapes}")
        known = test.labels.max() <= train.labels.max()
        require(known, "y_test has labels above the largest of y_train")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return train, test


def checked(arrays: dict[str, np.ndarray], x: str, y: str) -> Split:
    images, labels = arrays[x], arrays[y]
    is_byte = images.dtype == np.uint8
    is_float = np.issubdtype(images.dtype, np.floating)
    is_integer = np.issubdtype(labels.dtype, np.integer)
    require(is_byte or is_float, f"{x} is {images.dtype}, not uint8 or floating point")
    require(is_integer, f"{y} is {labels.dtype}, not integer")
    require(images.ndim in (3, 4), f"{x} has shape {images.shape}, not (N, H, W[, C])")
    require(labels.ndim == 1, f"{y} has shape {labels.shape}, not (N,)")
    same = len(images) == len(labels)
    require(same, f"{len(images)} images in {x}, but {len(labels)} labels in {y}")
    require(images.size > 0, f"{x} is empty")
    require(0 <= labels.min(), f"{y} has negative labels")
    require(labels.max() < 2**16, f"{y} has labels above {2**16 - 1}")
    inside = is_byte or bool(np.all((0 <= images) & (images <= 1)))
    require(inside, f"{x} has floating point pixels that are NaN or outside [0, 1]")
    images = images.astype(np.float32) / (255 if is_byte else 1)
    return Split(images.reshape(*images.shape[:3], -1), labels.astype(np.int32))


def checksum(*splits: Split) -> int:
    value = 0
    for array in (array for split in splits for array in split):
        value = zlib.crc32(array.tobytes(), value)
    return value


def shifted(split: Split, rng: np.random.Generator) -> Split:
    """Every image moved by up to one pixel each way."""
    height, width = split.images.shape[1:3]
    padded = np.pad(split.images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = rng.integers(3, size=(len(padded), 2))
    moved = [
        image[y : y + height, x : x + width]
        for image, (y, x) in zip(padded, moves, strict=True)
    ]
    return Split(np.stack(moved), split.labels)


def batches(split: Split, order: np.ndarray, size: int) -> Iterator[dict]:
    """Batches of one fixed shape; the last is padded, and its padding not valid."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padding = (0, size - len(rows))
        yield {
            "image": np.pad(split.images[rows], (padding, (0, 0), (0, 0), (0, 0))),
            "label": np.pad(split.labels[rows], padding),
            "valid": np.arange(size) < len(rows),
        }


# ---- The files of a run -----------------------------------------------------------


def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """Orbax makes checkpoints appear whole or not at all, even if it is killed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(out / "checkpoints", options=options)


def epochs_done(out: Path) -> int:
    if not (out / "checkpoints").is_dir():
        return 0
    with open_checkpoints(out) as checkpoints:
        return checkpoints.latest_step() or 0


def past_epochs(options, config: dict) -> list[dict]:
    """The metrics up to the checkpoint of a run that can be resumed; else none."""
    out, done = options.out, epochs_done(options.out)
    if not options.resume:
        require(done == 0, f"{out} holds a run already: give --resume or another --out")
        return []
    require(done > 0, f"nothing to resume: {out} holds no checkpoint")
    enough = done <= options.epochs
    require(enough, f"{out} has {done} epochs, more than --epochs {options.epochs}")
    try:
        before = json.loads((out / "config.json").read_text())
        changed = [
            f"{key} was {before[key]}, now {config[key]}"
            for key in config
            if before[key] != config[key]
        ]
        # Later lines, the last of them perhaps cut short, have no checkpoint.
        lines = (out / "metrics.jsonl").read_text().splitlines()[:done]
        history = [json.loads(line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read the files of {out}: {error!r}") from None
    require(not changed, f"cannot resume {out}: {'; '.join(changed)}")
    require(len(history) == done, f"{out}/metrics.jsonl lacks checkpointed epochs")
    return history


def write_files(out: Path, config: dict, history: list[dict]) -> None:
    """Replaces each file as a whole, so that none is ever found half-written."""
    lines = "".join(json.dumps(line) + "\n" for line in history)
    texts = {"config.json": json.dumps(config, indent=2) + "\n", "metrics.jsonl": lines}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / "new").write_text(text)
            os.replace(out / "new", out / name)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def draw_curves(history: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name in ("train", "test"):
            values = [line[f"{name}_{quantity}"] for line in history]
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.legend()
    figure.savefig(path, dpi=120)


# ---- Training ---------------------------------------------------------------------


def train_epoch(step, state, split, batch_size, seed, epoch) -> tuple[State, dict]:
    rng = np.random.default_rng((seed, epoch))  # so that a resumed run repeats it
    order = rng.permutation(len(split.labels))
    todo = batches(shifted(split, rng), order, batch_size)
    total, sums = -(-len(order) // batch_size), []
    bar = tqdm(todo, f"epoch {epoch}", total, leave=False, disable=None)
    for batch in bar:
        state, batch_sums = step(state, batch)
        sums.append(jax.device_get(batch_sums))
        bar.set_postfix(loss=f"{mean_loss(sums[-1]):.4f}")
    return state, summary("train", sums)


def evaluate(step, state, split, batch_size) -> dict:
    order = np.arange(len(split.labels))
    todo = batches(split, order, batch_size)
    return summary("test", [jax.device_get(step(state, batch)) for batch in todo])


def mean_loss(sums: dict) -> float:
    return float(sums["loss"]) / float(sums["count"])


def summary(name: str, sums: list[dict]) -> dict:
    total = {key: sum(float(each[key]) for each in sums) for key in sums[0]}
    return {
        f"{name}_loss": mean_loss(total),
        f"{name}_accuracy": total["correct"] / total["count"],
    }


def fit(job: Job, train: Split, test: Split, options, history: list[dict]) -> State:
    """Trains on from the last checkpoint; extends `history` and the files."""
    out, batch_size, state = options.out, options.batch_size, job.state
    with open_checkpoints(out) as checkpoints:
        if history:
            restore = ocp.args.StandardRestore(state)
            state = checkpoints.restore(len(history), args=restore)
        for epoch in range(len(history) + 1, options.epochs + 1):
            start = time.perf_counter()
            state, trained = train_epoch(
                job.train_step, state, train, batch_size, options.seed, epoch
            )
            tested = evaluate(job.eval_step, state, test, batch_size)
            seconds = round(time.perf_counter() - start, 3)
            history.append({"epoch": epoch, **trained, **tested, "seconds": seconds})
            line = json.dumps(history[-1])
            print(line, flush=True)
            with (out / "metrics.jsonl").open("a") as file:
                file.write(line + "\n")
            # Only now, so that each checkpointed epoch has its line.
            checkpoints.save(epoch, args=ocp.args.StandardSave(state))
    draw_curves(history, out / "curves.png")
    return state


def same_step(many: Job, one: Job, batch: dict) -> bool:
    """Whether a step on many devices and on one differ by roundoff only."""
    (new, sums), (new_on_one, sums_on_one) = (
        jax.device_get(job.train_step(job.state, batch)) for job in (many, one)
    )
    gaps = {
        "parameters": largest_gap(new.params, new_on_one.params),
        "batch statistics": largest_gap(new.batch_stats, new_on_one.batch_stats),
        "loss": abs(mean_loss(sums) - mean_loss(sums_on_one)),
    }
    print("one step on all devices and on one device, largest difference:")
    for name, gap in gaps.items():
        print(f"    {name}: {gap:.1e}")
    return all(gap <= TOLERANCE for gap in gaps.values())


def largest_gap(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), a, b)
    return float(np.max(jax.tree.leaves(gaps), initial=0))


# ---- The command line -------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def make_parser() -> Parser:
    parser = Parser(prog=Path(__file__).name, description="Train a ResNet on digits.")
    add = parser.add_argument
    add("--norm", default="batch", choices=NORMS, help="every norm of the network")
    add("--api", default="linen", choices=MODELS, help="flavour of Flax")
    add("--data", type=Path, help="npz file laid out as Keras's mnist.npz")
    add("--epochs", default=20, type=int)
    add("--batch-size", default=64, type=int, help="over all devices")
    add("--devices", type=int, help="how many to use (default: all)")
    add("--seed", default=0, type=int)
    add("--out", default="runs/digits", type=Path, help="folder for the results")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


def split_cpu(count: int = 8) -> None:
    """Lets the CPU be several devices, unless JAX runs or was told a number already."""
    flags = os.environ.get("XLA_FLAGS", "")
    told = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags
    if not told:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def choose_devices(count: int | None, batch_size: int) -> list:
    devices = jax.local_devices()
    count = len(devices) if count is None else count
    require(count >= 1, "--devices must be at least 1")
    require(count <= len(devices), f"--devices {count}: there are {len(devices)}")
    even = batch_size > 0 and batch_size % count == 0
    require(even, f"--batch-size {batch_size} is not a multiple of {count} devices")
    return devices[:count]


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    split_cpu()
    # Accelerators are less exact by default, too little for the comparison at the end.
    with jax.default_matmul_precision("float32"):
        try:
            return run(options)
        except BadInput as error:
            parser.error(str(error))


def run(options: argparse.Namespace) -> int:
    require(options.epochs >= 1, "--epochs must be at least 1")
    require(0 <= options.seed < 2**32, "--seed must be from 0 to 2**32 - 1")
    devices = choose_devices(options.devices, options.batch_size)
    train, test = load_npz(options.data) if options.data else load_digits()
    config = {key: getattr(options, key) for key in ("norm", "api", "seed")}
    config |= {"batch_size": options.batch_size, "devices": len(devices)}
    config |= {"data": checksum(train, test)}
    history = past_epochs(options, config)

    shape, classes = train.images.shape[1:], int(train.labels.max()) + 1
    model = MODELS[options.api](NORMS[options.norm], shape, classes, options.seed)
    optimizer = make_optimizer(-(-len(train.labels) // options.batch_size))
    job = make_job(model, optimizer, devices)
    # Half a batch and a row: some devices are full, one is not, and some are empty.
    rows = np.arange(min(options.batch_size // 2 + 1, len(train.labels)))
    ragged = next(batches(train, rows, options.batch_size))
    try:
        jax.eval_shape(job.train_step, job.state, ragged)
    except ValueError as error:
        raise BadInput(f"--norm {options.norm} does not fit: {error}") from None

    write_files(options.out, config, history)
    final = fit(job, train, test, options, history)
    accuracy = evaluate(job.eval_step, final, test, options.batch_size)["test_accuracy"]
    print(f"test accuracy with running statistics: {accuracy:.4f}")
    if options.norm in SPREAD:
        print(f"{options.norm}: a step depends on the number of devices")
        return 0
    if same_step(job, make_job(model, optimizer, devices[:1]), ragged):
        return 0
    print(f"that is more than roundoff, {TOLERANCE}", file=sys.stderr)
    return 1


def make_optimizer(steps_per_epoch: int):
    # The rate falls by the epoch, whatever --epochs is, so that runs can be extended.
    rate = optax.exponential_decay(0.1, steps_per_epoch, decay_rate=0.85)
    sgd = optax.sgd(rate, momentum=0.9, nesterov=True)
    sgd = optax.chain(optax.clip_by_global_norm(1.0), sgd)
    # Some norms keep statistics of gradients, which are renewed by subtraction alone.
    return optax.multi_transform(
        {"parameter": sgd, "control": optax.sgd(1.0)}, jaxnorm.models.control_labels
    )


if __name__ == "__main__":
    sys.exit(main())
