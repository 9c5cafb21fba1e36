"""How is the health of running statistics shown: as a table and as a figure?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxnorm.models._health.records import LayerHealth, Limits

COLUMNS = (
    "layer",
    "features",
    "least var",
    "median var",
    "mean drift",
    "deviation drift",
    "batch",
)
COLORS = {"good": "green", "warning": "yellow", "severe": "red"}


def as_table(rows: Sequence[LayerHealth]) -> Any:
    """A rich table in colours, and below it what to do about each finding."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(COLUMNS[0], overflow="fold")
    cells = [_cells(row) for row in rows]
    for i, name in enumerate(COLUMNS[1:], 1):
        # No wider than needed, so that the paths have what is left of the terminal.
        words = [*name.split(), *(row[i] for row in cells)]
        table.add_column(name, justify="right", width=max(map(len, words)))
    for row, (path, *figures) in zip(rows, cells, strict=True):
        layer = "\n".join([path, *_findings(row)])
        table.add_row(Text(layer, style=COLORS[_state(row)]), *figures)
    return Group(table, *map(Text, _fixes(rows)))


def as_figure(rows: Sequence[LayerHealth], limits: Limits) -> Any:
    """A matplotlib Figure with a line per layer: variances, means, drift if known."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the figure needs matplotlib: pip install 'jaxnorm[examples]', or print "
            "the report, which does not"
        ) from error
    panels = [
        ("running variance", limits.epsilon, limits.epsilon, ("var",)),
        ("|running mean|", np.sqrt(limits.epsilon), None, ("mean",)),
    ]
    if any(row.drifted is not None for row in rows):
        drifts = ("mean_drift", "deviation_drift")
        panels.append(("drift (deviations)", 0.1, limits.drift, drifts))
    height = 1.3 + 0.2 * len(rows)
    fig = Figure((3 * len(panels) + 2, height), layout="constrained")
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (label, linear, limit, names) in zip(axes, panels, strict=True):
        ax.set_xscale("symlog", linthresh=linear)
        ax.xaxis.get_major_locator().set_params(numticks=6)
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.3)
        if limit is not None:
            ax.axvline(limit, color="gray", linestyle="--", linewidth=1)
        for i, name in enumerate(names):
            _draw(ax, rows, name, f"C{i}", 0.3 * i - 0.15 * (len(names) - 1))
        if len(names) > 1:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=7)
    _name_layers(axes[0], rows)
    return fig


def _draw(
    ax: Any, rows: Sequence[LayerHealth], name: str, color: str, shift: float
) -> None:
    """A bar from the least to the greatest value of each layer, a dot at the median.

    A drift has no least: its bar starts at the median.
    """
    places = np.arange(len(rows)) + shift
    low, median, high = (
        np.array([getattr(row, f"{name}_{k}", None) for row in rows], float)
        for k in ("min", "median", "max")
    )
    low = np.where(np.isnan(low), median, low)
    ax.hlines(places, low, high, color=color, alpha=0.5, linewidth=3)
    ax.plot(median, places, "o", color=color, markersize=4, label=name.split("_")[0])


def _name_layers(ax: Any, rows: Sequence[LayerHealth]) -> None:
    """The paths beside the lines, from the top down, in the colours of the table."""
    names = [_cells(row)[0] for row in rows]
    short = [name if len(name) <= 40 else f"...{name[-37:]}" for name in names]
    ax.set_yticks(range(len(rows)), short, fontsize=7)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        if row.findings:
            label.set_color({"warning": "darkorange", "severe": "red"}[_state(row)])


def _state(row: LayerHealth) -> str:
    """The state of a layer, which has a colour."""
    if not row.findings:
        return "good"
    return "severe" if any(f.severe for f in row.findings) else "warning"


def _cells(row: LayerHealth) -> tuple[str, ...]:
    """The cells of a layer's row, by `COLUMNS`."""
    figures = (
        row.features,
        row.var_min,
        row.var_median,
        row.mean_drift_median,
        row.deviation_drift_median,
        row.size,
    )
    return (row.path or "(one layer)", *map(_number, figures))


def _findings(row: LayerHealth) -> list[str]:
    return [f"  {f.rule}: {f.detail}" for f in row.findings]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2g}"


def _fixes(rows: Sequence[LayerHealth]) -> list[str]:
    """What to do about each rule that found something, once."""
    found = {f.rule: f.fix for row in rows for f in row.findings}
    return [f"* {rule}: {fix}." for rule, fix in found.items()]
