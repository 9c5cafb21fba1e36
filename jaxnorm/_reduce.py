"""Mean and variance: a formula for each compiler, and the tangent."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxnorm._arguments import as_bool
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating
from jaxnorm._exact import abs_square, drop_last_bit, two_sum, two_sum_denoised
from jaxnorm._moments import Moments
from jaxnorm._working import as_mask, check_axes, mask_to_working, to_working

MeanVarResidue = tuple[Array, Array, Array]


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
    is the mean or, where that saves a pass over `x`, the mean of a sixteenth or more
    of the elements. The squared mean that is subtracted then magnifies the rounding of
    the sums at most 16 times (Chan, Golub and LeVeque, 1983). Where nothing is valid,
    mean, variance and size are 0.

    `mask` is boolean (or 0 and 1) and broadcasts to `x`. Raises ValueError or TypeError
    if it does not, and TypeError if `x` holds no numbers.
    """
    x = as_floating(x)
    check_axes(axes, x.shape)
    center = as_bool("center", center)
    mask = as_mask(mask, x.shape)
    size = _size(axes) if mask is None else _count(mask, axes)
    mean, var, residue = _mean_and_var(axes, center, x, mask, size)
    return Moments(mean, var, size, residue)


def _size(axes: Axes) -> int | Array:
    """Elements per statistic, as an array where their number is open."""
    return axes.size if axes.size_is_known else jnp.asarray(axes.size, jnp.int32)


def _count(mask: Array, axes: Axes) -> Array:
    """Valid elements per statistic, in int32: float32 cannot count past 2**24."""
    return mask_to_working(mask, axes).sum(axes.reduce, keepdims=True, dtype=jnp.int32)


def _mean(x: Array, axes: Axes, size: Any) -> Array:
    """The sum of working `x` over `axes.reduce`, divided by `size`; 0 of nothing."""
    for step in axes.reduce_in_order:
        x = x.sum(step, keepdims=True) if step else x
    return x / jnp.maximum(jnp.asarray(size), 1).astype(x.dtype)


def _one_element(x: Array, axes: Axes) -> Array:
    """One element of each statistic, so that what is constant has it as its mean.

    The mean of some where a slice would move data between devices, 0 of nothing.
    """
    if not axes.size:
        return jnp.zeros(axes.stats_shape, x.dtype)
    for a in _slab_axes(x, axes):
        x = lax.slice_in_dim(x, 0, 1, axis=a)
    if x.shape == axes.stats_shape:
        return x
    return drop_last_bit(x.mean(axes.reduce, keepdims=True))


def _pivot(x: Array, axes: Axes) -> Array:
    """The mean of at least a sixteenth of the elements of each statistic.

    The variance between that part and the rest is part of the whole variance, so the
    pivot is within sqrt(1 / part - 1) standard deviations of the mean.
    """
    along = _slab_axes(x, axes)
    if not along or not axes.size:
        return drop_last_bit(_mean(x, axes, axes.size))
    slab, enough = x, -(-axes.size // 16)
    for a in along:
        # As few along this axis as leave enough, if the axes to come are kept whole.
        count = -(-x.shape[a] * enough // math.prod(slab.shape[i] for i in axes.reduce))
        # The last axis is contiguous in memory, where steps would cost what all cost.
        step = 1 if a == x.ndim - 1 else x.shape[a] // count
        slab = lax.slice_in_dim(slab, 0, (count - 1) * step + 1, step, a)
    return drop_last_bit(slab.mean(axes.reduce, keepdims=True))


def _slab_axes(x: Array, axes: Axes) -> list[int]:
    """The reduced axes to take a part of, space before the batch.

    None of those where a slice would move data between devices, nor where it is open
    how many elements there are.
    """
    if not axes.size_is_known:
        return []
    sharded = sharded_axes(x)
    usable = [a for a in axes.reduce if x.shape[a] > 1 and a not in sharded]
    return sorted(usable, key=lambda a: a == 0)


def sharded_axes(x: Array) -> set[int]:
    """The axes of `x` that are spread over devices, as known in a mesh of explicit
    axes."""
    spec = tuple(getattr(jax.typeof(x).sharding, "spec", ()))
    return {a for a, name in enumerate(spec) if name is not None}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _mean_and_var(
    axes: Axes, center: bool, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    if center:
        return _centered(axes, x, mask, size)
    x = to_working(x, mask, axes)
    var = _mean(abs_square(x), axes, size)
    zero = jnp.zeros_like(var, x.dtype)
    return zero, var, zero


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _centered(axes: Axes, x: Array, mask: Array | None, size: Any) -> MeanVarResidue:
    """Mean, variance and residue; compiled once, also where nothing around it is.

    Each compiler gets the formula that it makes the fewest passes over memory of.
    """
    if mask is not None or not axes.size_is_known:
        return _about_the_mean(axes, x, mask, size)
    cpu = _in_two_passes if axes.per_feature == axes else _feature_by_feature
    cpu = _along_rows if axes.of_rows else cpu
    gpu = _about_the_mean if axes.of_rows else _about_a_pivot
    given = axes, x, mask, size
    return lax.platform_dependent(
        cpu=functools.partial(cpu, *given),
        cuda=functools.partial(gpu, *given),
        rocm=functools.partial(gpu, *given),
        default=functools.partial(_about_the_mean, *given),
    )


def _moments_about(
    axes: Axes, x: Array, mask: Array | None, size: Any, pivot: Array
) -> tuple[Array, Array]:
    """The mean of working `x - pivot`, and the variance, in one pass over `x`."""
    offset = x - pivot
    if mask is not None:
        offset = jnp.where(mask_to_working(mask, axes), offset, jnp.zeros((), x.dtype))
    shift = _mean(offset, axes, size)
    var = _mean(abs_square(offset), axes, size) - abs_square(shift)
    return shift, jnp.maximum(var, 0)


def _about_the_mean(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    """Deviations from the mean, and what rounding left of it, as their own mean.

    For rows that a GPU holds on chip, one pass in all; else two.
    """
    x = to_working(x, mask, axes)
    mean = drop_last_bit(_mean(x, axes, size))
    residue, var = _moments_about(axes, x, mask, size, mean)
    if not axes.of_rows:  # where it would part the kernel
        mean, residue = two_sum_denoised(mean, residue)
    return mean, var, residue


def _along_rows(axes: Axes, x: Array, mask: Array | None, size: Any) -> MeanVarResidue:
    """As `_about_the_mean`, of nothing that XLA:CPU cannot take in one kernel."""
    x = to_working(x, mask, axes)
    mean = _mean(x, axes, size)
    residue, var = _moments_about(axes, x, mask, size, mean)
    return mean, var, residue


def row_moments(x: Array, axes: Axes, center: bool) -> Moments:
    """The moments of rows with the pivot as their mean, and the rest as its residue.

    Neither waits for the other, so that all sums are taken in one pass.
    """
    if not center:
        return moments(x, axes, center=False)
    x, size = to_working(x, None, axes), _size(axes)
    pivot = _pivot(x, axes)
    shift, var = _moments_about(axes, x, None, size, pivot)
    return Moments(pivot, var, size, shift)


def _about_a_pivot(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    """Both sums of `x - pivot`: one pass, where elementwise work is free."""
    x = to_working(x, mask, axes)
    pivot = _pivot(x, axes)
    shift, var = _moments_about(axes, x, mask, size, pivot)
    mean, residue = two_sum_denoised(pivot, shift)
    return mean, var, residue


def _in_two_passes(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    """The mean, by way of a pivot so that it is exact, then the squares.

    XLA:CPU sums fast, and writes nothing of x's size if each sum takes a difference of
    its own, less an array of the kept axes alone. What is elementwise would follow a
    sum into its kernel, at the speed of that, were it not rounded.
    """
    x = to_working(x, mask, axes)
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


def _feature_by_feature(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> MeanVarResidue:
    """The moments of each feature, pooled: XLA:CPU sums along both slowly."""
    part = axes.per_feature
    plain, features = axes.reduce_in_order
    shape = axes._replace(reduce=plain).stats_shape
    each = _in_two_passes(part, x, mask, part.size)
    mean, var, residue = (v.reshape(shape) for v in each)
    whole = drop_last_bit(mean.mean(features, keepdims=True))
    offset = (mean - whole) + residue
    shift = offset.mean(features, keepdims=True)
    var = (var + abs_square(offset)).mean(features, keepdims=True) - abs_square(shift)
    mean, residue = two_sum_denoised(whole, shift)
    return mean, jnp.maximum(var, 0), residue


@_mean_and_var.defjvp
def _mean_and_var_jvp(
    axes: Axes, center: bool, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[MeanVarResidue, MeanVarResidue]:
    x, mask, size = primals
    mean, var, residue = _mean_and_var(axes, center, *primals)
    own = Moments(mean, var, size, residue)

    def tangent(
        x: Array, mask: Array | None, own: Moments, dx: Array
    ) -> tuple[Array, Array]:
        return moments_tangent(axes, center, x, mask, own, to_working(dx, mask, axes))

    # Recomputed, not kept: only x in its own dtype and the mean stay for the backward.
    tangent = jax.checkpoint(tangent, prevent_cse=False)
    dmean, dvar = tangent(x, mask, own, tangents[0])
    return (mean, var, residue), (dmean, dvar, jnp.zeros_like(residue))


# With  n = size  and  mean + residue  as the mean before it is rounded:
#
#   dmean = sum(dx) / n
#   dvar  = sum(2 (x - mean - residue) (dx - dmean)) / n
#         = 2 (sum((x - mean) dx) / n - residue * dmean)
#
# as the deviations from the mean add up to 0. For complex x, dvar takes the conjugate
# of the deviations, and the real part of the sum.


def moments_tangent(
    axes: Axes, center: bool, x: Array, mask: Array | None, own: Moments, dx: Array
) -> tuple[Array, Array]:
    """The tangents of the mean and the variance of `x`, whose moments are `own`.

    `dx` is in the working shape already, and so wide: its transpose adds up all that
    x's cotangent consists of before it is rounded, once, to the dtype of x.
    """
    dmean = _mean(dx, axes, own.size) if center else jnp.zeros_like(own.mean)
    centered = to_working(x, mask, axes) - own.mean
    half = _mean((centered.conj() * dx).real, axes, own.size)
    return dmean, 2 * (half - (own.residue.conj() * dmean).real)
