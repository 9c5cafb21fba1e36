"""The column pattern: sums over the middle axis of (batch, space, features).

Group and instance norm with an activation. Only the sums of the gradient are a kernel,
which reads x and dy once; what is done with them is elementwise, and XLA fuses it with
its neighbours. It has not been timed on a GPU.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxnorm._kernels import spread, support, tiles

ACTIVATIONS = ("relu", "silu")


@functools.partial(
    jax.jit, static_argnames=("activation", "backend", "interpret", "one_device")
)
def gradient_sums(
    x: Array,
    dy: Array,
    mean: Array,
    slope: Array,
    shift: Array,
    *,
    activation: str,
    backend: str,
    interpret: Any = False,
    one_device: bool = False,
) -> tuple[Array, Array]:
    """The two sums over space that the gradient of an activated norm needs:

        d = jax.vjp(activation, (x - mean) * slope + shift)[1](dy)
        d.sum(axis=1), (d * (x - mean)).sum(axis=1)

    in float32, where what the activation is applied to is computed again.

    `x` and `dy` are (batch, space, features), all others and the results (batch,
    features) in float32. `activation` is "relu" or "silu". Unless `one_device`, each
    device of a mesh takes its part of a sharded `x`, and the sums are over all of them;
    in shard_map, where each device calls this, they are its own.

    Raises ValueError for another activation, and where `support.why_unfit` has one.
    """
    support.require("columns", backend, x.shape, x.dtype, dy.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {list(ACTIVATIONS)}")

    def kernel(x, dy, *vectors):
        folds = tiles.fold(*x.shape[1:])
        sums = _module(backend).gradient_sums(
            _fold(x),
            _fold(dy),
            *(jnp.tile(v, (1, folds)) for v in vectors),
            activation=activation,
            interpret=interpret,
        )
        return tuple(jnp.sum(_unfold(v, x.shape[2]), axis=1) for v in sums)

    sum_d, sum_dx = spread.call(
        kernel,
        spread.Signature(("bsc", "bsc", "bc", "bc", "bc"), ("bc", "bc")),
        [x, dy, mean, slope, shift],
        fits=lambda shape: not support.why_unfit("columns", backend, shape),
        one_device=one_device or spread.needs_one_device(backend, interpret),
    )
    return sum_d, sum_dx


def cotangent(
    activation: str, x: Array, dy: Array, mean: Array, slope: Array, shift: Array
) -> tuple[Array, Array]:
    """`x - mean`, and the cotangent of `(x - mean) * slope + shift`, in float32, where
    `mean` and its like are (batch, features)."""
    mean, slope, shift = (v[:, None] for v in (mean, slope, shift))
    offset = x.astype(jnp.float32) - mean
    z = offset * slope + shift
    return offset, activation_cotangent(activation, z, dy.astype(jnp.float32))


def activation_cotangent(activation: str, z: Any, d: Array) -> Array:
    """The cotangent of `z` for that of `activation(z)`; plain enough for any kernel."""
    if activation == "relu":
        return jnp.where(z > 0, d, jnp.zeros_like(d))
    gate = 1 / (1 + jnp.exp(-z))
    return d * gate * (1 + z * (1 - gate))


def _fold(x: Array) -> Array:
    """`x` with few features as one with more of them and less space."""
    batch, space, features = x.shape
    folds = tiles.fold(space, features)
    return x.reshape(batch, space // folds, folds * features)


def _unfold(parts: Array, features: int) -> Array:
    """Parts of (batch, slabs, features) of what was folded, as more slabs of it."""
    return parts.reshape(parts.shape[0], -1, features)


def _module(backend: str) -> Any:
    """The kernels of a backend, imported where they are first needed."""
    return importlib.import_module(f"jaxnorm._kernels.columns_{backend}")
