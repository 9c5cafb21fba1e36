"""Figures of a comparison: ratios, scaling, and times by the floor."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from comparison import describe
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Okabe and Ito's colours, which colour-blind people tell apart, and a marker each.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
MARKERS = "osDv^P*X<>"


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
    """A row for each case, a mark for each peer."""
    return _dots(
        comparison,
        comparison.peers,
        comparison.ratios,
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
        return big and case["dtype"] == "float32" and "train step" not in case["works"]

    label = "time / least time for the passes over memory (left is better)"
    args = comparison.libraries, comparison.over_floor, chosen, label
    return _dots(comparison, *args)


def _dots(comparison, libraries, values, chosen, label) -> Figure | None:
    """Forward passes on the left, all else on the right; a row for each case."""
    keys = [
        (name, work)
        for name, case in comparison.cases.items()
        for work in case["works"]
        if not case["sweep"] and chosen(case)
    ]
    forward = [key for key in keys if key[1] == "forward"]
    columns = [forward, [key for key in keys if key not in forward]]
    rows = max(map(len, columns))
    if not (rows and libraries):
        return None
    figure = Figure(figsize=(15, 1.6 + 0.21 * rows), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), columns, strict=True):
        shown = [1.0]
        for library in libraries:
            found = values[library].reindex(column).reset_index(drop=True).dropna()
            options = style(comparison, library) | {"alpha": 0.85, "linewidths": 0}
            axes.scatter(found, found.index, s=26, **options)
            shown += [*found]
        _rows(axes, [comparison.cases[name] for name, _ in column])
        _ratio_scale(axes, shown)
        axes.set_xlabel(label, fontsize=9)
        axes.set_title(" / ".join(dict.fromkeys(work for _, work in column)))
    _legend(figure)
    return figure


def _rows(axes, cases) -> None:
    labels = [f"{case['op']}  {describe(case)}" for case in cases]
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _ratio_scale(axes, shown) -> None:
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _log_ticks(axes.xaxis, shown)


def _log_ticks(axis, shown) -> None:
    """At 1, 2 and 5 times the powers of 10, in plain digits."""
    steps = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    ticks = [t for t in steps if min(shown) / 1.3 <= t <= max(shown) * 1.3]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_minor_locator(NullLocator())


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
        times = comparison.times.xs(work, level="work").loc[[k for _, k in found]]
        times.index = [n for n, _ in found]
        first = times[comparison.libraries[0]].iloc[0]
        shown = [1.0]
        for library in comparison.libraries:
            points = times[library].dropna() / first
            if len(points):
                options = style(comparison, library)
                axes.plot(points, markersize=4, linewidth=1.2, **options)
                shown += [*points]
        axes.set(xscale="log", yscale="log", xlabel=sweep)
        axes.set_title(f"{op}\n{work}", fontsize=9)
        ticks = [n for n, _ in found]
        axes.set_xticks(ticks, list(map(str, ticks)), fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        _log_ticks(axes.yaxis, shown)
        axes.grid(color="0.9", linewidth=0.6)
    subplots[0].set_ylabel("time / jaxnorm's at the first point")
    _legend(figure)
    return figure


def along(case) -> int:
    """Where on its scaling curve a case is."""
    values = {"batch": case["shape"][0], "channels": case["shape"][-1]}
    return (values | {"devices": case["devices"]})[case["sweep"]]


def _legend(figure: Figure) -> None:
    found = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=len(found)
    )
