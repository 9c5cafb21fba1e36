"""The dtypes of statistics, computations and results."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_array, as_dtype


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The least dtype that holds all of `dtypes`, also in JAX's strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """The dtype that statistics of an array of `dtype` are taken in."""
    return promote(dtype, jnp.float32)


def as_floating(x: ArrayLike, name: str = "x") -> Array:
    """`x` as an array of real or complex floating point; integers become float32."""
    x = as_array(name, x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def out_dtype(x: Array, dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype of what is made of `x`: `dtype`, if given, or that of `x`."""
    if dtype is None:
        return x.dtype
    known = as_dtype("dtype", dtype)
    if jnp.iscomplexobj(x) and not jnp.issubdtype(known, jnp.complexfloating):
        raise TypeError(
            f"dtype is {known}, but the input is {x.dtype}: pass a complex dtype, or "
            "the real part of the input"
        )
    return known


def widened(x: Array, dtype: DTypeLike) -> Array:
    """`x`, cast only where `dtype` is wider than the statistics would be anyway."""
    wide = promote(x.dtype, dtype)
    return x if at_least_float32(wide) == at_least_float32(x.dtype) else x.astype(wide)


def one_rounding(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of formulas that use `x` more than once: it is widened before that.

    So the parts of its cotangent are added up in at least float32, and rounded once to
    the dtype of `x`. For the backward pass only `x`, in its own dtype, is kept: the
    formula is computed again, but for its collectives.
    """

    @functools.wraps(formula)
    def rounded(self: Any, x: Array, *args: Any, dtype: Any, **options: Any) -> Any:
        wide = at_least_float32(x.dtype)
        dtype = x.dtype if dtype is None else dtype

        def widened_first(x: Array) -> Any:
            return formula(self, x.astype(wide), *args, dtype=dtype, **options)

        if x.dtype == wide:
            return widened_first(x)
        return recomputed(widened_first)(x)

    return rounded


def recomputed(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of formulas that the backward pass computes again, but for their
    collectives, so that it keeps their arguments alone."""
    return jax.checkpoint(formula, policy=_is_collective, prevent_cse=False)


def _is_collective(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("psum")
