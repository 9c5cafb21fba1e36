"""What standardizing does to each element, along any axes, and its tangent."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._axes import Axes
from jaxnorm._primitives._linear import Linear
from jaxnorm._primitives._operation import Operation, Reduction, Struct
from jaxnorm._primitives._parts import spread
from jaxnorm._working import from_working, to_working


class Line(NamedTuple):
    """What standardizing does: `y = (x - mean - residue) * rstd * scale + bias`.

    The arrays broadcast against `x` in its working shape. `residue`, `scale` and `bias`
    may be None, which is 0, 1 and 0. The tangent of a line is a line of tangents, where
    None is no change.
    """

    mean: Any
    residue: Any
    rstd: Any
    scale: Any
    bias: Any

    @property
    def slope(self) -> Array:
        return affine(self.rstd.astype(self.mean.dtype), self.scale, None)

    @property
    def shift(self) -> Array | None:
        """What is added to `(x - mean) * slope`; None is 0."""
        if self.residue is None:
            return self.bias
        return affine(-self.residue * self.slope, None, self.bias)


def affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    """`y * scale + bias`, where None is 1 and 0."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def apply_line(x: Array, mask: Array | None, line: Line, axes: Axes) -> Array:
    """`standardize` in the working shape and in the precision of the statistics."""
    y = to_working(x, mask, axes) - line.mean
    if axes.of_rows:
        y = y if line.residue is None else y - line.residue
        return affine(y * line.rstd.astype(y.dtype), line.scale, line.bias)
    return affine(y * line.slope, None, line.shift)


# With  y = slope * (x - mean) + shift,  slope = rstd * scale,
#       shift = bias - residue * slope:
#
#   dy     = slope * dx + (x - mean) * dslope + dshift
#   dslope = drstd * scale + rstd * dscale
#   dshift = dbias - slope * dmean - residue * dslope
#
# The transpose sums x's cotangent twice, once weighted by x - mean, whatever the
# statistics depend on.


def line_tangent(line: Line, dline: Line) -> tuple[Array, Array]:
    """The tangents of slope and shift; `dline.mean` is that of mean and residue."""
    slope = affine(line.rstd, line.scale, None)
    dslope = affine(dline.rstd, line.scale, None)
    if dline.scale is not None:
        dslope = dslope + line.rstd * dline.scale
    dshift = affine(-slope * dline.mean, None, dline.bias)
    if line.residue is not None:
        dshift = dshift - line.residue * dslope
    return dslope, dshift


class Stood(NamedTuple):
    """What a standardization is of."""

    x: Array
    mask: Array | None
    line: Line


class Change(NamedTuple):
    """The tangents of `x` and of the line."""

    x: Array | None
    line: Line


def tangent(
    rows: Any, reduction: Reduction, stood: Stood, change: Change
) -> tuple[Array, ...]:
    """The tangent of `standardize`; `rows` is the formula for rows, where slope and
    shift would be of x's size."""
    axes, dtype = reduction.axes, reduction.dtype
    x, mask, line = stood
    centered = to_working(x, mask, axes) - line.mean
    wide = centered.dtype
    line = line._replace(rstd=line.rstd.astype(wide))
    dline = complete(line, change.line)
    dline = dline._replace(rstd=dline.rstd.astype(wide))
    form = rows if axes.of_rows else _column_tangent
    dx = None
    if change.x is not None:
        dx = to_working(change.x, mask, axes).astype(wide)
    dy = form(centered, line, dx, dline)
    return (from_working(dy, mask, axes, dtype),)


def _column_tangent(
    centered: Array, line: Line, dx: Array | None, dline: Line
) -> Array:
    dslope, dshift = line_tangent(line, dline)
    dy = centered * dslope + dshift
    return dy if dx is None else affine(line.rstd, line.scale, None) * dx + dy


def by_sums(centered: Array, line: Line, dx: Array | None, dline: Line) -> Array:
    """The tangent by sums along rows, none of which waits for another."""
    _, residue, rstd, scale, _ = line
    dshift = -rstd * dline.mean
    dshift = dshift if residue is None else dshift - residue * dline.rstd
    dy = centered * dline.rstd + dshift
    dy = affine(dy if dx is None else rstd * dx + dy, scale, None)
    if dline.scale is not None:
        centered = centered if residue is None else centered - residue
        dy = dy + centered * rstd * dline.scale
    return affine(dy, None, dline.bias)


def by_sums_in_parts(
    centered: Array, line: Line, dx: Array | None, dline: Line
) -> Array:
    """The same, of which the transpose sums along columns in parts."""
    both = (v if v is None else spread(v, centered.shape) for v in dline[3:])
    return by_sums(centered, line, dx, Line(*dline[:3], *both))


def by_products(centered: Array, line: Line, dx: Array | None, dline: Line) -> Array:
    """The tangent by matrix products, which XLA:CPU takes at the speed of memory."""
    params = line.scale, dline.scale, dline.bias
    if not all(v is None or v.size == v.shape[-1] for v in params):
        return by_sums(centered, line, dx, dline)
    _, residue, rstd, scale, _ = line
    rstd, dmean, drstd = (
        v.astype(centered.dtype) for v in (rstd, dline.mean, dline.rstd)
    )
    y = (centered if residue is None else centered - residue) * rstd
    if scale is None:
        scale = jnp.ones((1,) * (y.ndim - 1) + y.shape[-1:], y.dtype)
    dslope, dshift = _outer(drstd / rstd, scale), _outer(-rstd * dmean, scale)
    ones = jnp.ones_like(rstd)
    if dline.scale is not None:
        dslope = dslope + _outer(ones, dline.scale)
    if dline.bias is not None:
        dshift = dshift + _outer(ones, dline.bias)
    dy = y * dslope + dshift
    return dy if dx is None else rstd * scale * dx + dy


def _outer(column: Array, row: Array) -> Array:
    return jnp.matmul(column, row.reshape(1, -1), precision=lax.Precision.HIGHEST)


def _results(reduction: Reduction, *_: Any) -> list[Struct]:
    return [Struct(reduction.axes.shape, reduction.dtype)]


TANGENT = Linear(
    "standardize_tangent",
    "standardize_gradient",
    functools.partial(tangent, by_sums),
    _results,
)


def _standardized(reduction: Reduction, stood: Stood) -> tuple[Array, ...]:
    axes, dtype = reduction.axes, reduction.dtype
    x, mask, line = stood
    return (from_working(apply_line(x, mask, line, axes), mask, axes, dtype),)


class _Standardize(Operation):
    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        (stood,), ((dx, _, dline),) = operands, changes
        return TANGENT(static, without_bias(stood), Change(dx, dline))


STANDARDIZE = _Standardize("standardize", _standardized, _results)


def without_bias(stood: Stood) -> Stood:
    """What a tangent is taken at, where the bias changes nothing."""
    return stood._replace(line=stood.line._replace(bias=None))


def complete(line: Line, dline: Line) -> Line:
    """A tangent of `line` with zeros for what does not change but the parameters, and
    what the residue changes as part of the mean's."""
    mean, residue, rstd, scale, bias = dline
    if residue is not None:
        mean = residue if mean is None else mean + residue
    mean = jnp.zeros_like(line.mean) if mean is None else mean
    rstd = jnp.zeros_like(line.rstd) if rstd is None else rstd
    return Line(mean, None, rstd, scale, bias)
