"""Arrays to and from the shape that they are reduced in, without masked elements."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import array_or_none, check_instance
from jaxnorm._axes import Axes
from jaxnorm._dtypes import at_least_float32


def to_working(x: Array, mask: Array | None, axes: Axes) -> Array:
    """`x` in its working shape, in at least float32, with masked elements read as 0."""
    if mask is not None:
        # Before any arithmetic: a NaN masked later would still poison gradients.
        x = jnp.where(mask, x, jnp.zeros((), x.dtype))
    return x.astype(at_least_float32(x.dtype)).reshape(axes.working_shape)


def from_working(
    y: Array, mask: Array | None, axes: Axes, dtype: DTypeLike | None
) -> Array:
    """The array's own shape again, in `dtype`, and 0 where `mask` is false."""
    y = y.reshape(axes.shape).astype(dtype)
    return y if mask is None else jnp.where(mask, y, jnp.zeros((), dtype))


def mask_to_working(mask: Array, axes: Axes) -> Array:
    """`mask` for an array in its working shape."""
    return jnp.broadcast_to(mask, axes.shape).reshape(axes.working_shape)


def aligned(mask: Array, shape: tuple[int, ...]) -> Array:
    """`mask` with leading 1s, so that it has the rank of `shape`."""
    return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)


def check_axes(axes: Axes, shape: tuple[int, ...]) -> None:
    """Raises unless `axes` are those of an array of `shape`."""
    check_instance("axes", axes, Axes, "jaxnorm.Axes.keep")
    if axes.shape != shape:
        raise ValueError(f"axes are for an array of shape {axes.shape}, got {shape}")


def as_mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`mask` as booleans, of the rank of `shape`; raises unless it broadcasts to it."""
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
    return aligned(jnp.asarray(given.astype(bool)), shape)


def _of_zeros_and_ones(mask: Any) -> Array | np.ndarray:
    """`mask` as an array; raises if it is not one, or is known to hold weights."""
    array = array_or_none(mask)
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
