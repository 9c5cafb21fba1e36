"""Segments of an array: examples that an integer each says belong together."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal
from jax.typing import ArrayLike

from jaxnorm._arguments import as_array
from jaxnorm._axes import Axes, Shape
from jaxnorm._moments import Moments, moved, pool_counted
from jaxnorm._reduce import moments
from jaxnorm._working import as_mask, to_working


def as_ids(name: str, value: ArrayLike, shape: Shape, count: Any) -> Array:
    """The segment of each example of an array of `shape`, from 0 to `count` - 1; and
    `count` for those of none of these."""
    ids = as_array(name, value)
    if ids.shape != shape[:1] or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold an integer for each of the {shape[:1]} examples of an "
            f"input of shape {shape}, got {ids.dtype} of shape {ids.shape}"
        )
    # Compared as they are given: in 32 bits a large one would be another segment's.
    given = ids if isinstance(value, Array) else np.asarray(value)
    known = (given >= 0) & (given <= np.iinfo(np.int32).max)
    ids, none = ids.astype(jnp.int32), jnp.asarray(count, jnp.int32)
    return jnp.where(known & (ids < none), ids, none)


def segment_moments(
    x: Array, axes: Axes, ids: Array, count: int, mask: ArrayLike | None
) -> Moments:
    """The moments of each segment, along a leading axis of `count`.

    `axes` are those of one example, and do not reduce the leading one. As exact as
    `pool` of the moments of the examples, whatever the number of segments; an empty one
    has the size 0.
    """
    return _pooled(count, ids, _moments_of_each(x, axes, as_mask(mask, x.shape)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pooled(count: int, ids: Array, own: Moments) -> Moments:
    total = functools.partial(_total, ids, count)
    each = functools.partial(of_segment, ids)
    # Relative to a value of the segment: these sums have no tree, and of many numbers
    # far from 0 they would lose what the numbers vary by.
    pivot = _member(ids, count, own)
    shifted = own._replace(mean=own.mean - each(pivot))
    return moved(pool_counted(shifted, total(own.size), total, each), pivot)


# With  offset = mean - pooled mean,  as for devices:
#
#   dmean_pooled = sum(size dmean) / size_pooled
#   dvar_pooled  = sum(size (dvar + 2 offset dmean)) / size_pooled


@_pooled.defjvp
def _pooled_jvp(
    count: int, primals: tuple[Array, Moments], tangents: tuple[Any, Moments]
) -> tuple[Moments, Moments]:
    (ids, own), (_, change) = primals, tangents
    m = _pooled(count, ids, own)
    offset = (own.mean - of_segment(ids, m.mean)) - of_segment(ids, m.residue)
    dvar = change.var + 2 * (offset.conj() * change.mean).real
    whole = jnp.maximum(m.size, 1)
    dmean, dvar = (
        _total(ids, count, own.size.astype(v.dtype) * v) / whole.astype(v.dtype)
        for v in (change.mean, dvar)
    )
    return m, Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))


def _moments_of_each(x: Array, axes: Axes, mask: Array | None) -> Moments:
    """The moments of each example, and their sizes as an array."""
    if axes.reduce:
        own = moments(x, axes, mask=mask)
        size = jnp.broadcast_to(jnp.asarray(own.size, jnp.int32), own.var.shape)
        return own._replace(size=size)
    mean = to_working(x, mask, axes)
    given = jnp.ones((1,) * x.ndim, bool) if mask is None else mask
    size = jnp.broadcast_to(given, (x.shape[0], *given.shape[1:])).astype(jnp.int32)
    return Moments(mean, jnp.zeros_like(mean.real), size)


def _member(ids: Array, count: int, m: Moments) -> Array:
    """A mean of each segment: that of its first example with valid elements."""
    if m.mean.shape[0] == 0:  # from which nothing can be gathered
        return jnp.zeros((count, *m.mean.shape[1:]), m.mean.dtype)
    valid = (m.size > 0).any(tuple(range(1, m.size.ndim)))
    place = jnp.arange(ids.shape[0], dtype=jnp.int32)
    none = jnp.full(count, ids.shape[0], jnp.int32)
    first = none.at[jnp.where(valid, ids, count)].min(place, mode="drop")
    return m.mean.at[first].get(mode="fill", fill_value=0)


def _total(ids: Array, count: int, v: Array) -> Array:
    """The sum of `v` over the examples of each segment."""
    return jnp.zeros((count, *v.shape[1:]), v.dtype).at[ids].add(v, mode="drop")


def of_segment(ids: Array, table: Array) -> Array:
    """The row of each example's segment; of those of none, that of another one."""
    return table.at[ids].get(mode="clip")


def moments_of_segment(ids: Array, m: Moments) -> Moments:
    """The moments of each example's segment. What changes the mean counts as a change
    of its rounded part alone, so that one array has the gradient and not two."""
    m = m._replace(residue=lax.stop_gradient(jnp.asarray(m.residue)))
    return Moments(*(of_segment(ids, v) for v in m.broadcast_to(m.var.shape)))


def along(ids: Array, rank: int) -> Array:
    """`ids`, to broadcast against an array of `rank`."""
    return ids.reshape(-1, *[1] * (rank - 1))
