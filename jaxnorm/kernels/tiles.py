"""Sizes of tiles and grids. None has been timed: they are what fits in registers."""

import math

import jax
from jax import Array
from jax.typing import DTypeLike

MULTIPROCESSORS = 132  # of an H100; on another GPU the last wave is not full
ELEMENTS_PER_WARP = 512  # 16 for each thread
FORWARD_ELEMENTS = 4096
BACKWARD_ELEMENTS = 4096
LEAST_ROWS = 31  # per program, so that partial sums cost at most 8/31 of a pass
LANES = 128  # as wide as a tile of columns gets
COLUMN_ELEMENTS = 4096  # of such a tile: 32 for each thread
MOSAIC_TILE_ROWS = 8
LEAST_SLAB = 128  # rows, so that partial sums cost at most 1/16 of a pass


def programs(batch: int, rows: int, height: int, per_multiprocessor: int) -> int:
    """How many programs share the rows of each batch in a backward pass.

    Enough to fill all multiprocessors at once, but no more than leave each of them
    `LEAST_ROWS`, and at least one.
    """
    wanted = -(-per_multiprocessor * MULTIPROCESSORS // batch)
    return max(1, min(wanted, rows // max(LEAST_ROWS, height)))


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


def result(shape: tuple[int, ...], dtype: DTypeLike, like: Array):
    """The type of a result that varies over the same devices as `like`."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
