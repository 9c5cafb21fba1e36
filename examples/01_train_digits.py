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
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import resnet
from digits import Digits, Parser, load
from tqdm import tqdm
from train_data import BadInput, batches, checksum, load_npz, require, shifted
from train_files import (
    checkpoint,
    draw_curves,
    open_checkpoints,
    past_epochs,
    write_files,
)
from train_steps import AXIS, Job, State, differences, make_job, mean_loss

import jaxnorm

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
    "act": jaxnorm.ActNorm(),
    "divisive": jaxnorm.DivisiveNorm(window=3, window_axes=(1, 2), initial_sigma=0.1),
}

# What these do depends on how a batch is spread over devices: each reads its share as a
# stream, or takes the first examples of it for reference.
SPREAD = ("online", "virtual")

# A step on all devices adds the same float32 numbers, of order 1, as on one device, in
# another order: 1e-7 each time, and a hundredfold for what the layers make of it. A
# forgotten sum over the devices changes them by 1e-3 and more.
TOLERANCE = 1e-5


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


def summary(name: str, sums: list[dict]) -> dict:
    total = {key: sum(float(each[key]) for each in sums) for key in sums[0]}
    return {
        f"{name}_loss": mean_loss(total),
        f"{name}_accuracy": total["correct"] / total["count"],
    }


def fit(job: Job, train: Digits, test: Digits, options, config, history) -> State:
    """Trains on from the last checkpoint; extends `history` and the files."""
    out, batch_size, state = options.out, options.batch_size, job.state
    with open_checkpoints(out) as checkpoints:
        if history:
            restore = ocp.args.Composite(state=ocp.args.StandardRestore(state))
            state = checkpoints.restore(len(history), args=restore).state
        for epoch in range(len(history) + 1, options.epochs + 1):
            start = time.perf_counter()
            state, trained = train_epoch(
                job.train_step, state, train, batch_size, options.seed, epoch
            )
            tested = evaluate(job.eval_step, state, test, batch_size)
            seconds = round(time.perf_counter() - start, 3)
            history.append({"epoch": epoch, **trained, **tested, "seconds": seconds})
            print(json.dumps(history[-1]), flush=True)
            write_files(out, config, history)
            checkpoints.save(epoch, args=checkpoint(state, config, history))
    draw_curves(history, out / "curves.png")
    return state


# ---- The command line -------------------------------------------------------------


def make_parser() -> Parser:
    parser = Parser(__file__, "Train a ResNet on digits.")
    add = parser.add_argument
    add("--norm", default="batch", choices=NORMS, help="every norm of the network")
    add("--api", default="linen", choices=resnet.MODELS, help="flavour of Flax")
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
    train, test = load_npz(options.data) if options.data else load()
    config = {key: getattr(options, key) for key in ("norm", "api", "seed")}
    config |= {"batch_size": options.batch_size, "devices": len(devices)}
    config |= {"data": checksum(train, test)}
    history = past_epochs(options, config)

    shape, classes = train.images.shape[1:], int(train.labels.max()) + 1
    model = resnet.MODELS[options.api](
        NORMS[options.norm], shape, classes, options.seed
    )
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
    final = fit(job, train, test, options, config, history)
    accuracy = evaluate(job.eval_step, final, test, options.batch_size)["test_accuracy"]
    print(f"test accuracy with running statistics: {accuracy:.4f}")
    if options.norm in SPREAD:
        print(f"{options.norm}: a step depends on the number of devices")
        return 0
    one = make_job(model, optimizer, devices[:1])
    gaps = differences(job, one, ragged)
    print("one step on all devices and on one device, largest difference:")
    for name, gap in gaps.items():
        print(f"    {name}: {gap:.1e}")
    if all(gap <= TOLERANCE for gap in gaps.values()):
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
