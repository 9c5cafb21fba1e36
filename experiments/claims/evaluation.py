"""Batch norm is unstable for batches of one at inference.

**Said of** batch norm in many places, as in Singh and Shrivastava
([2019](https://arxiv.org/abs/1904.06031)), who see training and evaluation disagree,
and Wu and He ([2018](https://arxiv.org/abs/1803.08494)), section 1. Evaluation as Ioffe
and Szegedy ([2015](https://arxiv.org/abs/1502.03167)) define it, algorithm 2, uses
averages from training and none of the batch.

**Set-up.** A dense and a convolutional net with batch norm, trained with batches of 64
for 300 steps, and evaluated on the test images in batches of 1 to 256: by the running
statistics, and, as where a model was left in training mode, by those of the evaluation
batch, its images at random or sorted by class. The running statistics are also tried
with EvalNorm (a tenth of each example's own statistics), and after a shift of the
contrast of all test images (half the deviation, and a mean of 0.5), there also after
recalibration on 2,000 training images with the same shift.

**Scale.** It answers to figure 1 of Singh and Shrivastava, with small nets on small
images.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import jaxnorm
from experiments import data, figures, fit
from experiments.nets import NETS, NORMS, Tree
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
SIZES = (1, 2, 4, 16, 64, 256)
RUNNING, BATCH, SORTED = "running", "batch", "sorted"


def evaluated(net: str, by: str, size: int, shift: bool = False) -> dict:
    return {"net": net, "by": by, "b": size, "shift": shift}


def errs_more(says: str, left: dict, right: dict, least: float) -> Comparison:
    return Comparison(says, "error", left, right, more_than=least)


def running_at_one(net: str) -> Comparison:
    return errs_more(
        f"{net} net, running statistics: batches of 1 cost more than 0.5 points of "
        "test error against batches of 256",
        evaluated(net, RUNNING, 1),
        evaluated(net, RUNNING, 256),
        0.5,
    )


def batch_against_running(net: str, by: str, size: int, least: float) -> Comparison:
    chosen = "images at random" if by == BATCH else "images sorted by class"
    return errs_more(
        f"{net} net: statistics of evaluation batches of {size}, {chosen}, cost more "
        f"than {least:g} points of test error against the running ones",
        evaluated(net, by, size),
        evaluated(net, RUNNING, size),
        least,
    )


RULE = {"dense": running_at_one("dense"), "conv": running_at_one("conv")}
BESIDE = {
    "conv_by_batch": batch_against_running("conv", BATCH, 1, 5.0),
    "conv_by_class": batch_against_running("conv", SORTED, 256, 5.0),
    "eval_norm": errs_more(
        "conv net: running statistics err more than EvalNorm",
        evaluated("conv", RUNNING, 1),
        evaluated("conv", "EvalNorm", 1),
        0.0,
    ),
    "recalibrated": errs_more(
        "conv net, shifted contrast: running statistics of the data before the shift "
        "cost more than 1 point against recalibrated ones",
        evaluated("conv", RUNNING, 1, shift=True),
        evaluated("conv", "recalibrated", 1, shift=True),
        1.0,
    ),
}
SENTENCE = """By its running statistics the convolutional net errs on {conv.left:.1f} %
of the test images in batches of 1 and on {conv.right:.1f} % in batches of 256, the
dense net on {dense.left:.1f} % and {dense.right:.1f} %; left in training mode, the
convolutional net errs on {conv_by_batch.left:.1f} % in batches of 1 and on
{conv_by_class.left:.1f} % in batches of 256 images sorted by class."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    plan = fit.Plan(options.steps(300))
    found: list[Run] = []

    def trainer(name: str):
        net = NETS[name](NORMS["batch"])

        def train(rate: float, seed: int):
            fitted = fit.fit(net, plan, images.train, rate, seed)
            if seed in seeds:
                found.extend(evaluations(name, net, fitted, images, seed, sizes))
            return fit.metrics(net, fitted, images), []

        return train

    seeds, sizes = options.seed_range(5), options.some(SIZES)
    arms = [({"net": name, "by": "training"}, trainer(name)) for name in NETS]
    return all_tuned(arms, options.rates(), seeds) + found


def evaluations(name: str, net, fitted: fit.Fitted, images: data.Data, seed, sizes):
    """One run for each way to evaluate."""
    test, how = at_random(images.test, seed), partial(error, net, fitted.params)
    by_class = test.take(np.argsort(np.asarray(test.labels), kind="stable"))
    shifted, new = contrast(test), recalibrated(net, fitted, images.train)
    own = NETS[name](jaxnorm.EvalNorm())
    found: list[tuple[dict, Any]] = []
    for size in sizes:
        found.append((evaluated(name, RUNNING, size), how(fitted.stats, test, size)))
        # A dense net has one value per statistic then, which the norm refuses.
        if size > 1 or name == "conv":
            for by, split in ((BATCH, test), (SORTED, by_class)):
                wrong = how(fitted.stats, split, size, True)
                found.append((evaluated(name, by, size), wrong))
    size = sizes[0]
    eval_norm = error(own, fitted.params, fitted.stats, test, size)
    found.append((evaluated(name, "EvalNorm", size), eval_norm))
    for by, stats in ((RUNNING, fitted.stats), ("recalibrated", new)):
        found.append((evaluated(name, by, size, True), how(stats, shifted, size)))
    return [Run(arm, seed, {"error": float(wrong)}) for arm, wrong in found]


def at_random(split: data.Split, seed: int, most: int = 2560) -> data.Split:
    """Images in another order, so many that all sizes of batches divide them."""
    order = np.random.default_rng(seed).permutation(len(split.labels))
    return split.take(order[: min(most, len(order) // 256 * 256)])


def contrast(split: data.Split) -> data.Split:
    return split._replace(inputs=split.inputs / 2 + 0.5)


@partial(jax.jit, static_argnums=(0, 4, 5))
def error(net, params, stats, split: data.Split, size: int, train: bool = False):
    """Percent wrong in batches of `size`, each of which is evaluated by itself."""
    batches = split.inputs.reshape(-1, size, *split.inputs.shape[1:])
    logits = jax.vmap(lambda x: net(params, stats, x, train)[0])(batches)
    answers = logits.reshape(len(split.labels), -1).argmax(-1)
    return 100 * (answers != split.labels).mean()


def recalibrated(net, fitted: fit.Fitted, train: data.Split) -> Tree:
    """Running statistics of training images of the new contrast, for given weights."""

    def apply(variables, batch):
        params, stats = variables["params"], variables["batch_stats"]
        return net(params, stats, batch, True)[1]

    variables = {"params": fitted.params, "batch_stats": fitted.stats}
    images = contrast(train).inputs
    batches = [images[start:][:500] for start in range(0, min(2000, len(images)), 500)]
    return jaxnorm.models.recalibrate(apply, variables, batches)


def errors(runs: Sequence[Run], **arm: Any) -> dict[int, list[float]]:
    """The errors of all seeds, by the size of the batch."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.is_of(arm) and "b" in run.arm:
            found.setdefault(run.arm["b"], []).append(run.metrics["error"])
    return dict(sorted(found.items()))


WAYS = {
    RUNNING: "running statistics",
    BATCH: "statistics of the evaluation batch",
    SORTED: "the same, images sorted by class",
}


def tables(runs: Sequence[Run]) -> list[Table]:
    sizes = [*errors(runs, net="conv", by=RUNNING, shift=False)]
    by_size = []
    for net in NETS:
        for by, name in WAYS.items():
            found = errors(runs, net=net, by=by, shift=False)
            cells = [mean_and_spread(found[b]) if b in found else "-" for b in sizes]
            by_size.append([net, name, *cells])
    others = [
        [net, name, mean_and_spread(next(iter(errors(runs, net=net, **arm).values())))]
        for net in NETS
        for name, arm in OTHERS.items()
    ]
    head = ["Net", "Evaluated by", *(f"b = {b}" for b in sizes)]
    return [
        Table("Test error in percent, in batches of b", head, by_size),
        Table("Test error in percent, in batches of 1", ["Net", "", "Error"], others),
    ]


OTHERS = {
    "EvalNorm": {"by": "EvalNorm"},
    "contrast shifted, running statistics": {"by": RUNNING, "shift": True},
    "contrast shifted, recalibrated": {"by": "recalibrated"},
}


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(2, width=4.2)
    for ax, net in zip(axes, NETS, strict=True):
        for (by, name), color in zip(WAYS.items(), COLORS, strict=True):
            found = errors(runs, net=net, by=by, shift=False)
            values = np.array([*found.values()]).T
            figures.band(ax, [*found], values, name, color=color)
        title = f"{net} net: test error (%)"
        figures.name_axes(ax, title, "images in a batch", "", xscale="log")
        figures.plain_ticks(ax, SIZES)
    axes[0].legend()
    return figure


COLORS = ("#1f77b4", "#e6550d", "#bc3754")
