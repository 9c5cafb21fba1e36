"""Batch norm speeds up training and permits larger learning rates.

**Said by** Ioffe and Szegedy ([2015](https://arxiv.org/abs/1502.03167)), abstract:
batch norm "allows us to use much higher learning rates", and reaches the same accuracy
"with 14 times fewer training steps".

**Set-up.** A dense and a convolutional net, without a norm, with batch norm and with
layer norm, at six constant rates from 0.003 to 1, batches of 64, 250 steps of gradient
descent with momentum 0.9. "Best rate" is that of the lowest validation error, over all
seeds. "Steps to loss 0.5" counts the steps until the mean training loss of 20 steps in
a row is below 0.5, or all 250 if it never is. The running statistics, by which test
errors are measured, have a momentum of 0.9. (A first run had 0.99, of which 8 % were
still their start after 250 steps.)

**Scale.** It answers to figure 2 of the paper (accuracy against steps for rates up to
30 times the usual one), with small nets and images in the place of Inception on
ImageNet.
"""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from experiments import data, figures, fit
from experiments.nets import NETS, norms
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, run, thinned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
NORMS = norms(momentum=0.9)
ARMS, RATES, STEPS = ("none", "batch", "layer"), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 250
WINDOW, GOAL = 20, 0.5


def best(net: str, norm: str) -> dict:
    return {"net": net, "norm": norm, "best": True}


def at_large(net: str, norm: str) -> dict:
    return {"net": net, "norm": norm, "rate": 0.3}


def larger_rate(net: str) -> Comparison:
    return Comparison(
        f"{net} net at rate 0.3: batch norm saves more than 5 points of test error "
        "against no norm",
        "error",
        at_large(net, "none"),
        at_large(net, "batch"),
        more_than=5.0,
    )


def faster(net: str, norm: str = "batch") -> Comparison:
    return Comparison(
        f"{net} net, each at its best rate: {norm} norm reaches a training loss of "
        f"{GOAL} more than 10 steps earlier than no norm",
        "steps",
        best(net, "none"),
        best(net, norm),
        more_than=10.0,
    )


RULE = {
    "dense_rate": larger_rate("dense"),
    "conv_rate": larger_rate("conv"),
    "dense_steps": faster("dense"),
    "conv_steps": faster("conv"),
}
BESIDE = {
    "dense_layer": faster("dense", "layer"),
    "conv_layer": faster("conv", "layer"),
    "conv_error": Comparison(
        "conv net, each at its best rate: batch norm saves test error",
        "error",
        best("conv", "none"),
        best("conv", "batch"),
        more_than=0.0,
    ),
}
SENTENCE = """At a rate of 0.3 the dense net errs on {dense_rate.left:.1f} % of the test
images without a norm and on {dense_rate.right:.1f} % with batch norm, the convolutional
net on {conv_rate.left:.1f} % and {conv_rate.right:.1f} %; each at its best rate, they
reach a training loss of 0.5 after {dense_steps.left:.0f} and {dense_steps.right:.0f}
steps, and after {conv_steps.left:.0f} and {conv_steps.right:.0f}."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    plan = fit.Plan(options.steps(STEPS), schedule="constant")
    kinds = [(net, norm) for net in NETS for norm in ARMS]
    bar = tqdm(kinds, "arms", leave=False, disable=None)
    return [one for kind in bar for one in at_all_rates(*kind, plan, images, options)]


def at_all_rates(net: str, norm: str, plan: fit.Plan, images: data.Data, options):
    model = NETS[net](NORMS[norm])

    def train(rate: float, seed: int):
        fitted = fit.fit(model, plan, images.train, rate, seed)
        found = fit.metrics(model, fitted, images)
        found["steps"] = steps_to_goal(fitted.losses)
        return found, thinned(fitted.losses, 40)

    rates = RATES[-2:-1] if options.quick else RATES
    seeds = options.seed_range(3)
    runs = [run({"net": net, "norm": norm}, train, r, s) for r in rates for s in seeds]
    return marked(runs)


def steps_to_goal(losses: Sequence[float]) -> float:
    """The steps until the mean of some losses in a row is low enough, or all."""
    window = min(WINDOW, len(losses))
    means = np.convolve(losses, np.ones(window) / window, "valid")
    reached = np.flatnonzero(means < GOAL)
    return float(reached[0] + window if len(reached) else len(losses))


def marked(runs: list[Run]) -> list[Run]:
    """Those of the rate with the lowest mean validation error are marked as best."""
    by_rate: dict[float, list[float]] = {}
    for one in runs:
        by_rate.setdefault(one.arm["rate"], []).append(one.metrics["validation"])
    rate = min(by_rate, key=lambda rate: np.mean(by_rate[rate]))
    for one in runs:
        one.arm["best"] = one.arm["rate"] == rate
    return runs


def errors(runs: Sequence[Run], net: str, norm: str) -> dict[float, list[float]]:
    """The test errors of all seeds, by rate."""
    found: dict[float, list[float]] = {}
    for one in runs:
        if one.is_of({"net": net, "norm": norm}):
            found.setdefault(one.arm["rate"], []).append(one.metrics["error"])
    return found


def tables(runs: Sequence[Run]) -> list[Table]:
    kinds = [(net, norm) for net in NETS for norm in ARMS]
    rates = [f"{rate:g}" for rate in errors(runs, *kinds[0])]
    rows = [[*k, *map(mean_and_spread, errors(runs, *k).values())] for k in kinds]
    at_best = [[*k, *best_cells(runs, *k)] for k in kinds]
    head = ["Net", "Norm", "Best rate", "Test error (%)", "Steps to loss 0.5"]
    return [
        Table("Test error in percent, by rate", ["Net", "Norm", *rates], rows),
        Table("At the best rate of each", head, at_best),
    ]


def best_cells(runs: Sequence[Run], net: str, norm: str) -> list[str]:
    chosen = [one for one in runs if one.is_of(best(net, norm))]
    error, steps = ([one.metrics[m] for one in chosen] for m in ("error", "steps"))
    rate = chosen[0].arm["rate"]
    return [f"{rate:g}", mean_and_spread(error), mean_and_spread(steps, 0)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(4, width=3.0)
    for i, net in enumerate(NETS):
        error_ax, loss_ax = axes[i], axes[2 + i]
        for norm in ARMS:
            found = errors(runs, net, norm)
            figures.band(error_ax, [*found], np.array([*found.values()]).T, norm)
            curves = [one.curve for one in runs if one.is_of(best(net, norm))]
            x = np.linspace(0, STEPS, len(curves[0]))
            figures.band(loss_ax, x, np.array(curves), norm, marker="")
        title = f"{net} net: test error (%)"
        figures.name_axes(error_ax, title, "rate", "", xscale="log")
        title = f"{net}: loss, each at its best rate"
        figures.name_axes(loss_ax, title, "step", "", yscale="log")
    axes[0].legend()
    return figure
