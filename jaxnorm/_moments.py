"""Step 2: mean, variance and number of the elements that share statistics."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import check_function, check_instance
from jaxnorm._axes import Axes
from jaxnorm._exact import (
    abs_square,
    drop_last_bit,
    join_size,
    not_zero,
    rstd,
    split_size,
    two_sum,
)
from jaxnorm._sharding import spec_of


class Moments(NamedTuple):
    """Mean, biased variance and number of elements of each set that shares them.

    All broadcast against the array in its working shape. `mean` and `var` are at least
    float32. `size` is exact: a Python integer where nothing is masked, so that it is
    known while tracing, and an int32 array where the mask decides, or where shapes are
    open, as in `jax.export`. Of weighted elements it is the sum of the weights, in
    floating point. `residue` is what rounding has cut off the mean: without
    it, moments of small sets far from 0 could not be pooled exactly, nor the sets be
    standardized.
    """

    mean: Array
    var: Array
    size: Any
    residue: Any = 0.0

    def rstd(self, epsilon: ArrayLike) -> Array:
        """`1 / sqrt(var + epsilon)`, and NaN where the variance is infinite."""
        return rstd(self.var, jnp.asarray(epsilon, self.var.dtype))

    def broadcast_to(self, shape: tuple[int, ...]) -> "Moments":
        """Each of the four as an array of `shape`, to be split alike."""
        return Moments(*(jnp.broadcast_to(v, shape) for v in self))


def pool(m: Moments, total: Callable[[Array], Array]) -> Moments:
    """Moments of the union of disjoint sets, each with its own size.

    `total` sums an array over the sets, and is called twice, on arrays that have a last
    axis more than `m.mean`: `lambda v: v.sum(0, keepdims=True)` for sets along the
    leading axis. Sets of size 0 count for nothing. The variance does not suffer from
    means far from 0 (Chan, Golub and LeVeque, 1983).
    """
    check_instance("m", m, Moments, "jaxnorm.moments")
    check_function("total", total)
    size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)

    def totals(parts: Sequence[Array]) -> list[Array]:
        return _unstack(total(_stack(parts, m.mean.dtype)))

    sums = (*_weighed_by(size, m.mean, m.var), *split_size(size))
    mean, var, high, low = totals(sums)
    whole = join_size(high, low, size.dtype)
    rough = [drop_last_bit(_over(v, whole)) for v in (mean, var.real)]
    return _about(rough, rough, m._replace(size=size), whole, totals)


def pool_counted(
    m: Moments,
    whole: Array,
    total: Callable[[Array], Array],
    each: Callable[[Array], Array],
) -> Moments:
    """As `pool`, where `whole` is the size of each union, and `each` gives every set
    what belongs to its union. `total` is called on arrays such as `m.mean`."""
    (weighed,) = _weighed_by(jnp.asarray(m.size), m.mean)
    rough = drop_last_bit(_over(total(weighed), whole))
    totals = functools.partial(map, total)
    return _about((rough, 0.0), (each(rough), 0.0), m, whole, totals)


def _about(
    rough: Sequence[Any],
    seen: Sequence[Any],
    m: Moments,
    whole: Array,
    totals: Callable[[Sequence[Array]], Iterable[Array]],
) -> Moments:
    """The moments of each union about rough ones, whose own rounding would add up when
    pooled repeatedly; `seen` are these for each set."""
    offset = (m.mean - seen[0]) + m.residue
    squares = (m.var - seen[1]) + abs_square(offset)
    sums = totals(_weighed_by(jnp.asarray(m.size), offset, squares))
    shift, spread = (_over(v, whole) for v in sums)
    var = rough[1] + (spread.real - abs_square(shift))
    mean, residue = two_sum(rough[0], shift)  # the shift is what rounding left of it
    return Moments(mean, jnp.maximum(var, 0), whole, residue)


def _weighed_by(size: Array, *values: Array) -> list[Array]:
    """Each of `values`, times the size of its set."""
    return [size.astype(v.dtype) * v for v in values]


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


def _over(x: Array, size: Array) -> Array:
    """`x` for each of `size`; 0 if there are none."""
    return x / not_zero(size).astype(x.dtype)


def like_moments(x: Array, axes: Axes) -> Any:
    """The shardings of moments of `x` that leave each where its elements are."""
    names = (*spec_of(x), *[None] * x.ndim)
    spec = (
        names[o] if a not in axes.reduce and n == axes.shape[o] else None
        for a, (n, o) in enumerate(zip(axes.working_shape, axes.origin, strict=True))
    )
    return Moments._make([PartitionSpec(*spec)] * len(Moments._fields))
