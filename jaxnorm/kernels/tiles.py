"""Sizes of tiles and grids. None has been timed: they are what fits in registers."""

MULTIPROCESSORS = 132  # of an H100; on another GPU the last wave is not full
ELEMENTS_PER_WARP = 512  # 16 for each thread
FORWARD_ELEMENTS = 4096
BACKWARD_ELEMENTS = 4096
LEAST_ROWS = 31  # per program, so that partial sums cost at most 8/31 of a pass


def programs(batch: int, rows: int, height: int) -> int:
    """How many programs share the rows of each batch in a backward pass.

    Enough for two on each multiprocessor, but no more than leave each of them
    `LEAST_ROWS`, and at least one.
    """
    wanted = -(-2 * MULTIPROCESSORS // batch)
    return max(1, min(wanted, rows // max(LEAST_ROWS, height)))
