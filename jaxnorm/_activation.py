"""The residual and the activation that may follow a norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import check_real, shown
from jaxnorm._dtypes import as_floating, promote

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def as_activation(name: str, activation: Any) -> str | None:
    """`activation`, if it is None or the name of one in `ACTIVATIONS`; else raises."""
    if activation is not None and activation not in list(ACTIVATIONS):
        raise ValueError(
            f"{name}={shown(activation)} is none of {sorted(ACTIVATIONS)}: name one of "
            "these, or leave it out and call your own on the result"
        )
    return activation


def check_activation(activation: str | None, residual: Array | None, x: Array) -> None:
    """Raises unless the activation and the residual can follow a norm of `x`."""
    as_activation("activation", activation)
    if activation is not None and jnp.iscomplexobj(x):
        raise TypeError(
            f"activation={activation!r} takes real numbers, got {x.dtype}: leave it out"
        )
    if residual is not None:
        check_residual(residual, x)


def check_residual(residual: Array, x: Array) -> None:
    """Raises unless `residual` can be added to an array such as `x`."""
    check_real("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual has shape {residual.shape}, but the input that it goes with has "
            f"shape {x.shape}: pass an array of that shape"
        )


def add_residual(x: Array, residual: ArrayLike) -> Array:
    """`x + residual`, which may be the number 0, in the wider of their dtypes."""
    number = isinstance(residual, int | float | np.number)
    if number and not isinstance(residual, bool) and residual == 0:
        return x
    residual = as_floating(residual, "residual")
    check_residual(residual, x)
    wide = promote(x.dtype, residual.dtype)
    return x.astype(wide) + residual.astype(wide)


def add_and_activate(
    y: Array, activation: str | None, residual: ArrayLike | None, mask: Array | None
) -> Array:
    """`activation(y + residual)` in the dtype of `y`, and 0 where `mask` is false."""
    residual = None if residual is None else as_floating(residual, "residual")
    check_activation(activation, residual, y)
    if residual is not None:
        # Before the sum: a NaN masked later would still poison gradients.
        y = y + without_masked(residual.astype(y.dtype), mask)
    if activation is None:
        return y
    # The sum is kept for the backward pass, and what else it needs computed again.
    y = jax.checkpoint(ACTIVATIONS[activation], prevent_cse=False)(y)
    return without_masked(y, mask)


def without_masked(v: Array, mask: Array | None) -> Array:
    """`v`, and 0 where `mask` is false."""
    return v if mask is None else jnp.where(mask, v, jnp.zeros((), v.dtype))


def pack(flags: Array) -> Array:
    """Booleans as one bit each, eight along the last axis in a byte.

    As they are where that axis does not divide into eights.
    """
    last = flags.ndim - 1
    if not flags.size or last < 0 or flags.shape[last] % 8:
        return flags
    return jnp.packbits(flags, axis=-1)


def unpack(bits: Array) -> Array:
    """The booleans of which `pack` made `bits`."""
    if bits.dtype == jnp.bool_:
        return bits
    return jnp.unpackbits(bits, axis=-1).astype(bool)
