"""Sizes of tiles and grids. None has been timed: they are what fits in registers."""

import jax
from jax import Array
from jax.typing import DTypeLike

MULTIPROCESSORS = 132  # of an H100; on another GPU the last wave is not full
ELEMENTS_PER_WARP = 512  # 16 for each thread
FORWARD_ELEMENTS = 4096
BACKWARD_ELEMENTS = 4096
LEAST_ROWS = 31  # per program, so that partial sums cost at most 8/31 of a pass


def programs(batch: int, rows: int, height: int, per_multiprocessor: int = 2) -> int:
    """How many programs share the rows of each batch in a backward pass.

    Enough to fill all multiprocessors at once, but no more than leave each of them
    `LEAST_ROWS`, and at least one.
    """
    wanted = -(-per_multiprocessor * MULTIPROCESSORS // batch)
    return max(1, min(wanted, rows // max(LEAST_ROWS, height)))


def result(shape: tuple[int, ...], dtype: DTypeLike, like: Array):
    """The type of a result that varies over the same devices as `like`."""
    varying = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
