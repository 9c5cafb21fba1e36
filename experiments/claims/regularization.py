"""Batch norm regularizes: the noise of its statistics lowers the test error.

**Said by** Ioffe and Szegedy ([2015](https://arxiv.org/abs/1502.03167)), section 3.4:
an example is seen together with the others of its batch, and the net is "no longer
producing deterministic values for a given training example"; and, of ghost batches, by
Hoffer et al. ([2017](https://arxiv.org/abs/1705.08741)).

**Set-up.** A dense net on 2,000 images, 20 epochs in batches of 64, so that it
overfits: without a norm, with layer norm, with batch norm, and with ghost batches of
16, 8 and 4, whose statistics are noisier. The losses are those of the trained net by
its running statistics.

**Scale.** The paper has no figure of it, but drops dropout and weight decay for it
(section 4.2.1). Here: a small net, few images, no other regularizer.
"""

from collections.abc import Sequence

import numpy as np

from experiments import data, figures, fit
from experiments.nets import NORMS, Dense, ghost
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
ARMS = {
    "none": NORMS["none"],
    "layer": NORMS["layer"],
    "batch": NORMS["batch"],
    "ghost 16": ghost(16),
    "ghost 8": ghost(8),
    "ghost 4": ghost(4),
}
IMAGES, EPOCHS, BATCH = 2000, 20, 64


def compare(says: str, metric: str, left: str, right: str, least: float) -> Comparison:
    return Comparison(says, metric, {"norm": left}, {"norm": right}, more_than=least)


RULE = {
    "batch": compare(
        "batch norm saves more than 0.1 points of test error against no norm",
        "error",
        "none",
        "batch",
        0.1,
    ),
    "noise": compare(
        "statistics of 16 examples raise the final training loss above that of "
        "statistics of 64",
        "train_loss",
        "ghost 16",
        "batch",
        0.0,
    ),
}
BESIDE = {
    "ghost": compare(
        "statistics of 16 examples save test error against statistics of 64",
        "error",
        "batch",
        "ghost 16",
        0.0,
    ),
    "ghost_4": compare(
        "statistics of 4 examples cost more than 0.5 points of test error against "
        "statistics of 64",
        "error",
        "ghost 4",
        "batch",
        0.5,
    ),
    "layer": compare(
        "layer norm saves more than 0.1 points of test error against no norm",
        "error",
        "none",
        "layer",
        0.1,
    ),
    "loss": compare(
        "batch norm raises the test loss above that of no norm",
        "loss",
        "batch",
        "none",
        0,
    ),
}
SENTENCE = """The test error is {batch.left:.2f} % without a norm, {layer.right:.2f} %
with layer norm, {batch.right:.2f} % with batch norm, and {ghost.right:.2f} and
{ghost_4.left:.2f} % with statistics of 16 and of 4 examples; the final training loss is
{noise.right:.4f} with statistics of 64 and {noise.left:.4f} with statistics of 16, the
test loss {loss.right:.2f} without a norm and {loss.left:.2f} with batch norm."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    few = images.train.take(np.arange(min(IMAGES, len(images.train.labels))))
    images = images._replace(train=few)
    plan = fit.Plan(options.steps(EPOCHS * (IMAGES // BATCH)), BATCH)

    def more(net, fitted: fit.Fitted) -> dict[str, float]:
        return {"train_loss": fit.tested(net, fitted, few)[1]}

    arms = [
        ({"norm": name}, fit.trainer(Dense(norm), plan, images, more))
        for name, norm in ARMS.items()
    ]
    return all_tuned(arms, options.rates(), options.seed_range(10))


def values(runs: Sequence[Run], norm: str, metric: str) -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of({"norm": norm})]


DIGITS = {"error": 2, "loss": 3, "train_loss": 4}


def tables(runs: Sequence[Run]) -> list[Table]:
    rows = [
        [norm, *(mean_and_spread(values(runs, norm, m), d) for m, d in DIGITS.items())]
        for norm in ARMS
    ]
    head = ["Norm", "Test error (%)", "Test loss", "Training loss"]
    return [Table("Trained on 2,000 images", head, rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(2, width=4.0)
    for ax, metric, name in zip(axes, ("error", "loss"), NAMES, strict=True):
        for norm in ARMS:
            x, y = values(runs, norm, "train_loss"), values(runs, norm, metric)
            ax.plot(x, y, "o", markersize=4, alpha=0.7, label=norm)
        figures.name_axes(ax, name, "training loss", "", xscale="log")
    axes[0].legend()
    return figure


NAMES = ("test error (%), one dot per seed", "test loss, one dot per seed")
