"""Step 2: mean, variance and number of the elements that share statistics."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_bool, check_function, check_instance
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating, at_least_float32


class Moments(NamedTuple):
    """Mean, biased variance and number of elements of each set that shares them.

    All broadcast against the array in its working shape. `mean` and `var` are at least
    float32. `size` is exact: a Python integer where nothing is masked, so that it is
    known while tracing, and an int32 array where the mask decides, or where shapes are
    open, as in `jax.export`. `residue` is what rounding has cut off the mean: without
    it, moments of small sets far from 0 could not be pooled exactly, nor the sets be
    standardized.
    """

    mean: Array
    var: Array
    size: Any
    residue: Any = 0.0

    def rstd(self, epsilon: ArrayLike) -> Array:
        """`1 / sqrt(var + epsilon)`, and NaN where the variance is infinite."""
        square = self.var + jnp.asarray(epsilon, self.var.dtype)
        return lax.rsqrt(overflow_as_nan(square))

    def broadcast_to(self, shape: tuple[int, ...]) -> "Moments":
        """Each of the four as an array of `shape`, to be taken offset alike."""
        return Moments(*(jnp.broadcast_to(v, shape) for v in self))


def overflow_as_nan(square: Array) -> Array:
    """`square`, with NaN for infinity: what is divided by it would be 0, and look like
    a result, where the square of a number is past the largest of its dtype.

    As a remainder, which takes `square` once: a selection would part the kernel that a
    GPU has for rows.
    """
    return lax.rem(square, jnp.full_like(square, jnp.finfo(square.dtype).max))


def as_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`mask` as booleans; raises if it does not broadcast to `shape`."""
    if mask is None:
        return None
    given = _of_zeros_and_ones(mask)
    pairs = zip(reversed(given.shape), reversed(shape), strict=False)
    if given.ndim > len(shape) or any(m not in (1, n) for m, n in pairs):
        raise ValueError(
            f"mask of shape {given.shape} does not broadcast to the input of shape "
            f"{shape}: each of its axes must be 1 or that of the input, from the last "
            "on; add axes of 1 at its end to mask whole examples"
        )
    return jnp.asarray(given.astype(bool))


def _of_zeros_and_ones(mask: Any) -> Array | np.ndarray:
    """`mask` as an array; raises if it is none, or is known to hold weights."""
    traced = any(isinstance(v, jax.Array) for v in jax.tree.leaves(mask))
    try:
        array = jnp.asarray(mask) if traced else np.asarray(mask)
    except (TypeError, ValueError):
        array = None
    if array is None or not (
        array.dtype == jnp.bool_
        or jnp.issubdtype(array.dtype, jnp.integer)
        or jnp.issubdtype(array.dtype, jnp.floating)
    ):
        got = type(mask).__name__ if array is None else f"dtype {array.dtype}"
        raise TypeError(f"mask must be boolean, or 0 and 1, got {got}")
    known = array.dtype != jnp.bool_ and not isinstance(array, Tracer)
    if known and getattr(array, "is_fully_addressable", True):
        values = np.asarray(array)
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(
                f"mask must be boolean, or 0 and 1, got {other[0]} in one of dtype "
                f"{array.dtype}: weights are no mask; `mask > 0` is one of what has any"
            )
    return array


def check_axes(axes: Axes, shape: tuple[int, ...]) -> None:
    """Raises unless `axes` are those of an array of `shape`."""
    check_instance("axes", axes, Axes, "jaxnorm._axes.keep")
    if axes.shape != shape:
        raise ValueError(f"axes are for an array of shape {axes.shape}, got {shape}")


def to_working(x: Array, mask: Array | None, axes: Axes) -> Array:
    """`x` in its working shape, in at least float32, with masked elements read as 0."""
    if mask is not None:
        # Before any arithmetic: a NaN masked later would still poison gradients.
        x = jnp.where(aligned(mask, axes.shape), x, jnp.zeros((), x.dtype))
    return x.astype(at_least_float32(x.dtype)).reshape(axes.working_shape)


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


def pool(m: Moments, total: Callable[[Array], Array]) -> Moments:
    """Moments of the union of disjoint sets, each with its own size.

    `total` sums an array over the sets, and is called twice, on arrays that have a last
    axis more than `m.mean`: `lambda v: v.sum(0, keepdims=True)` for sets along the
    leading axis. Sets of size 0 count for nothing. The variance does not suffer from
    means far from 0 (Chan, Golub and LeVeque, 1983).
    """
    check_instance("m", m, Moments, "jaxnorm.moments")
    check_function("total", total)
    dtype = m.mean.dtype
    size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)
    parts = [size.astype(v.dtype) * v for v in (m.mean, m.var)]
    rough, var, high, low = _unstack(total(_stack([*parts, *split_size(size)], dtype)))
    whole = join_size(high, low)
    rough, var = (
        drop_last_bit(_over(v, jnp.maximum(whole, 1))) for v in (rough, var.real)
    )
    # About the rough ones, whose own rounding would add up when pooled repeatedly.
    offset = (m.mean - rough) + m.residue
    parts = (offset, (m.var - var) + abs_square(offset))
    parts = (size.astype(v.dtype) * v for v in parts)
    shift, spread = _unstack(total(_stack(parts, dtype)))
    shift = _over(shift, jnp.maximum(whole, 1))  # what rounding left of the mean
    var = var + (_over(spread.real, jnp.maximum(whole, 1)) - abs_square(shift))
    mean, residue = two_sum(rough, shift)
    return Moments(mean, jnp.maximum(var, 0), whole, residue)


def union(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets, whose sizes are floating point.

    As `pool` of the two, without a limit to the sizes; and without a pivot, so that the
    variance is right also where it is below the rounding of the means.
    """
    less = a.size < b.size
    near = Moments(*(jnp.where(less, w, v) for v, w in zip(a, b, strict=True)))
    far = Moments(*(jnp.where(less, v, w) for v, w in zip(a, b, strict=True)))
    size = a.size + b.size
    weight = far.size / jnp.maximum(size, 1)
    # Relative to the larger set: the weights do not add up to 1 to the last bit, which
    # would add up over many batches.
    change = jax.tree.map(lambda v, u: jnp.where(weight > 0, v - u, 0), far, near)
    none = jax.tree.map(jnp.zeros_like, near)
    m = mix((none, change), (1 - weight, weight))
    mean, residue = two_sum(near.mean, near.residue + m.residue)
    return Moments(mean, near.var + m.var, size, residue)


def mix(
    parts: Sequence[Moments],
    weights: Iterable[Any],
    var_weights: Iterable[Any] | None = None,
) -> Moments:
    """Moments of a mixture in which each of `parts` has a weight; these add up to 1.

        mean = sum(weights * means)
        var = sum(weights * (vars + abs(means - mean)**2))

    With `var_weights`, the variance is `sum(var_weights * vars)`, without the spread of
    the means. The result has the mean of the first part, and how far the mean of the
    mixture is from it as its residue, so that nothing is rounded; its size is 1. Arrays
    are all of JAX or all of NumPy, of one precision.
    """
    weights, (first, *_) = [*weights], parts
    offsets = [(m.mean - first.mean) + (m.residue - first.residue) for m in parts]
    shift = _weighed(weights, offsets)
    if var_weights is None:
        around = [v - shift for v in offsets]
        pairs = zip(parts, around, strict=True)
        var = _weighed(weights, [m.var + (v * v.conj()).real for m, v in pairs])
    else:
        var = _weighed([*var_weights], [m.var for m in parts])
    return Moments(first.mean, var, 1, first.residue + shift)


def _weighed(weights: Sequence[Any], values: Sequence[Any]) -> Any:
    """The sum of `values`, each times its weight."""
    pairs = zip(weights, values, strict=True)
    return functools.reduce(operator.add, (w.astype(v.dtype) * v for w, v in pairs))


def moved(m: Moments, pivot: Array) -> Moments:
    """Those of `x`, where `m` are those of `x - pivot`."""
    mean, residue = two_sum(pivot, m.mean + m.residue)
    return m._replace(mean=mean, residue=residue)


def _stack(parts: Iterable[Array], dtype: DTypeLike) -> Array:
    return jnp.stack([v.astype(dtype) for v in parts], -1)


def _unstack(x: Array) -> list[Array]:
    return [x[..., i] for i in range(x.shape[-1])]


def split_size(size: Array) -> tuple[Array, Array]:
    """`size` as two integers small enough to be summed exactly in float32, which holds
    integers up to 2**24."""
    return size >> 16, size & 0xFFFF


def join_size(high: Array, low: Array) -> Array:
    """The size whose parts, or the sums of whose parts, these are."""
    return (high.real.astype(jnp.int32) << 16) + low.real.astype(jnp.int32)


def abs_square(x: Array) -> Array:
    """`abs(x) ** 2`, real also where `x` is complex."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def two_sum(pivot: Array, shift: Array) -> tuple[Array, Array]:
    """The sum of a rounded pivot and a smaller shift, and what rounding cut off it."""
    main = drop_last_bit(shift)
    total = pivot + main
    return total, (pivot - total) + main + (shift - main)


def two_sum_denoised(pivot: Array, shift: Array) -> tuple[Array, Array]:
    """As `two_sum`, and 0 for a rest below the rounding of the shift: it is noise, and
    would keep what is constant from becoming 0."""
    total, rest = two_sum(pivot, shift)
    noise = 64 * jnp.finfo(rest.dtype).eps * jnp.abs(shift)
    return total, jnp.where(jnp.abs(rest) > noise, rest, jnp.zeros_like(rest))


def drop_last_bit(x: Array) -> Array:
    """`x` with one bit less than it has.

    So that all uses of it are of one and the same number: a compiler contracts the
    division that made `x` with the subtraction that uses it, into something of more
    digits, but only in some places.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(drop_last_bit(x.real), drop_last_bit(x.imag))
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant - 1)


def _over(x: Array, size: Array) -> Array:
    return x / size.astype(x.dtype)


def aligned(mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` with leading 1s, so that it has the rank of `shape`."""
    return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)


def mask_to_working(mask: Array, axes: Axes) -> Array:
    """`mask` for an array in its working shape."""
    return jnp.broadcast_to(mask, axes.shape).reshape(axes.working_shape)


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
    return _over(x, jnp.maximum(jnp.asarray(size), 1))


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
) -> tuple[Array, Array, Array]:
    if center:
        return _centered(axes, x, mask, size)
    x = to_working(x, mask, axes)
    var = _mean(abs_square(x), axes, size)
    zero = jnp.zeros_like(var, x.dtype)
    return zero, var, zero


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _centered(
    axes: Axes, x: Array, mask: Array | None, size: Any
) -> tuple[Array, Array, Array]:
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


def _about_the_mean(axes, x, mask, size):
    """Deviations from the mean, and what rounding left of it, as their own mean.

    For rows that a GPU holds on chip, one pass in all; else two.
    """
    x = to_working(x, mask, axes)
    mean = drop_last_bit(_mean(x, axes, size))
    residue, var = _moments_about(axes, x, mask, size, mean)
    if not axes.of_rows:  # where it would part the kernel
        mean, residue = two_sum_denoised(mean, residue)
    return mean, var, residue


def _along_rows(axes, x, mask, size):
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


def _about_a_pivot(axes, x, mask, size):
    """Both sums of `x - pivot`: one pass, where elementwise work is free."""
    x = to_working(x, mask, axes)
    pivot = _pivot(x, axes)
    shift, var = _moments_about(axes, x, mask, size, pivot)
    mean, residue = two_sum_denoised(pivot, shift)
    return mean, var, residue


def _in_two_passes(axes, x, mask, size):
    """The mean, by way of a pivot so that it is exact, then the squares.

    XLA:CPU sums fast, and writes nothing of x's size if each sum takes a difference of
    its own, less an array of the kept axes alone. What is elementwise would follow a
    sum into its kernel, at the speed of that, were it not rounded.
    """
    x = to_working(x, mask, axes)
    kept = [a for a in range(x.ndim) if a not in axes.reduce]
    size = jnp.asarray(max(axes.size, 1), x.real.dtype)

    def mean_of(v):
        return v.sum(axes.reduce) / size.astype(v.dtype)

    def spread(v):
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


def _feature_by_feature(axes, x, mask, size):
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
def _mean_and_var_jvp(axes, center, primals, tangents):
    x, mask, size = primals
    mean, var, residue = _mean_and_var(axes, center, *primals)

    def tangent(x, mask, mean, residue, size, dx):
        dx = to_working(dx, mask, axes)
        return moments_tangent(axes, center, x, mask, mean, residue, size, dx)

    # Recomputed, not kept: only x in its own dtype and the mean stay for the backward.
    dmean, dvar = jax.checkpoint(tangent, prevent_cse=False)(
        x, mask, mean, residue, size, tangents[0]
    )
    return (mean, var, residue), (dmean, dvar, jnp.zeros_like(residue))


def moments_tangent(axes, center, x, mask, mean, residue, size, dx):
    """The tangents of mean and variance: the means of dx, and of 2 (x - mean) dx.

    `dx` is in the working shape already, and so wide: its transpose adds up all that
    x's cotangent consists of before it is rounded, once, to the dtype of x.
    """
    dmean = _mean(dx, axes, size) if center else jnp.zeros_like(mean)
    centered = to_working(x, mask, axes) - mean
    half = _mean((centered.conj() * dx).real, axes, size)
    return dmean, 2 * (half - (residue.conj() * dmean).real)
