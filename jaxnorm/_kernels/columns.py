"""The column pattern: sums over the middle axis of (batch, space, features).

Group and instance norm, with an activation or without. Only the sums are kernels; what
is done with them is elementwise, and XLA fuses it with its neighbours. `moments` reads
x once, `gradient_sums` reads x and dy once. Neither has been timed on a GPU.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._kernels import spread, support, tiles

ACTIVATIONS = (None, "relu", "silu")


@functools.partial(jax.jit, static_argnames=("backend", "interpret"))
def moments(x: Array, *, backend: str, interpret: Any = False) -> tuple[Array, Array]:
    """Mean and biased variance over space, (batch, features) in float32. The same as

        x = x.astype(jnp.float32)
        mean, var = x.mean(axis=1), x.var(axis=1)

    and as exact where the mean is far from 0: sums are about an element of each slab
    of the data, and slabs are pooled by Chan's formula. `x` is (batch, space,
    features); `backend` is "triton" or "mosaic"; `interpret` runs the kernel without a
    GPU, as Pallas means it.

    Raises ValueError where `support.why_unfit` has one.
    """
    support.require("columns", backend, x.shape, x.dtype)

    def kernel(x):
        counts, *parts = _module(backend).moments(_fold(x), interpret=interpret)
        return _pool(counts, *(_unfold(v, x.shape[2]) for v in parts))

    mean, var = spread.call(
        kernel,
        spread.Signature(("bsc",), ("bc", "bc")),
        [x],
        merge=_merge,
        fits=lambda shape: not support.why_unfit("columns", backend, shape),
        one_device=spread.needs_one_device(backend, interpret),
    )
    return mean, var


@functools.partial(jax.jit, static_argnames=("activation", "backend", "interpret"))
def gradient_sums(
    x: Array,
    dy: Array,
    mean: Array,
    slope: Array | None = None,
    shift: Array | None = None,
    *,
    activation: str | None,
    backend: str,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """The two sums over space that the gradient of a norm needs. The same as

        d = jax.vjp(activation, x * slope + shift)[1](dy)
        d.sum(axis=1), (d * (x - mean)).sum(axis=1)

    in float32, where the activation is applied to what the norm returns, `x * slope +
    shift`, which is computed again instead of kept.

    `x` and `dy` are (batch, space, features), all others and the results (batch,
    features) in float32. `activation` is None, "relu" or "silu"; without one, `slope`
    and `shift` are not needed. Of a sharded `x` the sums are over all devices; in
    shard_map, where each device calls this, they are its own.

    Raises ValueError for another activation, and where `support.why_unfit` has one.
    """
    support.require("columns", backend, x.shape, x.dtype, dy.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {list(ACTIVATIONS)}")
    vectors = [mean, slope, shift] if activation else [mean]
    if any(v is None for v in vectors):
        raise ValueError(f"activation={activation!r} needs both slope and shift")

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

    operands = ("bsc", "bsc", *["bc"] * len(vectors))
    sum_d, sum_dx = spread.call(
        kernel,
        spread.Signature(operands, ("bc", "bc")),
        [x, dy, *(v for v in vectors if v is not None)],
        fits=lambda shape: not support.why_unfit("columns", backend, shape),
        one_device=spread.needs_one_device(backend, interpret),
    )
    return sum_d, sum_dx


def activation_cotangent(activation: str | None, z: Any, d: Array) -> Array:
    """The cotangent of `z` for that of `activation(z)`; plain enough for any kernel."""
    if activation == "relu":
        return jnp.where(z > 0, d, jnp.zeros_like(d))
    if activation == "silu":
        gate = 1 / (1 + jnp.exp(-z))
        return d * gate * (1 + z * (1 - gate))
    return d


def _fold(x: Array) -> Array:
    """`x` with few features as one with more of them and less space."""
    batch, space, features = x.shape
    folds = tiles.fold(space, features)
    return x.reshape(batch, space // folds, folds * features)


def _unfold(parts: Array, features: int) -> Array:
    """Parts of (batch, slabs, features) of what was folded, as more slabs of it."""
    return parts.reshape(parts.shape[0], -1, features)


def _pool(counts: Array, pivot: Array, offset: Array, m2: Array) -> tuple[Array, Array]:
    """Mean and variance of the union of slabs (axis 1), of which `counts` are sizes,
    `pivot + offset` means and `m2` sums of squares about these (Chan et al.)."""
    folds = pivot.shape[1] // counts.shape[0]
    sizes = jnp.repeat(counts, folds)[None, :, None]
    total = jnp.sum(sizes)
    offset = pivot - pivot[:, :1] + offset
    pooled = jnp.sum(offset * (sizes / total), axis=1, keepdims=True)
    m2 = jnp.sum(m2 + sizes * jnp.square(offset - pooled), axis=1)
    return (pivot[:, :1] + pooled)[:, 0], m2 / total


def _merge(
    moments: spread.Results, axes: Sequence[spread.MeshAxes]
) -> tuple[Array, Array]:
    """Moments of equal parts of space, one on each device along `axes`."""
    mean, var = moments
    if not axes[0]:
        return mean, var
    pooled = lax.pmean(mean, axes[0])
    return pooled, lax.pmean(var + jnp.square(mean - pooled), axes[0])


def _module(backend: str) -> Any:
    """The kernels of a backend, imported where they are first needed."""
    return importlib.import_module(f"jaxnorm._kernels.columns_{backend}")
