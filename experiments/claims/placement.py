"""Batch norm goes before the activation; after is as good, but bad for sigmoids.

**Said by** Ioffe and Szegedy ([2015](https://arxiv.org/abs/1502.03167)), section 3.2,
who put it before the activation, since what goes into it "is more likely to have a
symmetric, non-sparse distribution". That it may as well come after is the experience of
many; that it may not with sigmoids, whose outputs it takes out of their range, is often
added.

**Set-up.** Dense nets of 3 and of 8 layers of 100 units, batches of 100, 300 steps:
batch norm before the activation, after it, and none, for relu, tanh and sigmoid.

**Scale.** The paper has no figure of it. Small dense nets and small images; in deep
convolutional nets with residual branches it may be different.
"""

from collections.abc import Sequence

from experiments import data, figures, fit
from experiments.nets import NORMS, Dense
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
ACTIVATIONS, PLACES, DEPTHS = ("relu", "tanh", "sigmoid"), ("before", "after"), (3, 8)


def arm(activation: str, depth: int, place: str) -> dict:
    return {"activation": activation, "depth": depth, "place": place}


def after_costs(activation: str, depth: int, least: float, less: bool) -> Comparison:
    limit = {"less_than" if less else "more_than": least}
    return Comparison(
        f"{depth} layers of {activation}: batch norm after the activation costs "
        f"{'less' if less else 'more'} than {least:g} points of test error against "
        "before",
        "error",
        arm(activation, depth, "after"),
        arm(activation, depth, "before"),
        **limit,
    )


RULE = {
    "relu": after_costs("relu", 3, 1.0, less=True),
    "tanh": after_costs("tanh", 3, 1.0, less=True),
    "sigmoid": after_costs("sigmoid", 3, 0.5, less=False),
}
BESIDE = {
    "relu_8": after_costs("relu", 8, 1.0, less=True),
    "tanh_8": after_costs("tanh", 8, 1.0, less=True),
    "sigmoid_8": after_costs("sigmoid", 8, 0.5, less=False),
}
SENTENCE = """With 3 layers, batch norm before and after the activation errs on
{relu.right:.1f} and {relu.left:.1f} % of the test images for relu, {tanh.right:.1f} and
{tanh.left:.1f} % for tanh, {sigmoid.right:.1f} and {sigmoid.left:.1f} % for sigmoid;
with 8 layers on {relu_8.right:.1f} and {relu_8.left:.1f} %, {tanh_8.right:.1f} and
{tanh_8.left:.1f} %, {sigmoid_8.right:.1f} and {sigmoid_8.left:.1f} %."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    plan = fit.Plan(options.steps(300), batch=100)
    nets = {
        (a, d, place): Dense(NORMS["batch"], d, 100, a, after=place == "after")
        for a in ACTIVATIONS
        for d in DEPTHS
        for place in PLACES
    }
    nets |= {(a, d, "none"): Dense(NORMS["none"], d, 100, a) for a, d, _ in nets}
    arms = [(arm(*k), fit.trainer(net, plan, images)) for k, net in nets.items()]
    return all_tuned(arms, options.rates(), options.seed_range(5))


def errors(runs: Sequence[Run], *kind) -> dict[int, float]:
    """The test errors of an arm, by seed."""
    return {one.seed: one.metrics["error"] for one in runs if one.is_of(arm(*kind))}


def tables(runs: Sequence[Run]) -> list[Table]:
    places = ("none", *PLACES)
    rows = [
        [a, str(d)]
        + [mean_and_spread([*errors(runs, a, d, place).values()]) for place in places]
        for a in ACTIVATIONS
        for d in DEPTHS
    ]
    return [Table("Test error in percent", ["Units", "Layers", *places], rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(1, width=6.0)
    ax, names = axes[0], []
    for i, (a, d) in enumerate((a, d) for a in ACTIVATIONS for d in DEPTHS):
        before, after = (errors(runs, a, d, place) for place in PLACES)
        differences = [after[seed] - before[seed] for seed in before]
        ax.plot([i] * len(differences), differences, "o", color="#1f77b4", alpha=0.6)
        names.append(f"{a}, {d}")
    ax.axhline(0, color="black", lw=1)
    ax.set_xticks(range(len(names)), names)
    title = "test error: after the activation less before, one dot per seed"
    figures.name_axes(ax, title, "units, layers", "points")
    return figure
