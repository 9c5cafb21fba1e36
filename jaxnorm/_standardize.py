"""Step 3: subtract the mean, divide by the deviation, then scale and shift."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_array
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating, out_dtype, promote
from jaxnorm._primitives import columns
from jaxnorm._primitives._operation import Reduction
from jaxnorm._primitives.affine import STANDARDIZE, Line, Stood
from jaxnorm._primitives.affine import affine as affine
from jaxnorm._primitives.columns import Centered, Terms
from jaxnorm._sharding import sharded_as, vary_together
from jaxnorm._working import aligned, as_mask, check_axes, from_working, to_working


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
    mean, rstd, rest = (
        _as_statistic(k, v, axes)
        for k, v in (("mean", mean), ("rstd", rstd), ("residue", residue))
    )
    mask = as_mask(mask, x.shape)
    dtype = out_dtype(x, dtype)
    scale = as_param("scale", scale, axes, mean.dtype)
    bias = as_param("bias", bias, axes, mean.dtype)
    # A plain 0 is known while tracing, and costs nothing.
    none = isinstance(residue, float) and residue == 0
    rest = None if none else rest.astype(mean.dtype)
    line = Line(mean, rest, rstd, scale, bias)
    return standardized(Reduction(axes, True, dtype), x, mask, line)


def _as_statistic(name: str, value: Any, axes: Axes) -> Any:
    """`value`, if it broadcasts to the array in its working shape; else raises."""
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


def standardized(
    reduction: Reduction, x: Array, mask: Array | None, line: Line
) -> Array:
    """`standardize` of checked arguments."""
    if not is_of_columns(reduction.axes, x, line):
        return STANDARDIZE(reduction, Stood(x, mask, line))[0]
    centered = Centered(x, mask, line.mean, None)
    return columns.line(reduction, centered, Terms(None, line.slope, line.shift))


def is_of_columns(axes: Axes, x: Array, line: Line) -> bool:
    """Whether slope and shift are small: the same along an axis that is reduced."""
    if jnp.iscomplexobj(x) or not axes.reduce:
        return False
    rank = len(axes.working_shape)
    given = [v.shape for v in line if v is not None and v.ndim]
    return any(all(shape[a - rank] == 1 for shape in given) for a in axes.reduce)
