"""Train a small ResNet on handwritten digits, with a norm of your choice.

Launch from the repository's root (about a minute on two CPU cores, no download):

    python examples/01_train_digits.py
    python examples/01_train_digits.py --norm group --api nnx --out runs/group

Training is data-parallel over all local devices. Without accelerators the CPU is
split into eight virtual devices, so that the same code runs everywhere. Batch
statistics are synchronized over the devices, and the last, ragged batch of an epoch
is padded to the fixed shape and masked.

--out receives config.json, metrics.jsonl (one line per epoch), curves.png, and
checkpoints/. After an interruption, --resume goes on from the last checkpoint to
the very bits that an uninterrupted run would have reached.
"""

import argparse
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

AXIS = "data"  # the mesh axis over which a batch is split

# The norms to choose from: to add one, add a line.
NORMS = {
    "batch": jaxnorm.BatchNorm(momentum=0.9, axis_name=AXIS),
    "layer": jaxnorm.LayerNorm(),
    "rms": jaxnorm.RMSNorm(),
    "group": jaxnorm.GroupNorm(num_groups=8),
    "instance": jaxnorm.InstanceNorm(),
    "ghost": jaxnorm.GhostBatchNorm(size=8, momentum=0.9, axis_name=AXIS),
}

STAGES = ((16, 1), (32, 2), (64, 2))  # features and stride of each residual block

# One step on all devices against one device, in float32 (7 digits): the same numbers
# are added in another order, a relative change of about 1e-7 per sum that some ten
# layers, forward and back, amplify a hundredfold at most. A forgotten synchronization
# or mask changes the second or third digit.
TOLERANCE = 1e-4


class BadInput(ValueError):
    """An option or file that cannot be used; the message is one line."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


# ---- The network, in Linen and in NNX --------------------------------------------


class LinenConvNorm(nn.Module):
    norm: Any
    features: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x, mask, train):
        window = (self.kernel, self.kernel)
        x = nn.Conv(self.features, window, self.stride, use_bias=False)(x)
        return jl.Norm(self.norm)(x, use_running_average=not train, mask=mask)


class LinenBlock(nn.Module):
    norm: Any
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, mask, train):
        conv_norm = partial(LinenConvNorm, self.norm, self.features)
        y = nn.relu(conv_norm(stride=self.stride)(x, mask, train))
        y = conv_norm()(y, mask, train)
        x = conv_norm(kernel=1, stride=self.stride)(x, mask, train)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    norm: Any
    classes: int

    @nn.compact
    def __call__(self, x, mask, train):
        x = nn.relu(LinenConvNorm(self.norm, STAGES[0][0])(x, mask, train))
        for features, stride in STAGES:
            x = LinenBlock(self.norm, features, stride)(x, mask, train)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class NnxConvNorm(nnx.Module):
    def __init__(self, norm, fan_in, features, kernel=3, stride=1, *, rngs):
        window = (kernel, kernel)
        self.conv = nnx.Conv(
            fan_in, features, window, stride, use_bias=False, rngs=rngs
        )
        self.norm = jx.Norm(norm, features, rngs=rngs)

    def __call__(self, x, mask):
        return self.norm(self.conv(x), mask=mask)


class NnxBlock(nnx.Module):
    def __init__(self, norm, fan_in, features, stride, *, rngs):
        conv_norm = partial(NnxConvNorm, norm, rngs=rngs)
        self.first = conv_norm(fan_in, features, stride=stride)
        self.second = conv_norm(features, features)
        self.shortcut = conv_norm(fan_in, features, kernel=1, stride=stride)

    def __call__(self, x, mask):
        y = self.second(nnx.relu(self.first(x, mask)), mask)
        return nnx.relu(self.shortcut(x, mask) + y)


class NnxResNet(nnx.Module):
    def __init__(self, norm, channels, classes, *, rngs):
        fan_in = STAGES[0][0]
        self.stem = NnxConvNorm(norm, channels, fan_in, rngs=rngs)
        self.blocks = nnx.List()
        for features, stride in STAGES:
            self.blocks.append(NnxBlock(norm, fan_in, features, stride, rngs=rngs))
            fan_in = features
        self.head = nnx.Linear(fan_in, classes, rngs=rngs)

    def __call__(self, x, mask):
        x = nnx.relu(self.stem(x, mask))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(axis=(1, 2)))


class Model(NamedTuple):
    """All that the training code knows of a network.

    apply(params, batch_stats, images, mask, train) is a pure function that returns
    the logits and the new batch_stats.
    """

    params: Any
    batch_stats: Any
    apply: Callable[..., tuple[jax.Array, Any]]


def linen_model(norm, image_shape, classes: int, seed: int) -> Model:
    network = LinenResNet(norm, classes)
    image, mask = jnp.zeros((1, *image_shape)), jnp.ones((1, 1, 1, 1), bool)
    init = jax.jit(partial(network.init, train=False))
    variables = init(jax.random.key(seed), image, mask)

    def apply(params, batch_stats, images, mask, train):
        logits, changed = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            mask,
            train,
            mutable=["batch_stats"],
        )
        return logits, changed.get("batch_stats", {})

    return Model(variables["params"], variables.get("batch_stats", {}), apply)


def nnx_model(norm, image_shape, classes: int, seed: int) -> Model:
    network = NnxResNet(norm, image_shape[-1], classes, rngs=nnx.Rngs(seed))
    graph, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def apply(params, batch_stats, images, mask, train):
        network = nnx.merge(graph, params, batch_stats)
        network.train() if train else network.eval()
        logits = network(images, mask)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return Model(nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), apply)


MODELS = {"linen": linen_model, "nnx": nnx_model}


# ---- Steps, data-parallel over the devices of a mesh -----------------------------


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Steps(NamedTuple):
    train: Callable[[State, Any], tuple[State, dict]]
    evaluate: Callable[[State, Any], dict]
    replicate: Callable[[Any], Any]  # puts a whole copy on every device
    scatter: Callable[[Any], Any]  # puts a share of the rows on every device


def make_steps(apply: Callable, optimizer, devices: list) -> Steps:
    mesh = Mesh(np.array(devices), (AXIS,))

    def loss_fn(params, batch_stats, batch, train):
        valid = batch["valid"]
        mask = valid[:, None, None, None]
        logits, batch_stats = apply(params, batch_stats, batch["image"], mask, train)
        labels = batch["label"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        sums = {
            "loss": jnp.sum(losses, where=valid),
            "correct": jnp.sum(logits.argmax(-1) == labels, where=valid),
            "count": jnp.sum(valid),
        }
        # Valid rows may be few, or none, on a device: sum over all, then divide.
        sums = jax.lax.psum(sums, AXIS)
        return sums["loss"] / sums["count"], (sums, batch_stats)

    def train_step(state, batch):
        # The parameters are the same on all devices and the loss is a sum over them,
        # so jax.shard_map makes the gradient a sum over the devices as well.
        grads, (sums, batch_stats) = jax.grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, batch, train=True
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), sums

    def eval_step(state, batch):
        _, (sums, _) = loss_fn(state.params, state.batch_stats, batch, train=False)
        return sums

    parallel = partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()
    )
    return Steps(
        train=jax.jit(parallel(train_step)),
        evaluate=jax.jit(parallel(eval_step)),
        replicate=partial(jax.device_put, device=NamedSharding(mesh, P())),
        scatter=partial(jax.device_put, device=NamedSharding(mesh, P(AXIS))),
    )


# ---- Data ------------------------------------------------------------------------


class Split(NamedTuple):
    images: np.ndarray  # float32, (N, H, W, C), in [0, 1]
    labels: np.ndarray  # int32, (N,)


def load_digits() -> tuple[Split, Split]:
    from sklearn import datasets, model_selection

    images, labels = datasets.load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1) / 16
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=0
    )
    return Split(x_train, y_train), Split(x_test, y_test)


def load_npz(path: Path) -> tuple[Split, Split]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys if key in file}
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive raises almost anything
        reason = " ".join(str(error).split())
        raise BadInput(f"cannot read {path} as an npz file: {reason}") from None
    for key in keys:
        require(key in arrays, f"{path}: array {key} is missing")
    try:
        train = checked(arrays, "x_train", "y_train")
        test = checked(arrays, "x_test", "y_test")
        shapes = train.images.shape[1:], test.images.shape[1:]
        require(shapes[0] == shapes[1], "x_train and x_test differ in image shape")
        known = test.labels.max() <= train.labels.max()
        require(known, "y_test has labels above the largest of y_train")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return train, test


def checked(arrays: dict[str, np.ndarray], x: str, y: str) -> Split:
    images, labels = arrays[x], arrays[y]
    require(images.ndim in (3, 4), f"{x} has shape {images.shape}, not (N, H, W[, C])")
    require(labels.ndim == 1, f"{y} has shape {labels.shape}, not (N,)")
    require(images.size > 0, f"{x} is empty")
    lengths = len(images), len(labels)
    require(lengths[0] == lengths[1], f"{x} and {y} differ in length: {lengths}")
    is_byte = images.dtype == np.uint8
    is_float = np.issubdtype(images.dtype, np.floating)
    require(is_byte or is_float, f"{x} is {images.dtype}, not uint8 (or floating)")
    bounded = is_byte or np.all((images >= 0) & (images <= 1))
    require(bounded, f"{x} has floating pixels that are NaN or outside [0, 1]")
    is_integer = np.issubdtype(labels.dtype, np.integer)
    require(is_integer, f"{y} is {labels.dtype}, not integer")
    require(labels.min() >= 0, f"{y} has negative labels")
    require(labels.max() < 2**16, f"{y} has labels above {2**16 - 1}")
    pixels = images.astype(np.float32) / (255 if is_byte else 1)
    return Split(pixels.reshape(*images.shape[:3], -1), labels.astype(np.int32))


def batches(split: Split, rows: np.ndarray, batch_size: int) -> Iterator[dict]:
    """The chosen rows in batches of one fixed shape; the last is padded and masked."""
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        padding = (0, batch_size - len(chosen))
        yield {
            "image": np.pad(split.images[chosen], (padding, (0, 0), (0, 0), (0, 0))),
            "label": np.pad(split.labels[chosen], padding),
            "valid": np.arange(batch_size) < len(chosen),
        }


def fingerprint(*splits: Split) -> str:
    checksum = 0
    for array in (array for split in splits for array in split):
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return f"{checksum:08x}"


# ---- The run's files -------------------------------------------------------------


def open_checkpoints(out: Path, **options) -> ocp.CheckpointManager:
    """Checkpoints appear whole or not at all, whenever the process is killed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, **options)
    return ocp.CheckpointManager(out / "checkpoints", options=options)


def last_checkpoint(out: Path) -> int | None:
    if not (out / "checkpoints").is_dir():
        return None
    with open_checkpoints(out, read_only=True) as checkpoints:
        return checkpoints.latest_step()


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def read_history(out: Path, epochs: int) -> list[dict]:
    """The metrics of the first epochs; later lines were never checkpointed."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()[:epochs]
        history = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {out / 'metrics.jsonl'}: {error}") from None
    require(len(history) == epochs, f"{out / 'metrics.jsonl'} lacks epochs")
    return history


def begin_run(out: Path, config: dict) -> list[dict]:
    done = last_checkpoint(out)
    require(done is None, f"{out} holds a run: give --resume, or another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps(config, indent=2) + "\n")
        write_whole(out / "metrics.jsonl", "")
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None
    return []


def resume_run(out: Path, config: dict, epochs: int) -> list[dict]:
    done = last_checkpoint(out)
    require(done is not None, f"nothing to resume: {out} holds no checkpoint")
    try:
        recorded = json.loads((out / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {out / 'config.json'}: {error}") from None
    changed = [
        f"{key} was {recorded.get(key)}, now {value}"
        for key, value in config.items()
        if recorded.get(key) != value
    ]
    require(not changed, f"cannot resume {out}: {'; '.join(changed)}")
    require(done <= epochs, f"{out} has {done} epochs, more than --epochs {epochs}")
    history = read_history(out, done)
    lines = (json.dumps(line) + "\n" for line in history)
    write_whole(out / "metrics.jsonl", "".join(lines))
    return history


def draw_curves(history: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            values = [line[f"{split}_{quantity}"] for line in history]
            axes.plot(epochs, values, marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=quantity)
        axes.legend()
    figure.savefig(path, dpi=120)


# ---- Training --------------------------------------------------------------------


def summarize(prefix: str, sums: list[dict]) -> dict:
    loss, correct, count = (
        sum(float(each[key]) for each in sums) for key in ("loss", "correct", "count")
    )
    return {f"{prefix}_loss": loss / count, f"{prefix}_accuracy": correct / count}


def train_epoch(steps, state, split, batch_size, seed, epoch):
    # The order depends on seed and epoch only, so a resumed run repeats it.
    order = np.random.default_rng((seed, epoch)).permutation(len(split.labels))
    total = -(-len(order) // batch_size)
    sums = []
    with tqdm(total=total, desc=f"epoch {epoch}", leave=False) as bar:
        for batch in batches(split, order, batch_size):
            state, batch_sums = steps.train(state, steps.scatter(batch))
            sums.append(jax.device_get(batch_sums))
            bar.update()
            bar.set_postfix(loss=f"{sums[-1]['loss'] / sums[-1]['count']:.4f}")
    return state, summarize("train", sums)


def evaluate(steps, state, split, batch_size) -> dict:
    rows = np.arange(len(split.labels))
    return summarize(
        "test",
        [
            jax.device_get(steps.evaluate(state, steps.scatter(batch)))
            for batch in batches(split, rows, batch_size)
        ],
    )


def compare_with_one_device(apply, optimizer, devices, state, batch) -> dict:
    """The largest differences between a step on all devices and the same on one."""
    results = []
    for chosen in (devices, devices[:1]):
        steps = make_steps(apply, optimizer, chosen)
        new, sums = steps.train(steps.replicate(state), steps.scatter(batch))
        loss = sums["loss"] / sums["count"]
        results.append(
            jax.device_get(
                {"params": new.params, "batch_stats": new.batch_stats, "loss": loss}
            )
        )
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), *results)
    return {
        name: max(map(float, jax.tree.leaves(gap)), default=0.0)
        for name, gap in gaps.items()
    }


def run(options, norm, devices, train: Split, test: Split, history: list[dict]) -> int:
    out, batch_size = options.out, options.batch_size
    shape, classes = train.images.shape[1:], int(train.labels.max()) + 1
    model = MODELS[options.api](norm, shape, classes, options.seed)
    # The learning rate falls with the epochs done, whatever --epochs says.
    steps_per_epoch = -(-len(train.labels) // batch_size)
    schedule = optax.exponential_decay(0.1, steps_per_epoch, 0.85)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)
    first = State(model.params, model.batch_stats, optimizer.init(model.params))
    first = jax.device_get(first)

    steps = make_steps(model.apply, optimizer, devices)
    state = first
    with open_checkpoints(out) as checkpoints:
        if history:
            args = ocp.args.StandardRestore(first)
            state = checkpoints.restore(len(history), args=args)
        state = steps.replicate(state)
        for epoch in range(len(history) + 1, options.epochs + 1):
            start = time.perf_counter()
            state, line = train_epoch(
                steps, state, train, batch_size, options.seed, epoch
            )
            line = {"epoch": epoch, **line}
            line |= evaluate(steps, state, test, batch_size)
            line["seconds"] = round(time.perf_counter() - start, 3)
            history.append(line)
            print(json.dumps(line), flush=True)
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            args = ocp.args.StandardSave(jax.device_get(state))
            checkpoints.save(epoch, args=args)
    draw_curves(history, out / "curves.png")
    result = evaluate(steps, state, test, batch_size)
    print(f"test accuracy with running statistics: {result['test_accuracy']:.4f}")

    rows = np.arange(min(batch_size // 2 + 1, len(train.labels)))
    ragged = next(batches(train, rows, batch_size))
    gaps = compare_with_one_device(model.apply, optimizer, devices, first, ragged)
    print(gaps)
    return 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv=None) -> int:
    parser = Parser(prog=Path(__file__).name)
    add = parser.add_argument
    add("--norm", default="batch", choices=NORMS)
    add("--api", default="linen", choices=MODELS)
    add("--seed", default=0, type=int)
    add("--epochs", default=10, type=int)
    add("--batch-size", default=64, type=int)
    add("--devices", type=int)
    add("--data", type=Path)
    add("--out", type=Path, default=Path("runs/digits"))
    add("--resume", action="store_true")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.local_devices()[:options.devices]
    train, test = load_npz(options.data) if options.data else load_digits()
    config = {"x": 1}
    history = resume_run(options.out, config, options.epochs) if options.resume else begin_run(options.out, config)
    return run(options, NORMS[options.norm], devices, train, test, history)


if __name__ == "__main__":
    sys.exit(main())
