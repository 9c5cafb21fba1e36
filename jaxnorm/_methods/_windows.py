"""Sums over the neighbourhood of each element."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxnorm._arguments import as_integers


def as_widths(width: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """`count` positive widths; raises TypeError or ValueError for anything else."""
    given = as_integers(name, width)
    given = (given,) * count if isinstance(given, int) else given
    if len(given) != count or min(given, default=1) < 1:
        raise ValueError(
            f"{name}={width} must be positive, one number or {count}, one for each axis"
        )
    return given


def total(x: Array, axes: Sequence[int], widths: Sequence[int]) -> Array:
    """The sum of the `width` elements around each along each of `axes`.

    The window of element i is [i - width // 2, i + (width - 1) // 2]; what lies outside
    the array is 0.
    """
    size, pads = [1] * x.ndim, [(0, 0)] * x.ndim
    for axis, width in zip(axes, widths, strict=True):
        size[axis], pads[axis] = width, (width // 2, (width - 1) // 2)
    zero = np.zeros((), x.dtype)
    ones = (1,) * x.ndim
    return jnp.asarray(lax.reduce_window(x, zero, lax.add, size, ones, pads))
