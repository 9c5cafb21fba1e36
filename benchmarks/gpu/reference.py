"""Norms by their definitions, in float64 where it is asked for: the same on any array.

Nothing here is the package's: gradients are JAX's of these few lines.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

EPSILON = 1e-6
ACTIVATIONS = {"none": lambda z: z, "relu": jax.nn.relu, "silu": jax.nn.silu}


def layer_norm(x: Array, scale: Any, bias: Any) -> Array:
    offset = x - x.mean(-1, keepdims=True)
    return _line(offset, (offset**2).mean(-1, keepdims=True), scale, bias)


def rms_norm(x: Array, scale: Any, bias: None = None) -> Array:
    return _line(x, (x**2).mean(-1, keepdims=True), scale, bias)


def group_norm(
    x: Array, scale: Any, bias: Any, num_groups: int, activation: str
) -> Array:
    """`x` is (batch, space, features)."""
    groups = x.reshape(*x.shape[:2], num_groups, -1)
    offset = groups - groups.mean((1, 3), keepdims=True)
    var = (offset**2).mean((1, 3), keepdims=True)
    z = (offset / jnp.sqrt(var + EPSILON)).reshape(x.shape)
    return ACTIVATIONS[activation](z * scale + bias)


def _line(offset: Array, var: Array, scale: Any, bias: Any) -> Array:
    y = offset / jnp.sqrt(var + EPSILON)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def gradients(f: Callable[..., Any], args: Any, cotangents: Any) -> Any:
    """`f(*args)`, and the gradients of all of `args`."""
    y, pull = jax.vjp(f, *args)
    return y, pull(cotangents)
