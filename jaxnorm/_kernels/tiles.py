"""Sizes of tiles and grids. None has been timed: they are what fits in registers."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

SUMS = jnp.float32  # what kernels compute and add up in
MULTIPROCESSORS = 132  # of an H100; on another GPU the last wave is not full
ROW_ELEMENTS = 4096  # of a block of rows
ELEMENTS_PER_WARP = 512  # of these: 16 for each thread
LEAST_ROWS = 31  # per program: partial sums cost at most 8/31 of a pass over bfloat16
LEAST_STEPS = 8  # per program, where multiprocessors would be idle otherwise
LANES = 128  # as wide as a tile of columns gets
COLUMN_ELEMENTS = 4096  # of such a tile: 32 for each thread
MOSAIC_TILE_ROWS = 8
LEAST_SLAB = 128  # rows: partial sums cost at most 1/10 of a pass over bfloat16


def programs(batch: int, rows: int, height: int, per_multiprocessor: int) -> int:
    """How many programs share the rows of each batch in a backward pass, each of which
    takes `height` rows a step.

    Enough to fill all multiprocessors at once, where that leaves each of them
    `LEAST_ROWS`; or else one in each, where that leaves it `LEAST_STEPS`.
    """
    full, one = (-(-n * MULTIPROCESSORS // batch) for n in (per_multiprocessor, 1))
    by_rows = min(full, rows // max(LEAST_ROWS, height))
    return max(1, by_rows, min(one, rows // (LEAST_STEPS * height)))


def fold(space: int, features: int) -> int:
    """How many rows of columns to join, so that `LANES` divides a row where it can."""
    rows = LANES // math.gcd(features, LANES)
    return rows if space % rows == 0 else 1


def column_width(features: int) -> int:
    """A power of two: one that divides the features, or else one to mask."""
    width = min(LANES, features & -features)
    return width if width >= 16 else min(LANES, 1 << (features - 1).bit_length())


def slabs(batch: int, columns: int, space: int) -> int:
    """How many slabs each batch is cut into: four per multiprocessor at least, where
    that leaves `LEAST_SLAB` rows to each of them."""
    wanted = -(-4 * MULTIPROCESSORS // (batch * columns))
    return max(1, min(wanted, space // LEAST_SLAB))


def indices(count: int) -> Array:
    """0, 1, ... in 32 bits, also where JAX has 64."""
    return jnp.arange(count, dtype=jnp.int32)


def result(shape: tuple[int, ...], dtype: DTypeLike, like: Array):
    """The type of a result that varies over the same devices as `like`."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
