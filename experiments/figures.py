"""How is a figure drawn and written?"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Alike in all figures.
COLORS = {
    "none": "#666666",
    "batch": "#1f77b4",
    "layer": "#e6550d",
    "group": "#2ca02c",
    "instance": "#9467bd",
    "renorm": "#17becf",
    "switchable": "#e377c2",
    "group + WS": "#8c8c00",
    "online": "#8c564b",
    "running": "#bc3754",
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "jaxnorm",  # the same numbers give the same file
    "svg.fonttype": "none",  # text as text
    "savefig.facecolor": "white",  # readable on a dark page as well
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}


def panels(count: int, width: float = 3.6, height: float = 3.2):
    """A figure, and its axes, which stand in a row."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def band(ax: Axes, x: ArrayLike, seeds: np.ndarray, label: str, **style) -> None:
    """The mean over the rows of `seeds`, and a band from the lowest to the highest."""
    style = {"color": COLORS.get(label), "marker": "o", "markersize": 3} | style
    (line,) = ax.plot(x, seeds.mean(0), label=label, **style)
    low, high = seeds.min(0), seeds.max(0)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def write(draw: Callable[[], Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        draw().savefig(path, metadata={"Date": None})


def name_axes(ax: Axes, title: str, x: str, y: str, **settings) -> None:
    ax.set(title=title, xlabel=x, ylabel=y, **settings)


def bars(ax: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """A bar for each name, as high as the mean, and a dot for each seed."""
    for i, (name, seeds) in enumerate(values.items()):
        ax.bar(i, float(np.mean(seeds)), color=COLORS.get(name, "#999999"), alpha=0.7)
        ax.plot([i] * len(seeds), seeds, "k.", markersize=3)
    ax.set_xticks(range(len(values)), [*values], rotation=30, ha="right")


def plain_ticks(ax: Axes, values: Sequence[float]) -> None:
    """Ticks at these values of a logarithmic axis, as they are."""
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.set_xticks([], minor=True)
