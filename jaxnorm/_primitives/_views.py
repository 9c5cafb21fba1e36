"""How kernels see an array: in four axes, or as rows."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxnorm._axes import Axes, Shape


class View(NamedTuple):
    """An array as (outer, length, kept, inner), reduced over length and inner."""

    outer: int
    length: int
    kept: int
    inner: int

    @property
    def attributes(self) -> dict[str, np.int64]:
        return {k: np.int64(v) for k, v in self._asdict().items()}


def view(shape: Shape, reduce: Sequence[int]) -> View | None:
    """An array of `shape`, reduced over the axes `reduce`; None where it is no view."""
    runs: list[tuple[bool, int]] = []
    for a, n in enumerate(shape):
        if n == 1:
            continue
        is_reduced = a in reduce
        if runs and runs[-1][0] == is_reduced:
            runs[-1] = is_reduced, runs[-1][1] * n
        else:
            runs.append((is_reduced, n))
    found = View(1, 1, 1, 1)
    if runs and runs[-1][0]:
        found = found._replace(inner=runs.pop()[1])
    for name, is_reduced in (("kept", False), ("length", True), ("outer", False)):
        if runs and runs[-1][0] == is_reduced:
            found = found._replace(**{name: runs.pop()[1]})
    return None if runs else found


def reduced(shape: Shape, small: Shape) -> tuple[int, ...]:
    """The axes along which an array of `small` shape is broadcast to `shape`."""
    return tuple(a for a, (n, m) in enumerate(zip(shape, small, strict=True)) if n != m)


def broadcasts(shape: Shape, to: Shape) -> bool:
    return all(m in (1, n) for m, n in zip(shape, to, strict=True))


class RowView(NamedTuple):
    """Rows as (outer, rows, features), where parameters differ along outer alone."""

    outer: int
    rows: int
    features: int
    params: Shape  # of parameters in the working shape

    @property
    def param_outer(self) -> int:
        return math.prod(self.params[:-1])

    def attributes(self, center: bool, scale: Any, bias: Any) -> dict[str, Any]:
        sizes = self._asdict() | {"param_outer": self.param_outer}
        del sizes["params"]
        flags = {"has_scale": scale is not None, "has_bias": bias is not None}
        return {k: np.int64(v) for k, v in sizes.items()} | flags | {"center": center}


def row_view(axes: Axes, *params: Any) -> RowView | None:
    """Rows with these parameters; None where these differ along inner axes alone."""
    *rows, features = axes.working_shape
    shapes = [v.shape for v in params if v is not None]
    varying = [a for a in range(len(rows)) if any(s[a] != 1 for s in shapes)]
    split = max(varying, default=-1) + 1
    if varying and math.prod(rows[split:]) == 1:
        return None
    shape = (*rows[:split], *[1] * (len(rows) - split), features)
    return RowView(math.prod(rows[:split]), math.prod(rows[split:]), features, shape)


def as_likes(grads: Sequence[Any], wanted: Sequence[Any]) -> tuple[Array, ...]:
    """The gradients that are wanted, where None is one that is not, each summed over
    the axes along which its parameter is the same."""
    pairs = zip(grads, wanted, strict=True)
    return tuple(_as_like(v, struct) for v, struct in pairs if struct is not None)


def _as_like(v: Any, struct: jax.ShapeDtypeStruct) -> Array:
    if v.shape != struct.shape:
        v = v.sum(reduced(v.shape, struct.shape), keepdims=True)
    return v.astype(struct.dtype)
