"""Mean and variance of an array."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_bool
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating
from jaxnorm._exact import drop_last_bit, not_zero
from jaxnorm._moments import Moments, like_moments, moved
from jaxnorm._primitives import columns
from jaxnorm._primitives._operation import Reduction
from jaxnorm._sharding import automatically
from jaxnorm._working import as_mask, check_axes, mask_to_working, to_working


def moments(
    x: ArrayLike, axes: Axes, *, mask: ArrayLike | None = None, center: bool = True
) -> Moments:
    """Mean, biased variance and size of the elements of `x` over `axes.reduce`.

    With `center=False` the mean is taken as 0, so that `var` is the mean square. The
    same as

        x = x.astype(promote_types(x.dtype, float32)).reshape(axes.working_shape)
        mean = x.mean(axes.reduce, keepdims=True, where=mask)
        var = (abs(x - mean) ** 2).mean(axes.reduce, keepdims=True, where=mask)

    but exact whatever the mean: the squares are those of `x - pivot`, where the pivot
    is the mean or, where that saves a pass over `x`, the mean of a 32nd or more of
    the elements. The squared mean that is subtracted then magnifies the rounding of the
    sums at most 32 times (Chan, Golub and LeVeque, 1983). Where nothing is valid,
    mean, variance and size are 0.

    `mask` is boolean (or 0 and 1) and broadcasts to `x`. Raises ValueError or TypeError
    if it does not, and TypeError if `x` holds no numbers.
    """
    x = as_floating(x)
    check_axes(axes, x.shape)
    reduction = Reduction(axes, as_bool("center", center), x.dtype)
    mask = as_mask(mask, x.shape)
    return automatically(
        lambda x, mask: moments_of(reduction, x, mask),
        x,
        mask,
        like=like_moments(x, axes),
    )


def moments_of(reduction: Reduction, x: Array, mask: Array | None) -> Moments:
    """`moments` of checked arguments."""
    axes = reduction.axes
    size = _size(axes) if mask is None else _count(mask, axes)
    count = None if mask is None else size
    mean, var, residue = columns.MOMENTS(reduction, x, mask, count)
    return Moments(mean, var, size, residue)


def weighted_moments(x: Array, weights: Array, axes: Axes) -> Moments:
    """As `moments`, of elements that count as often as their weights say.

        size = weights.sum(axes.reduce, keepdims=True)
        mean = (weights * x).sum(axes.reduce, keepdims=True) / size
        var = (weights * (x - mean) ** 2).sum(axes.reduce, keepdims=True) / size

    `weights` are as `as_weights` gives them; what has weight 0 may be NaN.
    """
    x = to_working(x, weights > 0, axes)
    weights = mask_to_working(weights, axes).astype(x.dtype)
    size = weights.sum(axes.reduce, keepdims=True)

    def average(v: Array) -> Array:
        return (weights * v).sum(axes.reduce, keepdims=True) / not_zero(size)

    pivot = drop_last_bit(average(x))
    shift, square = average(x - pivot), average(jnp.square(x - pivot))
    var = jnp.maximum(square - jnp.square(shift), 0)
    return moved(Moments(shift, var, size), pivot)


def _size(axes: Axes) -> Any:
    """Elements per statistic, as an array where their number is open."""
    return axes.size if axes.size_is_known else jnp.asarray(axes.size, jnp.int32)


def _count(mask: Array, axes: Axes) -> Array:
    """Valid elements per statistic, in int32: float32 cannot count past 2**24."""
    return mask_to_working(mask, axes).sum(axes.reduce, keepdims=True, dtype=jnp.int32)
