"""What follows a norm: a residual that is added, and an activation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def as_activation(name: str | None) -> str | None:
    """`name`, if it is one of an activation; raises ValueError otherwise."""
    if name is None or name in ACTIVATIONS:
        return name
    raise ValueError(
        f"activation={name!r} is none of {sorted(ACTIVATIONS)}: use one of these, or "
        "leave it out and call your own on the result"
    )


def pack(flags: Array) -> Array:
    """Booleans as one bit each, eight along the last axis in a byte, where it divides
    into eights; else as they are."""
    if flags.shape[-1:] == () or flags.shape[-1] % 8:
        return flags
    eights = flags.reshape(*flags.shape[:-1], -1, 8).astype(jnp.uint8)
    return jnp.sum(eights * (1 << np.arange(8, dtype=np.uint8)), -1, dtype=jnp.uint8)


def unpack(bits: Array) -> Array:
    """The booleans that `pack` has packed."""
    if bits.dtype == jnp.bool_:
        return bits
    flags = bits[..., None] >> np.arange(8, dtype=np.uint8) & 1
    return flags.astype(bool).reshape(*bits.shape[:-1], -1)
