"""Sums along columns in parts, where a GPU would otherwise write what they are of."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._axes import Shape, is_known

BLOCKS = 264  # of threads, to fill a GPU: two for each multiprocessor of an H100
BUSY_BLOCKS = 2112  # where much is computed of what is summed: all that can be resident
BUSY_SHORTEST = 128  # elements of a part there
SUMS = 32  # that XLA:GPU gives to each of them
LONGEST = 4096  # elements: XLA parts longer sums itself
SHORTEST = 8  # elements of a part: those of one sum cost half a pass over bfloat16


def parts_of(shape: Shape, along: Sequence[int], busy: bool = False) -> tuple[int, int]:
    """Into how many parts to split sums of an array, and which axis of those summed.

    Where the sums are too few to fill a GPU, XLA first writes what is summed to memory,
    in float32, by a kernel that does. `busy` says that it may come from an activation,
    whose derivative XLA takes in the kernel of the sums if that has many blocks.
    """
    if not along or not is_known(*shape) or not math.prod(shape):
        return 1, 0
    length = math.prod(shape[a] for a in along)
    sums = math.prod(shape) // length
    least = -(-BLOCKS * SUMS // sums)
    if busy:
        many = min(-(-BUSY_BLOCKS * SUMS // sums), length // BUSY_SHORTEST)
        least = max(least, many)
    if length <= LONGEST:
        for a in reversed(along):
            for parts in range(least, min(length // SHORTEST, shape[a], 4 * least) + 1):
                if shape[a] % parts == 0:
                    return parts, a
    return parts_of(shape, along) if busy else (1, 0)


def sum_in_parts(x: Array, along: Sequence[int]) -> Array:
    """The sum of `x` along these axes, which are kept."""
    parts, at = parts_of(x.shape, along)
    if parts == 1:
        return x.sum(tuple(along), keepdims=True)
    x = x.reshape(*x.shape[:at], -1, parts, *x.shape[at + 1 :])
    x = x.sum(tuple(a + (a > at) for a in along), keepdims=True)
    return lax.optimization_barrier(x).sum(at + 1)  # or XLA would join the two sums


def spread(v: Array, shape: Shape, busy: bool = False) -> Array:
    """`v` for an array of `shape`, to which it broadcasts; the transpose of what it is
    broadcast by is `sum_in_parts`."""
    pairs = enumerate(zip(shape, v.shape, strict=True))
    along = [a for a, (n, m) in pairs if m == 1 and n != 1]
    parts, at = parts_of(shape, along, busy)
    if parts == 1:
        return v
    v = jnp.expand_dims(v, at)
    v = jnp.broadcast_to(v, (*v.shape[: at + 1], parts, *v.shape[at + 2 :]))
    v = lax.optimization_barrier(v)
    wide = *shape[:at], shape[at] // parts, parts, *shape[at + 1 :]
    return jnp.broadcast_to(v, wide).reshape(shape)
