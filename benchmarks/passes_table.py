"""The table of passes over memory, and its legend."""

import importlib.metadata
from typing import NamedTuple

from norm_programs import LAYERS
from passes_cases import Case

DEVICES = {"h100": "NVIDIA H100", "v5e": "TPU v5e"}
VERSIONS = ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu")


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Count(NamedTuple):
    """A quantity in units of `x`, and how many kernels were launched for it."""

    value: float
    launched: int | None = None
    uncertain: bool = False

    def __str__(self):
        mark = "*" if self.uncertain else ""
        launched = "" if self.launched is None else f" ({self.launched})"
        return f"{self.value:.2f}{mark}{launched}"


Table = dict[str, dict[str, Count | str]]


def markdown(target: str, chosen: list[Case], table: Table, names: list[str]) -> str:
    """The table, with a column for each library and their ratio."""
    rows = [["", "x", "floor", *names, "jaxnorm / Flax"]]
    for case in chosen:
        cells = table[case.key]
        shown = case.floor is not None and not (target == "v5e" and case.products)
        floor = f"{case.floor:.4g}" if shown else ""
        ratio = _ratio(cells["jaxnorm"], cells["Flax"])
        shape = "x".join(map(str, case.shape))
        texts = [str(cells.get(name, "")) for name in names]
        rows.append([case.name, shape, floor, *texts, ratio])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _ratio(ours: Count | str, theirs: Count | str) -> str:
    """As text; "" where there is nothing to divide by."""
    if isinstance(ours, str) or isinstance(theirs, str) or not theirs.value:
        return ""
    return f"{ours.value / theirs.value:.2f}"


LEGEND = """\
Passes over memory on one {device}, as XLA compiles for it: bytes read and written by
all kernels, over the bytes of `x` (bfloat16), and in parentheses the kernels launched.
Not measured: times. Nothing runs.

{products}

`train` is the forward pass and the gradient, `split` the two as programs of their own,
`kept` what the first of these hands over to the second, `temporaries` what XLA
allocates beside arguments and results per layer of a `lax.scan` over {layers}. `*`:
with a branch or a loop of which it is not known how often it runs. `to float8` is
inference with a result of one byte each, `amax` the largest magnitude before that.

Compiled with {versions}.
"""
PRODUCTS = {
    "h100": """\
Matrix products and convolutions are kernels of libraries, and not counted; what they
leave to other kernels is.""",
    "v5e": """\
Products are fused with what is around them, so the whole program counts: compare
libraries, and see a floor only where there are no products. Arrays of up to some 100 MB
may stay on the chip, which counts nothing.""",
}


def legend(target: str) -> str:
    return LEGEND.format(
        device=DEVICES[target],
        products=PRODUCTS[target],
        layers=LAYERS,
        versions=", ".join(f"{name} {v}" for name, v in versions().items()),
    )
