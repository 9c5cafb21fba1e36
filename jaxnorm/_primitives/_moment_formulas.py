"""Mean and variance of what a kernel of XLA's takes in the fewest passes, for each."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxnorm._axes import Axes
from jaxnorm._dtypes import at_least_float32
from jaxnorm._exact import abs_square, drop_last_bit, two_sum, two_sum_denoised
from jaxnorm._moments import Moments
from jaxnorm._primitives._operation import Reduction, Struct
from jaxnorm._primitives._parts import sum_in_parts
from jaxnorm._working import mask_to_working, to_working

MeanVarResidue = tuple[Array, Array, Array]


def of_any(centered: Callable[..., MeanVarResidue]) -> Callable[..., MeanVarResidue]:
    """A formula of everything, of one for what is not masked, of a size that is known,
    and about a mean."""

    @functools.wraps(centered)
    def formula(
        reduction: Reduction, x: Array, mask: Array | None, size: Any
    ) -> MeanVarResidue:
        axes = reduction.axes
        if not reduction.center:
            return _mean_square(axes, x, mask, size)
        if mask is not None or not axes.size_is_known:
            return _about_the_mean(axes, x, mask, size)
        return centered(axes, x)

    return formula


def mean_of(x: Array, axes: Axes, size: Any = None) -> Array:
    """The sum of working `x` over `axes.reduce`, divided by `size`; 0 of nothing."""
    for step in axes.reduce_in_order:
        x = x.sum(step, keepdims=True) if step else x
    return x / count_of(axes, size, x.dtype)


def mean_in_parts(x: Array, axes: Axes, size: Any = None) -> Array:
    """As `mean_of`, of which a GPU sums all but features in parts."""
    plain, features = axes.reduce_in_order
    x = sum_in_parts(x, plain) if plain else x
    x = x.sum(features, keepdims=True) if features else x
    return x / count_of(axes, size, x.dtype)


def count_of(axes: Axes, size: Any, dtype: DTypeLike) -> Array:
    """What a sum is divided by: `size`, or as many as there are, if that is None."""
    size = axes.size if size is None else size
    return jnp.maximum(jnp.asarray(size), 1).astype(dtype)


def _mean_square(axes: Axes, x: Array, mask: Array | None, size: Any) -> MeanVarResidue:
    x = to_working(x, mask, axes)
    var = mean_of(abs_square(x), axes, size)
    zero = jnp.zeros_like(var, x.dtype)
    return zero, var, zero


def _one_element(x: Array, axes: Axes) -> Array:
    """One element of each statistic, so that what is constant has it as its mean.

    0 of nothing.
    """
    if not axes.size:
        return jnp.zeros(axes.stats_shape, x.dtype)
    for a in _slab_axes(x, axes):
        x = lax.slice_in_dim(x, 0, 1, axis=a)
    return x


def _pivot(x: Array, axes: Axes) -> Array:
    """The mean of at least a 32nd of the elements of each statistic.

    The variance between that part and the rest is part of the whole variance, so the
    pivot is within sqrt(1 / part - 1) standard deviations of the mean.
    """
    along = _slab_axes(x, axes)
    if not along or not axes.size:
        return drop_last_bit(mean_of(x, axes))
    slab, enough = x, -(-axes.size // 32)
    for a in along:
        # As few along this axis as leave enough, if the axes to come are kept whole.
        count = -(-x.shape[a] * enough // math.prod(slab.shape[i] for i in axes.reduce))
        # The last axis is contiguous in memory, where steps would cost what all cost.
        step = 1 if a == x.ndim - 1 else x.shape[a] // count
        slab = lax.slice_in_dim(slab, 0, (count - 1) * step + 1, step, a)
    return drop_last_bit(slab.mean(axes.reduce, keepdims=True))


def _slab_axes(x: Array, axes: Axes) -> list[int]:
    """The reduced axes to take a part of, space before the batch.

    None where it is open how many elements there are.
    """
    if not axes.size_is_known:
        return []
    usable = [a for a in axes.reduce if x.shape[a] > 1]
    return sorted(usable, key=lambda a: a == 0)


def _moments_about(
    axes: Axes,
    x: Array,
    mask: Array | None,
    size: Any,
    pivot: Array,
    mean: Callable[..., Array] = mean_of,
) -> tuple[Array, Array]:
    """The mean of working `x - pivot`, and the variance, in one pass over `x`."""
    offset = x - pivot
    if mask is not None:
        offset = jnp.where(mask_to_working(mask, axes), offset, jnp.zeros((), x.dtype))
    shift = mean(offset, axes, size)
    var = mean(abs_square(offset), axes, size) - abs_square(shift)
    return shift, jnp.maximum(var, 0)


def _about_the_mean(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    """Deviations from the mean, and what rounding left of it, as their own mean.

    For rows that a GPU holds on chip, one pass in all; else two.
    """
    x = to_working(x, mask, axes)
    mean = drop_last_bit(mean_of(x, axes, size))
    residue, var = _moments_about(axes, x, mask, size, mean)
    if not axes.of_rows:  # where it would part the kernel
        mean, residue = two_sum_denoised(mean, residue, var)
    return mean, var, residue


def along_rows(axes: Axes, x: Array) -> MeanVarResidue:
    """As `_about_the_mean`, of nothing that XLA:CPU cannot take in one kernel."""
    x = to_working(x, None, axes)
    mean = mean_of(x, axes)
    residue, var = _moments_about(axes, x, None, None, mean)
    return mean, var, residue


def about_a_pivot_apart(axes: Axes, x: Array) -> MeanVarResidue:
    """With the pivot as the mean, and the rest as its residue.

    Neither waits for the other, so that all sums along rows are taken in one pass.
    """
    x = to_working(x, None, axes)
    pivot = _pivot(x, axes)
    shift, var = _moments_about(axes, x, None, None, pivot)
    return pivot, var, shift


def about_a_pivot(axes: Axes, x: Array) -> MeanVarResidue:
    """Both sums of `x - pivot`: one pass, where elementwise work is free."""
    x = to_working(x, None, axes)
    pivot = _pivot(x, axes)
    shift, var = _moments_about(axes, x, None, None, pivot, mean_in_parts)
    mean, residue = two_sum_denoised(pivot, shift, var)
    return mean, var, residue


def in_two_passes(axes: Axes, x: Array) -> MeanVarResidue:
    """The mean, by way of a pivot so that it is exact, then the squares.

    XLA:CPU sums fast, and writes nothing of x's size if each sum takes a difference of
    its own, less an array of the kept axes alone. What is elementwise would follow a
    sum into its kernel, at the speed of that, were it not rounded.
    """
    x = to_working(x, None, axes)
    kept = [a for a in range(x.ndim) if a not in axes.reduce]
    size = jnp.asarray(max(axes.size, 1), x.real.dtype)

    def mean_of(v: Array) -> Array:
        return v.sum(axes.reduce) / size.astype(v.dtype)

    def spread(v: Array) -> Array:
        return lax.broadcast_in_dim(v, x.shape, kept)

    pivot = lax.squeeze(_one_element(x, axes), axes.reduce)
    mean, residue = two_sum(pivot, mean_of(x - spread(pivot)))
    # Not about the mean: x - mean is shared with what follows, and would be written.
    near = drop_last_bit(mean)
    off = (mean - near) + residue
    var = mean_of(abs_square(x - spread(near))) - abs_square(off)
    var = drop_last_bit(jnp.maximum(var, 0))
    mean, var, residue = (v.reshape(axes.stats_shape) for v in (mean, var, residue))
    return mean, var, residue


def feature_by_feature(
    axes: Axes, x: Array, each_of: Callable[..., MeanVarResidue] = in_two_passes
) -> MeanVarResidue:
    """The moments of each feature, by `each_of`, pooled."""
    plain, features = axes.reduce_in_order
    shape = axes._replace(reduce=plain).stats_shape
    each = each_of(axes.per_feature, x)
    mean, var, residue = (v.reshape(shape) for v in each)
    whole = drop_last_bit(mean.mean(features, keepdims=True))
    offset = (mean - whole) + residue
    shift = offset.mean(features, keepdims=True)
    var = (var + abs_square(offset)).mean(features, keepdims=True) - abs_square(shift)
    mean, residue = two_sum_denoised(whole, shift, var)
    return mean, jnp.maximum(var, 0), residue


def on_cpu(axes: Axes, x: Array) -> MeanVarResidue:
    """What XLA:CPU makes the fewest passes over memory of."""
    if axes.of_rows:
        return along_rows(axes, x)
    if axes.per_feature == axes:
        return in_two_passes(axes, x)
    return feature_by_feature(axes, x)  # sums along both are slow


def on_gpu(axes: Axes, x: Array) -> MeanVarResidue:
    """What XLA makes the fewest passes over memory of on a GPU."""
    if not axes.of_rows:
        return about_a_pivot(axes, x)
    # A longer row is in no kernel as a whole, so that a second sum reads it again.
    wide = axes.size_is_known and axes.size > 16384
    return (about_a_pivot_apart if wide else about_the_mean_in_turn)(axes, x)


def about_the_mean_in_turn(axes: Axes, x: Array) -> MeanVarResidue:
    """As `about_the_mean`, with each sum of what the sums before it leave.

    XLA puts such a chain into the kernel of each use of the result. Sums side by side
    become kernels of their own as soon as there are two uses.
    """
    x = to_working(x, None, axes)
    mean = drop_last_bit(mean_of(x, axes))
    offset = x - mean
    residue = mean_of(offset, axes)
    return mean, mean_of(abs_square(offset - residue), axes), residue


def about_the_mean(axes: Axes, x: Array) -> MeanVarResidue:
    """Deviations from the mean, and what rounding left of it, as their own mean."""
    return _about_the_mean(axes, x, None, None)


# With  n = size  and  mean + residue  as the mean before it is rounded:
#
#   dmean = sum(dx) / n
#   dvar  = sum(2 (x - mean - residue) (dx - dmean)) / n
#         = 2 (sum((x - mean) dx) / n - residue * dmean)
#
# as the deviations from the mean add up to 0. For complex x, dvar takes the conjugate
# of the deviations, and the real part of the sum.


def tangent(
    axes: Axes,
    center: bool,
    x: Array,
    mask: Array | None,
    own: Moments,
    dx: Array,
) -> tuple[Array, Array]:
    """The tangents of the mean and the variance of `x`, whose moments are `own`.

    `dx` is in the working shape.
    """
    dmean = mean_of(dx, axes, own.size) if center else jnp.zeros_like(own.mean)
    centered = to_working(x, mask, axes) - own.mean
    half = mean_of((centered.conj() * dx).real, axes, own.size)
    return dmean, 2 * (half - (own.residue.conj() * dmean).real)


def results(reduction: Reduction, x: Any, *_: Any) -> list[Struct]:
    """Of which shapes and dtypes mean, variance and residue are."""
    wide = at_least_float32(x.dtype)
    mean = Struct(reduction.axes.stats_shape, wide)
    return [mean, Struct(mean.shape, jnp.finfo(wide).dtype), mean]
