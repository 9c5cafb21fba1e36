"""Small batches harm batch norm, and not group norm.

**Said by** Wu and He ([2018](https://arxiv.org/abs/1803.08494)), abstract and figure 1:
"BN's error increases rapidly when the batch size becomes smaller", while group norm is
stable over a wide range of batch sizes. Qiao et al.
([2019](https://arxiv.org/abs/1903.10520)) add weight standardization, which is to bring
group norm past batch norm.

**Set-up.** First, all batches are of 64 and only the statistics are of n examples
(ghost batch norm, as on several devices without synchronization), so that nothing but
the statistics changes; in a dense net (n values per statistic) and in a convolutional
one (n times the positions: at least 16 n). 200 steps. Then batches of n, 3,000 images
seen once, and a rate of n / 32 times the best one at 32, the rule of the paper. The
running statistics have a momentum of 0.9, and 0.9 ** (n / 32) in batches of n, so that
they are averages over as many images. (A first run had 0.99 throughout, of which 39 %
were still their start after the 93 steps with batches of 32.)

**Scale.** It answers to figure 1 of Wu and He, with a net of three convolutions in the
place of ResNet-50 on ImageNet. The last layer of that net has 49 n values per
statistic, here it has 16 n.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import data, figures, fit
from experiments.nets import NETS, Conv, ghost, norms
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned, run, tuned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
MOMENTUM = 0.9  # for batches of USUAL
NORMS = norms(MOMENTUM)
GHOSTS, SIZES, USUAL = (2, 4, 8, 16, 64), (2, 8, 32), 32
WITHOUT = {"dense": ("layer", "none"), "conv": ("group", "layer", "none")}
POSITIONS = {"dense": 1, "conv": 16}  # where each feature of the last layer is seen
BY_SIZE = ("batch", "renorm", "switchable", "group", "group + WS")


def of_ghost(net: str, size: int) -> dict:
    return {"part": "ghost", "net": net, "norm": "batch", "n": size}


def of_size(norm: str, size: int) -> dict:
    return {"part": "size", "net": "conv", "norm": norm, "n": size}


def costs(says: str, left: dict, right: dict, **limit: float) -> Comparison:
    return Comparison(says, "error", left, right, **limit)


def small_against_usual(norm: str, **limit: float) -> Comparison:
    kind, least = next(iter(limit.items()))
    says = (
        f"batches of 2 with {norm} norm cost {kind.replace('_', ' ')} {least:g} points "
        f"of test error against batches of {USUAL}"
    )
    return costs(says, of_size(norm, 2), of_size(norm, USUAL), **limit)


RULE = {
    "dense": costs(
        "dense net: statistics of 2 examples cost more than 1 point of test error "
        "against statistics of 64",
        of_ghost("dense", 2),
        of_ghost("dense", 64),
        more_than=1.0,
    ),
    "conv": costs(
        "convolutional net: statistics of 2 examples cost more than 1 point of test "
        "error against statistics of 64",
        of_ghost("conv", 2),
        of_ghost("conv", 64),
        more_than=1.0,
    ),
    "group": small_against_usual("group", less_than=1.0),
}
BESIDE = {
    "batch": small_against_usual("batch", more_than=1.0),
    "against_batch": costs(
        "batches of 2: batch norm errs more than group norm",
        of_size("batch", 2),
        of_size("group", 2),
        more_than=0.0,
    ),
    "standardized": costs(
        "batches of 2: batch norm errs more than group norm with weight "
        "standardization",
        of_size("batch", 2),
        of_size("group + WS", 2),
        more_than=0.0,
    ),
    "standardized_usual": costs(
        f"batches of {USUAL}: group norm with weight standardization errs less than "
        "1 point more than batch norm",
        of_size("group + WS", USUAL),
        of_size("batch", USUAL),
        less_than=1.0,
    ),
}
SENTENCE = """With statistics of 2 examples in the place of 64, batch norm errs on
{dense.left:.1f} % and not {dense.right:.1f} % of the test images in a dense net, on
{conv.left:.1f} % and not {conv.right:.1f} % in a convolutional one; with batches of 2
in the place of 32, batch norm errs on {batch.left:.1f} % and {batch.right:.1f} %, group
norm on {group.left:.1f} % and {group.right:.1f} %."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    runs = all_tuned(
        ghost_arms(options, images), options.rates(), options.seed_range(3)
    )
    for norm in BY_SIZE:
        runs += sizes_of(norm, options, images)
    return runs


def ghost_arms(options: Options, images: data.Data):
    plan = fit.Plan(options.steps(200))
    arms = [
        (of_ghost(kind, size), fit.trainer(net(ghost(size, MOMENTUM)), plan, images))
        for kind, net in NETS.items()
        for size in options.some(GHOSTS)
    ]
    alone = [
        (
            {"part": "alone", "net": kind, "norm": norm},
            fit.trainer(NETS[kind](NORMS[norm]), plan, images),
        )
        for kind, norms in WITHOUT.items()
        for norm in norms
    ]
    return arms + alone


def sizes_of(norm: str, options: Options, images: data.Data) -> list[Run]:
    """The best rate for batches of 32, and at each size the rate in proportion."""
    kind, standardized = norm.removesuffix(" + WS"), norm.endswith("WS")

    def train(size: int):
        # Running statistics of as many images at every size.
        net = Conv(norms(MOMENTUM ** (size / USUAL))[kind], standardized=standardized)
        seen = min(3000, len(images.train.labels))
        return fit.trainer(net, fit.Plan(options.steps(seen // size), size), images)

    seeds = options.seed_range(3)
    usual = tuned(of_size(norm, USUAL), train(USUAL), options.rates(), seeds)
    rate = usual[-1].arm["rate"] / USUAL
    return usual + [
        run(of_size(norm, size), train(size), rate * size, seed)
        for size in options.some(SIZES)
        if size != USUAL
        for seed in seeds
    ]


def errors(runs: Sequence[Run], **arm: Any) -> dict[int, list[float]]:
    """The test errors of all seeds, by n."""
    found: dict[int, list[float]] = {}
    for one in runs:
        if one.is_of(arm):
            found.setdefault(one.arm.get("n", 0), []).append(one.metrics["error"])
    return dict(sorted(found.items()))


def tables(runs: Sequence[Run]) -> list[Table]:
    return [
        by_n(
            "Test error in percent, batches of 64, statistics of n examples",
            {f"{net}, batch": errors(runs, part="ghost", net=net) for net in NETS},
        ),
        Table(
            "Test error in percent without statistics of the batch, batches of 64",
            ["Net", "Norm", "Error"],
            [
                [net, norm, mean_and_spread(errors(runs, net=net, norm=norm)[0])]
                for net, norms in WITHOUT.items()
                for norm in norms
            ],
        ),
        by_n(
            "Test error in percent, convolutional net, batches of n",
            {norm: errors(runs, part="size", norm=norm) for norm in BY_SIZE},
        ),
    ]


def by_n(title: str, found: dict[str, dict[int, list[float]]]) -> Table:
    sizes = [f"n = {n}" for n in next(iter(found.values()))]
    rows = [[k, *map(mean_and_spread, v.values())] for k, v in found.items()]
    return Table(title, ["Norm", *sizes], rows)


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(3)
    for net, color in (("dense", "#e6550d"), ("conv", "#1f77b4")):
        found = errors(runs, part="ghost", net=net)
        values = np.array([*found.values()]).T
        figures.band(axes[0], [*found], values, net, color=color)
        positions = POSITIONS[net]
        each = [n * positions for n in found]
        figures.band(axes[1], each, values, net, color=color)
        alone = np.mean(errors(runs, part="alone", net=net, norm="layer")[0])
        axes[0].axhline(alone, color=color, ls="--", lw=1, label=f"{net}, layer norm")
    for norm in BY_SIZE:
        found = errors(runs, part="size", norm=norm)
        figures.band(axes[2], [*found], np.array([*found.values()]).T, norm)
    titles = ("statistics of n, batches of 64", "the same", "batches of n, conv")
    labels = ("n", "values per statistic, last layer", "n")
    for ax, title, label in zip(axes, titles, labels, strict=True):
        figures.name_axes(ax, title, label, "test error (%)", xscale="log")
        ax.legend()
    figures.plain_ticks(axes[0], GHOSTS)
    figures.plain_ticks(axes[1], (2, 8, 32, 128, 1024))
    figures.plain_ticks(axes[2], SIZES)
    return figure
