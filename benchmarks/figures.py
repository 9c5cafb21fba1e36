"""Figures of a comparison: ratios, scaling, and times by the floor."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people tell apart, and a marker each.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
MARKERS = "osDv^P*X<>"
WORKS = ("forward", "forward and gradient", "train step")


def draw(comparison, out: Path) -> dict[str, str]:
    """Saves the figures that there are data for; their titles by file name."""
    titles = {}
    kinds = (
        (ratios, "ratios.png", "Time of each library by jaxnorm's"),
        (scaling, "scaling.png", "How time grows with batch, channels and devices"),
        (floors, "floor.png", "Time of each library by the floor"),
    )
    for function, file, title in kinds:
        figure = function(comparison)
        if figure is not None:
            figure.savefig(out / file, dpi=80)
            titles[file] = title
    return titles


def style(comparison, library) -> dict:
    i = comparison.libraries.index(library)
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    return {"color": colour, "marker": marker, "label": library}


def ratios(comparison) -> Figure | None:
    """A row for each case, a mark for each peer; right of the line jaxnorm is faster."""
    return _dots(
        comparison,
        comparison.peers,
        comparison.ratio,
        lambda case: True,
        "time / jaxnorm's time (right of the line: jaxnorm is faster)",
    )


def floors(comparison) -> Figure | None:
    """The same of all libraries, by the floor; the largest float32 arrays only."""
    largest = defaultdict(int)
    for case in comparison.cases.values():
        largest[case["op"]] = max(largest[case["op"]], case["input_bytes"])

    def chosen(case):
        big = case["input_bytes"] == largest[case["op"]]
        return big and case["dtype"] == "float32"

    label = "time / least time for the passes over memory (left is better)"
    args = comparison.libraries, comparison.over_floor, chosen, label
    return _dots(comparison, *args)


def _dots(comparison, libraries, value, chosen, label) -> Figure | None:
    from report import describe

    names = [
        name
        for name, case in comparison.cases.items()
        if not case["sweep"] and chosen(case)
    ]
    keys = [(name, work) for name in names for work in comparison.cases[name]["works"]]
    columns = [
        [key for key in keys if key[1] == "forward"],
        [key for key in keys if key[1] != "forward"],
    ]
    points = [
        [
            (i, library, v)
            for i, key in enumerate(column)
            for library in libraries
            if (v := value(*key, library)) is not None
        ]
        for column in columns
    ]
    if not any(points):
        return None
    rows = max(map(len, columns))
    figure = Figure(figsize=(15, 1.6 + 0.21 * rows), layout="constrained")
    for axes, column, found in zip(figure.subplots(1, 2), columns, points, strict=True):
        for library in libraries:
            mine = [(v, i) for i, which, v in found if which == library]
            if mine:
                x, y = zip(*mine, strict=True)
                options = style(comparison, library)
                axes.scatter(x, y, s=26, alpha=0.85, linewidths=0, **options)
        labels = []
        for name, work in column:
            case = comparison.cases[name]
            labels.append(f"{case['op']}  {describe(case)}")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(axis="both", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, [v for *_, v in found])
        axes.set_xlabel(label, fontsize=9)
        axes.set_title(" / ".join(dict.fromkeys(work for _, work in column)))
    _legend(figure)
    return figure


def scaling(comparison) -> Figure | None:
    """One panel for each norm and what grows; 1 is jaxnorm at the first point."""
    panels = defaultdict(list)
    for name, case in comparison.cases.items():
        if case["sweep"]:
            panels[case["op"], case["sweep"]].append((along(case), name))
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels), 3.9), layout="constrained")
    subplots = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, ((op, sweep), found) in zip(subplots, panels.items(), strict=True):
        found.sort()
        work = comparison.cases[found[0][1]]["works"][0]
        first = comparison.times[found[0][1], work][comparison.libraries[0]]
        for library in comparison.libraries:
            times = [(n, comparison.times[k, work].get(library)) for n, k in found]
            points = [(n, t / first) for n, t in times if t is not None]
            if points:
                x, y = zip(*points, strict=True)
                options = style(comparison, library)
                axes.plot(x, y, markersize=4, linewidth=1.2, **options)
        axes.set(xscale="log", yscale="log", xlabel=sweep)
        axes.set_title(f"{op}\n{work}", fontsize=9)
        ticks = [n for n, _ in found]
        axes.set_xticks(ticks, list(map(str, ticks)), fontsize=7)
        axes.minorticks_off()
        axes.grid(color="0.9", linewidth=0.6)
    subplots[0].set_ylabel("time / jaxnorm's at the first point")
    _legend(figure)
    return figure


def along(case) -> int:
    """Where on its scaling curve a case is."""
    values = {"batch": case["shape"][0], "channels": case["shape"][-1]}
    return (values | {"devices": case["devices"]})[case["sweep"]]


def _plain_ticks(axis, values) -> None:
    steps = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
    low, high = min([1, *values]), max([1, *values])
    ticks = [t for t in steps if low / 1.3 <= t <= high * 1.3]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_minor_locator(__import__("matplotlib.ticker").ticker.NullLocator())


def _legend(figure: Figure) -> None:
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=len(found)
    )
