"""Step 3: subtract the mean, divide by the deviation, then scale and shift."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_array
from jaxnorm._axes import Axes
from jaxnorm._devices import sharded_as, vary_together
from jaxnorm._dtypes import as_floating, out_dtype, promote
from jaxnorm._moments import aligned, as_mask, check_axes, to_working


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
    return standardized(axes, dtype, x, mask, mean, rest, rstd, scale, bias)


def _as_statistic(name: str, value: Any, axes: Axes) -> Any:
    """`value`, which must broadcast to the array in its working shape."""
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

    def f(x, mask, *arrays):
        return from_working(
            formula(to_working(x, mask, axes), *arrays), mask, axes, dtype
        )

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
def standardized(axes, dtype, x, mask, mean, residue, rstd, scale, bias):
    """`standardize`, of arrays that are known to fit."""
    y = apply_line(axes, x, mask, mean, residue, rstd, scale, bias)
    return from_working(y, mask, axes, dtype)


def apply_line(axes, x, mask, mean, residue, rstd, scale, bias):
    """`standardize` in the working shape and in the precision of the statistics."""
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
def _standardized_jvp(axes, dtype, primals, tangents):
    x, mask, mean, residue, rstd, scale, bias = primals
    dx, _, dmean, dresidue, drstd, dscale, dbias = tangents
    dmean = dmean if residue is None else dmean + dresidue

    def tangent(x, mask, mean, residue, rstd, scale, dx, *changes):
        dx = to_working(dx, mask, axes)
        return standardize_tangent(
            axes, dtype, x, mask, mean, residue, rstd, scale, dx, *changes
        )

    # Recomputed, not kept: x in its own dtype is all of its size the backward needs.
    dy = jax.checkpoint(tangent, prevent_cse=False)(
        x, mask, mean, residue, rstd, scale, dx, dmean, drstd, dscale, dbias
    )
    return standardized(axes, dtype, *primals), dy


def standardize_tangent(
    axes, dtype, x, mask, mean, residue, rstd, scale, dx, dmean, drstd, dscale, dbias
):
    """The tangent of `standardize`, whose transpose sums x's cotangent twice, once
    weighted by `x - mean`, whatever the statistics depend on. `dx` is in the working
    shape."""
    centered = to_working(x, mask, axes) - mean
    dx, rstd, drstd = (v.astype(mean.dtype) for v in (dx, rstd, drstd))
    form = _row_tangent if axes.of_rows else _column_tangent
    dy = form(x, centered, residue, rstd, scale, dx, dmean, drstd, dscale, dbias)
    return from_working(dy, mask, axes, dtype)


def _column_tangent(x, centered, residue, rstd, scale, dx, *changes):
    slope = affine(rstd, scale, None)
    dslope, dshift = line_tangent(x, residue, rstd, scale, *changes)
    return slope * dx + centered * dslope + dshift


def line_tangent(x, residue, rstd, scale, dmean, drstd, dscale, dbias):
    """The tangents of slope and shift, where y is slope * (x - mean) + shift.

    Where parameters vary along the axes that statistics do, these are small, and their
    transposes the only two sums of x's size.
    """
    slope, dslope = (affine(v, scale, None) for v in (rstd, drstd))
    if dscale is not None:
        dslope = dslope + rstd * dscale
    dshift = affine(-slope * dmean, None, dbias)
    if residue is not None:
        dshift = dshift - residue * dslope
    return vary_together(x, dslope, dshift)


def _row_tangent(x, centered, residue, rstd, scale, dx, dmean, drstd, dscale, dbias):
    """As `line_tangent`, where parameters vary along the rows that share statistics."""
    dmean, drstd, dscale, dbias = vary_together(x, dmean, drstd, dscale, dbias)
    given = centered, residue, rstd, scale, dx, dmean, drstd, dscale, dbias
    one_row = all(v is None or v.size == v.shape[-1] for v in (scale, dscale, dbias))
    cpu = _by_products if one_row else _by_sums
    return lax.platform_dependent(
        cpu=functools.partial(cpu, *given), default=functools.partial(_by_sums, *given)
    )


def _by_sums(centered, residue, rstd, scale, dx, dmean, drstd, dscale, dbias):
    """Nothing in the sums along rows waits for another of them."""
    dshift = -rstd * dmean if residue is None else -rstd * dmean - residue * drstd
    dy = affine(rstd * dx + centered * drstd + dshift, scale, None)
    if dscale is not None:
        centered = centered if residue is None else centered - residue
        dy = dy + centered * rstd * dscale
    return affine(dy, None, dbias)


def _by_products(centered, residue, rstd, scale, dx, dmean, drstd, dscale, dbias):
    """The sums as matrix products, which XLA:CPU takes at the speed of memory."""
    rstd, dmean, drstd = (v.astype(centered.dtype) for v in (rstd, dmean, drstd))
    y = (centered if residue is None else centered - residue) * rstd
    scale = (
        jnp.ones((1,) * (y.ndim - 1) + y.shape[-1:], y.dtype)
        if scale is None
        else scale
    )
    dslope, dshift = _outer(drstd / rstd, scale), _outer(-rstd * dmean, scale)
    ones = jnp.ones_like(rstd)
    dslope = dslope if dscale is None else dslope + _outer(ones, dscale)
    dshift = dshift if dbias is None else dshift + _outer(ones, dbias)
    return rstd * scale * dx + y * dslope + dshift


def _outer(column, row):
    return jnp.matmul(column, row.reshape(1, -1), precision=lax.Precision.HIGHEST)


def from_working(
    y: Array, mask: Array | None, axes: Axes, dtype: DTypeLike | None
) -> Array:
    """The array's own shape again, in `dtype`, and 0 where `mask` is false."""
    y = y.reshape(axes.shape).astype(dtype)
    return y if mask is None else jnp.where(mask, y, jnp.zeros((), dtype))
