"""Batch norm takes a quarter of the time of training.

**Said by** Gitman and Ginsburg ([2017](https://arxiv.org/abs/1709.08145)), abstract:
batch norm "accounts for a significant fraction of training run-time and is difficult to
accelerate, since it is a memory-bandwidth bounded operation"; for ResNet-50 on a Titan
X they put it at about a quarter.

**Set-up.** One training step (loss, gradients and update) of ResNet-50: with batch
norm; with batch norm and relu in one (`activation="relu"`); with batch norm that
normalizes by its running statistics, as where layers are frozen; with a bias in the
place of each norm; and with group norm. The steps of all arms are timed in turns, round
by round, so that what else the machine does hits all alike; the rounds are what the
interval is taken over. Images of 64 by 64 in batches of 4 on a CPU, of 224 by 224 in
batches of 64 on a GPU. "Relative" is the time of an arm over that with batch norm in
the same round, in percent. The results below were taken while other programs ran on the
same cores, hence the wide intervals.

**Scale.** It answers to that share, measured on a GPU for images of 224 by 224. A CPU
computes slowly and reads memory fast in comparison, so that the share of norms, which
do little but read and write, is smaller than on a GPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm import tqdm

import jaxnorm
from experiments import figures, fit
from experiments.nets import NORMS, Tree, weights
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, timed
from experiments.verdict import Comparison

DATA = ("random",)
ARMS = {
    "batch": NORMS["batch"],
    "batch, relu in one": jaxnorm.BatchNorm(activation="relu"),
    "batch, frozen": NORMS["batch"],
    "none": NORMS["none"],
    "group": jaxnorm.GroupNorm(num_groups=32),
}


def takes(says: str, arm: str, **limit: float) -> Comparison:
    return Comparison(says, "relative", {"norm": "batch"}, {"norm": arm}, **limit)


RULE = {
    "none": takes(
        "without norms a step takes less time, by more than 20 % of that with batch "
        "norm",
        "none",
        more_than=20.0,
    )
}
BESIDE = {
    "fused": takes(
        "relu in one with the norm saves time", "batch, relu in one", more_than=0.0
    ),
    "frozen": takes("frozen norms save time", "batch, frozen", more_than=0.0),
    "group": takes("group norm takes longer than batch norm", "group", less_than=0.0),
}
SENTENCE = """Without norms a training step of ResNet-50 takes {none.right:.1f} % of the
time that it takes with batch norm, whose share is {none.difference:.1f} % of it; with
relu in one with the norm it takes {fused.right:.1f} %, with frozen norms
{frozen.right:.1f} %, with group norm {group.right:.1f} %."""


@dataclass(frozen=True)
class ResNet:
    """Bottleneck blocks; a norm that has an activation does without another."""

    norm: jaxnorm.Norm
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    frozen: bool = False
    classes: int = 1000

    def block_names(self) -> Iterator[tuple[str, int, int]]:
        """The name of each block, its width, and its stride."""
        for i, count in enumerate(self.blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                yield f"block_{i}_{j}", self.width * 2**i, stride

    def kernels(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "stem", (7, 7, 3, self.width)
        fan_in = self.width
        for name, width, _ in self.block_names():
            yield f"{name}_a", (1, 1, fan_in, width)
            yield f"{name}_b", (3, 3, width, width)
            yield f"{name}_c", (1, 1, width, 4 * width)
            if name.endswith("_0"):
                yield f"{name}_shortcut", (1, 1, fan_in, 4 * width)
            fan_in = 4 * width

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        del shape
        params: Tree = {}
        stats: Tree = {}
        for name, kernel in self.kernels():
            params[name] = {
                "weight": weights(rng, *kernel),
                "norm": self.norm.init_params(kernel[-1:]),
            }
            stats[name] = self.norm.init_stats(kernel[-1:])
        last = 4 * self.width * 2 ** (len(self.blocks) - 1)
        params["head"] = weights(rng, last, self.classes)
        return params, stats

    def __call__(self, params: Tree, stats: Tree, x: Array, train: bool):
        """Logits and new statistics."""
        new: Tree = {}

        def layer(name, x, stride=1, relu=True, residual=None):
            y = convolve(x, params[name]["weight"], stride)
            y, new[name] = self.normalized(
                y, params[name]["norm"], stats[name], train, relu, residual
            )
            return y

        x = layer("stem", x, 2)
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for name, _, stride in self.block_names():
            y = layer(f"{name}_b", layer(f"{name}_a", x), stride)
            if f"{name}_shortcut" in params:
                x = layer(f"{name}_shortcut", x, stride, relu=False)
            x = layer(f"{name}_c", y, residual=x)
        return x.mean((1, 2)) @ params["head"], new

    def normalized(self, y, params, stats, train: bool, relu: bool, residual):
        how: dict[str, Any] = {"use_running_average": self.frozen or not train}
        if not getattr(self.norm, "activation", None):
            y, new = self.norm(y, params, stats, **how)
            y = y if residual is None else y + residual
            return (jax.nn.relu(y) if relu else y), new
        norm: Any = self.norm
        norm = norm if relu else replace(norm, activation=None)
        return norm(y, params, stats, residual=residual, **how)


def convolve(x: Array, kernel: Array, stride: int) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=layout
    )


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def step(net: ResNet, params, stats, batch):
    loss_fn = partial(fit.loss_fn, net)
    grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, batch)
    return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats


def make_net(name: str, quick: bool) -> ResNet:
    norm = ARMS[name]
    if quick and name == "group":
        norm = jaxnorm.GroupNorm(num_groups=4)
    net = ResNet(norm, frozen=name.endswith("frozen"))
    return replace(net, blocks=(1, 1), width=8, classes=10) if quick else net


def measure(options: Options) -> list[Run]:
    on_gpu = jax.default_backend() == "gpu"
    size, images = (224, 64) if on_gpu else (32, 4) if options.quick else (64, 4)
    batch = fit.Split(
        jax.random.normal(jax.random.key(0), (images, size, size, 3)),
        jnp.arange(images) % 10,
    )
    programs = {name: Program(make_net(name, options.quick), batch) for name in ARMS}
    rounds = 2 if options.quick else options.seeds or 8
    runs = []
    for i in tqdm(range(rounds), "rounds", leave=False, disable=None):
        taken = {name: program.timed_step() for name, program in programs.items()}
        for name, seconds in taken.items():
            found = {"seconds": seconds, "relative": 100 * seconds / taken["batch"]}
            runs.append(Run({"norm": name}, i, found, seconds=seconds))
    return runs


class Program:
    """The training step of a net, compiled and warm."""

    def __init__(self, net: ResNet, batch: fit.Split):
        self.net, self.batch = net, batch
        self.state = fit.initialize(net, batch.inputs.shape[1:], 0)
        self.timed_step()
        self.timed_step()

    def timed_step(self) -> float:
        with timed() as seconds:
            self.state = jax.block_until_ready(step(self.net, *self.state, self.batch))
            return seconds()


def values(runs: Sequence[Run], name: str, metric: str) -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of({"norm": name})]


def tables(runs: Sequence[Run]) -> list[Table]:
    rows = []
    for name in ARMS:
        low, middle, high = np.quantile(
            values(runs, name, "seconds"), (0.25, 0.5, 0.75)
        )
        relative = mean_and_spread(values(runs, name, "relative"))
        rows.append([name, *(f"{1e3 * v:.0f}" for v in (low, middle, high)), relative])
    head = ["Norm", "Lower quartile (ms)", "Median", "Upper quartile", "Relative (%)"]
    return [Table("One training step", head, rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(1, width=5.0)
    shares = {name: values(runs, name, "relative") for name in ARMS}
    figures.bars(axes[0], shares)
    title = "time of a step, with batch norm = 100"
    figures.name_axes(axes[0], title, "", "%")
    return figure
