"""Which dtypes things are computed in."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The least dtype that holds all of `dtypes`, also in JAX's strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that statistics of an array of `dtype` are taken in."""
    return promote(dtype, jnp.float32)


def as_floating(x: ArrayLike) -> Array:
    """`x` as an array of real or complex floating point; integers become float32."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_:
        return x.astype(jnp.float32)
    raise TypeError(f"a norm takes arrays of numbers, got dtype {x.dtype}")


def widened(x: Array, dtype: DTypeLike) -> Array:
    """`x`, cast only where `dtype` is wider than the statistics would be anyway."""
    wide = promote(x.dtype, dtype)
    return x if at_least_float32(wide) == at_least_float32(x.dtype) else x.astype(wide)
