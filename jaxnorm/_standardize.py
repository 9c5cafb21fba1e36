"""Step 3: subtract the mean, divide by the deviation, then scale and shift."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_array
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating, out_dtype, promote
from jaxnorm._sharding import sharded_as, vary_together
from jaxnorm._working import aligned, as_mask, check_axes, from_working, to_working


class Line(NamedTuple):
    """What standardizing does: `y = (x - mean - residue) * rstd * scale + bias`.

    The arrays broadcast against `x` in its working shape. `residue`, `scale` and `bias`
    may be None, which is 0, 1 and 0. The tangent of a line is a line of tangents, where
    None is no change.
    """

    mean: Array
    residue: Array | None
    rstd: Array
    scale: Array | None
    bias: Array | None


@sharded_as("x")
def standardize(
    x: ArrayLike,
    mean: Array,
    rstd: Array,
    axes: Axes,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    residue: ArrayLike = 0.0,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """`(x - mean) * rstd * scale + bias`, and 0 where `mask` is false.

    `mean` and `rstd` (the reciprocal of the deviation) broadcast against `x` in its
    working shape, as `Moments` do, and set the precision: at least float32. `residue`
    is what rounding has cut off the mean. `scale` and `bias` have the shape of the
    features, or one of these per example, (batch, *features). The result has `dtype`,
    that of `x` by default.

    Only `x`, in its own dtype, and arrays the size of the statistics and parameters
    are kept for the backward pass. Raises ValueError or TypeError where shapes or
    dtypes do not fit.
    """
    x = as_floating(x)
    check_axes(axes, x.shape)
    mean, rstd, residue = (
        _as_statistic(k, v, axes)
        for k, v in (("mean", mean), ("rstd", rstd), ("residue", residue))
    )
    mask = as_mask(mask, x.shape)
    dtype = out_dtype(x, dtype)
    scale = as_param("scale", scale, axes, mean.dtype)
    bias = as_param("bias", bias, axes, mean.dtype)
    # A plain 0 is known while tracing, and costs nothing.
    none = isinstance(residue, float) and residue == 0
    rest = None if none else jnp.asarray(residue, mean.dtype)
    return standardized(axes, dtype, x, mask, Line(mean, rest, rstd, scale, bias))


def _as_statistic(name: str, value: Any, axes: Axes) -> Any:
    """`value`, if it broadcasts to the array in its working shape; else raises."""
    if isinstance(value, float):
        return value
    value = as_array(name, value)
    pairs = zip(reversed(value.shape), reversed(axes.working_shape), strict=False)
    fits = all(n == 1 or n == whole for n, whole in pairs)
    if not fits or value.ndim > len(axes.working_shape):
        raise ValueError(
            f"{name} has shape {value.shape}, which does not broadcast to an array of "
            f"shape {axes.working_shape}: pass what moments gives for these axes"
        )
    return aligned(value, axes.working_shape) if value.shape else value


def pointwise(
    formula: Callable[..., Array],
    x: Array,
    axes: Axes,
    *arrays: Array | None,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """`formula(x, *arrays)` of `x` in its working shape, and 0 where `mask` is false.

    For methods that are not affine in `x`. As with `standardize`, the formula is given
    at least float32, and only `x`, in its own dtype, and `arrays` are kept for the
    backward pass, where the formula is computed again.
    """
    mask = as_mask(mask, x.shape)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)

    def f(x: Array, mask: Array | None, *arrays: Array | None) -> Array:
        y = formula(to_working(x, mask, axes), *arrays)
        return from_working(y, mask, axes, dtype)

    arrays = tuple(vary_together(x, *arrays))
    return jax.checkpoint(f, prevent_cse=False)(x, mask, *arrays)


def affine(y: Array, scale: Array | None, bias: Array | None) -> Array:
    """`y * scale + bias`, where None is 1 and 0."""
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def as_param(
    name: str, value: ArrayLike | None, axes: Axes, dtype: DTypeLike
) -> Array | None:
    """A parameter in the statistics' precision, broadcasting against working x."""
    if value is None:
        return None
    value = as_array(name, value)
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} is {value.dtype}, but the input is real")
    per_example = (*axes.shape[:1], *axes.feature_shape)
    if value.shape == axes.feature_shape:
        shape = axes.param_shape()
    elif value.shape == per_example and 0 not in axes.feature:
        shape = axes.param_shape(0)
    else:
        raise ValueError(
            f"{name} has shape {value.shape}, but the features of an input of shape "
            f"{axes.shape} are {axes.feature_shape}: pass that shape, or {per_example} "
            "for one per example"
        )
    return value.astype(promote(dtype, value.dtype)).reshape(shape)


def as_number(
    name: str, value: ArrayLike | None, default: float, dtype: DTypeLike
) -> Array:
    """A parameter that is one number; raises ValueError if it has a shape."""
    value = jnp.asarray(default if value is None else value, dtype)
    if value.shape:
        raise ValueError(f"{name} has shape {value.shape}, but it is one number")
    return value


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def standardized(
    axes: Axes, dtype: DTypeLike, x: Array, mask: Array | None, line: Line
) -> Array:
    """`standardize` of checked arguments."""
    return from_working(apply_line(x, mask, line, axes), mask, axes, dtype)


def apply_line(x: Array, mask: Array | None, line: Line, axes: Axes) -> Array:
    """`standardize` in the working shape and in the precision of the statistics."""
    mean, residue, rstd, scale, bias = line
    if axes.of_rows:
        y = to_working(x, mask, axes) - mean
        y = y if residue is None else y - residue
        return affine(y * rstd.astype(y.dtype), scale, bias)
    slope = affine(rstd.astype(mean.dtype), scale, None)
    y = (to_working(x, mask, axes) - mean) * slope
    shift = None if residue is None else -residue * slope
    if bias is not None:
        shift = bias if shift is None else bias + shift
    return y if shift is None else y + shift


@standardized.defjvp
def _standardized_jvp(
    axes: Axes,
    dtype: DTypeLike,
    primals: tuple[Array, Array | None, Line],
    tangents: tuple[Array, Any, Line],
) -> tuple[Array, Array]:
    x, mask, line = primals
    dx, _, dline = tangents
    if line.residue is not None and dline.residue is not None:
        dline = dline._replace(mean=dline.mean + dline.residue, residue=None)

    def tangent(
        x: Array, mask: Array | None, line: Line, dx: Array, dline: Line
    ) -> Array:
        dx = to_working(dx, mask, axes)
        return standardize_tangent(axes, dtype, x, mask, line, dx, dline)

    # Recomputed, not kept: x in its own dtype is all of its size the backward needs.
    dy = jax.checkpoint(tangent, prevent_cse=False)(x, mask, line, dx, dline)
    return standardized(axes, dtype, *primals), dy


# With  y = slope * (x - mean) + shift,  slope = rstd * scale,
#       shift = bias - residue * slope:
#
#   dy     = slope * dx + (x - mean) * dslope + dshift
#   dslope = drstd * scale + rstd * dscale
#   dshift = dbias - slope * dmean - residue * dslope
#
# The transpose sums x's cotangent twice, once weighted by x - mean, whatever the
# statistics depend on.


def standardize_tangent(
    axes: Axes,
    dtype: DTypeLike,
    x: Array,
    mask: Array | None,
    line: Line,
    dx: Array,
    dline: Line,
) -> Array:
    """The tangent of `standardize`. `dx` is in the working shape, and what the residue
    changes is part of `dline.mean`."""
    centered = to_working(x, mask, axes) - line.mean
    dtype_within = line.mean.dtype
    line = line._replace(rstd=line.rstd.astype(dtype_within))
    dline = dline._replace(rstd=dline.rstd.astype(dtype_within))
    form = _row_tangent if axes.of_rows else _column_tangent
    dy = form(x, centered, line, dx.astype(dtype_within), dline)
    return from_working(dy, mask, axes, dtype)


def _column_tangent(
    x: Array, centered: Array, line: Line, dx: Array, dline: Line
) -> Array:
    dslope, dshift = line_tangent(x, line, dline)
    return affine(line.rstd, line.scale, None) * dx + centered * dslope + dshift


def line_tangent(x: Array, line: Line, dline: Line) -> tuple[Array, Array]:
    """The tangents of slope and shift.

    Where parameters vary along the axes that statistics do, these are small, and their
    transposes the only two sums of x's size.
    """
    slope, dslope = (affine(v.rstd, line.scale, None) for v in (line, dline))
    if dline.scale is not None:
        dslope = dslope + line.rstd * dline.scale
    dshift = affine(-slope * dline.mean, None, dline.bias)
    if line.residue is not None:
        dshift = dshift - line.residue * dslope
    dslope, dshift = vary_together(x, dslope, dshift)
    return dslope, dshift


def _row_tangent(
    x: Array, centered: Array, line: Line, dx: Array, dline: Line
) -> Array:
    """As `_column_tangent`, where parameters vary along the rows that share statistics,
    so that slope and shift would be of x's size."""
    dline = Line(*vary_together(x, *dline))
    params = line.scale, dline.scale, dline.bias
    one_row = all(v is None or v.size == v.shape[-1] for v in params)
    cpu = _by_products if one_row else _by_sums
    return lax.platform_dependent(
        cpu=functools.partial(cpu, centered, line, dx, dline),
        default=functools.partial(_by_sums, centered, line, dx, dline),
    )


def _by_sums(centered: Array, line: Line, dx: Array, dline: Line) -> Array:
    """The tangent by sums along rows, none of which waits for another."""
    _, residue, rstd, scale, _ = line
    dshift = -rstd * dline.mean
    dshift = dshift if residue is None else dshift - residue * dline.rstd
    dy = affine(rstd * dx + centered * dline.rstd + dshift, scale, None)
    if dline.scale is not None:
        centered = centered if residue is None else centered - residue
        dy = dy + centered * rstd * dline.scale
    return affine(dy, None, dline.bias)


def _by_products(centered: Array, line: Line, dx: Array, dline: Line) -> Array:
    """The tangent by matrix products, which XLA:CPU takes at the speed of memory."""
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
    return rstd * scale * dx + y * dslope + dshift


def _outer(column: Array, row: Array) -> Array:
    return jnp.matmul(column, row.reshape(1, -1), precision=lax.Precision.HIGHEST)
