"""How is data read of which float32 cannot hold all digits?"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxnorm._arguments import array_or_none, dtype_or_none
from jaxnorm._dtypes import as_floating


class Data(NamedTuple):
    """An array, or the sum of two where float32 has too few digits for one."""

    high: Array
    low: Array | None = None


def as_real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """`dtype`; raises TypeError unless it is one of real floating point in use."""
    known = dtype_or_none(dtype)
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise TypeError(
            f"dtype must be one of real floating point, such as float32, got {dtype!r}"
        )
    if known == jnp.float64 and _longest() < known.itemsize:
        raise TypeError(
            f"dtype={known} needs jax_enable_x64, without which JAX has no numbers of "
            "64 bits: set it, or pass float32"
        )
    return known


def as_data(x: Any) -> Data:
    """`x` as an array of real floating point numbers, or as the sum of two."""
    if isinstance(x, Data):
        return x
    if isinstance(x, Iterator):
        raise TypeError(
            f"the data must be one array, got an iterator, {type(x).__name__}: start "
            "from Standardizer.init(num_features) and call update with each batch"
        )
    x = _as_array(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"Standardizer takes real data, got {x.dtype}: make the real and imaginary "
            "parts features of their own, jnp.stack([x.real, x.imag], -1)"
        )
    if isinstance(x, np.ndarray) and x.itemsize > _longest():
        return _halves_of_floats(x.astype(np.float64))
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.itemsize < 4:
        return Data(as_floating(x))
    return _halves_of_integers(x) if x.itemsize == 4 else Data(x.astype(jnp.float64))


def _as_array(x: Any) -> Array | np.ndarray:
    """`x` as an array of numbers, of NumPy if none of it is one of JAX."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            "the data must be one array of real numbers, got a masked array of NumPy: "
            "pass x.data, and mask=~np.ma.getmaskarray(x)"
        )
    array = array_or_none(x)
    if array is None or not (
        array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.number)
    ):
        kind = "" if array is None else f", which has dtype {array.dtype}"
        raise TypeError(
            f"the data must be one array of real numbers, got {type(x).__name__}{kind}"
        )
    return array


def _longest() -> int:
    """The number of bytes of the widest numbers that JAX keeps."""
    return jax.dtypes.canonicalize_dtype(np.float64).itemsize


def _halves_of_floats(x: np.ndarray) -> Data:
    """Numbers in float64 as their rounding to float32, and what that cut off."""
    with np.errstate(over="ignore", invalid="ignore"):
        high = x.astype(np.float32)
        low = np.where(np.isfinite(high), x - high, 0).astype(np.float32)
    return Data(jnp.asarray(high), jnp.asarray(low))


def _halves_of_integers(x: Array) -> Data:
    """Integers of 32 bits, as `_halves_of_floats`, of two exact halves of the bits."""
    high = 2.0**16 * (x >> 16).astype(jnp.float32)
    low = (x & 0xFFFF).astype(jnp.float32)
    both = high + low
    return Data(both, low - (both - high))
