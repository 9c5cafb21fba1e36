"""Step 2: mean, variance and number of the elements that share statistics."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import check_function, check_instance
from jaxnorm._axes import Axes
from jaxnorm._exact import (
    abs_square,
    drop_last_bit,
    join_size,
    overflow_as_nan,
    split_size,
    two_sum,
)
from jaxnorm._sharding import spec_of


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
    offset = (far.mean - near.mean) + (far.residue - near.residue)
    offset = jnp.where(weight > 0, offset, jnp.zeros_like(offset))
    mean, residue = two_sum(near.mean, near.residue + weight * offset)
    spread = (1 - weight) * jnp.square(offset)
    return Moments(
        mean, near.var + weight * (far.var - near.var + spread), size, residue
    )


def moved(m: Moments, pivot: Array) -> Moments:
    """Those of `x`, where `m` are those of `x - pivot`."""
    mean, residue = two_sum(pivot, m.mean + m.residue)
    return m._replace(mean=mean, residue=residue)


def _stack(parts: Iterable[Array], dtype: DTypeLike) -> Array:
    return jnp.stack([v.astype(dtype) for v in parts], -1)


def _unstack(x: Array) -> list[Array]:
    return [x[..., i] for i in range(x.shape[-1])]


def _over(x: Array, size: Array) -> Array:
    return x / size.astype(x.dtype)


def like_moments(x: Array, axes: Axes) -> Any:
    """The shardings of moments of `x` that leave each where its elements are."""
    names = (*spec_of(x), *[None] * x.ndim)
    spec = (
        names[o] if a not in axes.reduce and n == axes.shape[o] else None
        for a, (n, o) in enumerate(zip(axes.working_shape, axes.origin, strict=True))
    )
    return Moments._make([PartitionSpec(*spec)] * len(Moments._fields))
