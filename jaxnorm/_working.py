"""Arrays to and from the shape that they are reduced in, without masked elements."""

from collections.abc import Callable
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
    given = _real("mask", mask, "boolean, or 0 and 1")
    other = _wrong(given, lambda v: (v != 0) & (v != 1))
    if other.size:
        raise ValueError(
            f"mask must be boolean, or 0 and 1, got {other[0]} in one of dtype "
            f"{given.dtype}: weights are no mask; `mask > 0` is one of what has any"
        )
    _check_broadcasts("mask", given, shape, "mask")
    return aligned(jnp.asarray(given.astype(bool)), shape)


def as_weights(
    weights: ArrayLike | None, mask: ArrayLike | None, shape: tuple[int, ...]
) -> Array | None:
    """`weights` in at least float32, of the rank of `shape`, and 0 where `mask` is
    false; raises unless they broadcast to `shape` and are finite and not negative.

    What is traced cannot be checked: negative weights become NaN there.
    """
    if weights is None:
        return None
    given = _real("weights", weights, "real numbers")
    other = _wrong(given, lambda v: ~((v >= 0) & (v < np.inf)))
    if other.size:
        raise ValueError(f"weights must be finite and not negative, got {other[0]}")
    _check_broadcasts("weights", given, shape, "weigh")
    array = aligned(jnp.asarray(given), shape)
    array = array.astype(at_least_float32(array.dtype))
    array = jnp.where(array < 0, jnp.asarray(jnp.nan, array.dtype), array)
    mask = as_mask(mask, shape)
    return array if mask is None else jnp.where(mask, array, jnp.zeros_like(array))


def _real(name: str, value: Any, rule: str) -> Array | np.ndarray:
    """`value` as an array; raises unless it is one of real numbers or booleans."""
    array = array_or_none(value)
    if array is None or not (
        array.dtype == jnp.bool_
        or jnp.issubdtype(array.dtype, jnp.integer)
        or jnp.issubdtype(array.dtype, jnp.floating)
    ):
        got = type(value).__name__ if array is None else f"dtype {array.dtype}"
        raise TypeError(f"{name} must be {rule}, got {got}")
    return array


def _wrong(array: Array | np.ndarray, rule: Callable[[Any], Any]) -> np.ndarray:
    """The elements that are wrong by `rule`, as far as they are known."""
    known = array.dtype != jnp.bool_ and not isinstance(array, Tracer)
    if not known or not getattr(array, "is_fully_addressable", True):
        return np.empty(0)
    values = np.asarray(array)
    return values[rule(values)]


def _check_broadcasts(name: str, given: Any, shape: tuple[int, ...], verb: str) -> None:
    """Raises ValueError unless `given` broadcasts to `shape`."""
    pairs = zip(reversed(given.shape), reversed(shape), strict=False)
    if given.ndim > len(shape) or any(m not in (1, n) for m, n in pairs):
        raise ValueError(
            f"{name} of shape {given.shape} does not broadcast to the input of shape "
            f"{shape}: each of its axes must be 1 or that of the input, from the last "
            f"on; add axes of 1 at its end to {verb} whole examples"
        )
