"""The row pattern: the gradient of rows that are normalized by their own moments.

Layer norm and RMS norm in training. `backward` reads x and dy once, and the gradient
of a skip connection, and writes dx once; the moments it takes again, so that the
forward pass keeps nothing but x. It has not been timed on a GPU.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxnorm._kernels import spread, support


@functools.partial(
    jax.jit,
    static_argnames=(
        "center",
        "with_scale",
        "with_bias",
        "backend",
        "interpret",
        "one_device",
    ),
)
def backward(
    x: Array,
    dy: Array,
    skip: Array | None,
    scale: Array | None,
    epsilon: Array,
    *,
    center: bool,
    with_scale: bool,
    with_bias: bool,
    backend: str,
    interpret: Any = False,
    one_device: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """The cotangents of x, scale and bias for `dy`, that of `x_hat * scale + bias`:

        x_hat = (x - mean) * rstd
        d = dy * scale
        dx = rstd * (d - mean(d) - x_hat * mean(d * x_hat)) + skip
        dscale, dbias = sum(dy * x_hat), sum(dy)

    with `rstd = rsqrt(var + epsilon)`, means over the features and sums over the rows,
    all in float32, where `skip` is another cotangent of x, or None. Without `center`,
    the means of x and d are taken to be 0.

    `x`, `dy` and `skip` are (batch, rows, features), `scale` is (batch, features), or
    (1, features) for all of the batch, or None; `epsilon` is a scalar. `dx` has the
    dtype of `x`; `dscale` and `dbias` are (batch, features) in float32, or None unless
    `with_scale` and `with_bias`. `backend` is "triton" or "mosaic";
    `interpret` runs the kernel without a GPU, as Pallas means it. Unless `one_device`,
    each device of a mesh takes its part of a sharded `x`.

    Raises ValueError where `support.why_unfit` has one.
    """
    shape = x.shape[0] * x.shape[1], x.shape[2]
    support.require("rows", backend, shape, x.dtype, dy.dtype)
    epsilon = jnp.broadcast_to(epsilon, (1,)).astype(jnp.float32)
    named = {"x": x, "dy": dy, "skip": skip, "scale": scale, "epsilon": epsilon}
    given = {k: v for k, v in named.items() if v is not None}
    wanted = {"scale": with_scale, "bias": with_bias}
    wanted = tuple(k for k, v in wanted.items() if v)

    def kernel(*arrays: Array) -> tuple[Array, ...]:
        found = dict.fromkeys(named) | dict(zip(given, arrays, strict=True))
        settings = {"center": center, "wanted": wanted, "interpret": interpret}
        dx, parts = _module(backend).backward(**found, **settings)
        sums = jnp.sum(parts, axis=1) if wanted else parts
        return dx, *(sums[:, k] for k in range(len(wanted)))

    dx, *sums = spread.call(
        kernel,
        spread.Signature(
            tuple(_LETTERS[k] for k in given), ("brd", *["bd"] * len(wanted)), whole="d"
        ),
        list(given.values()),
        one_device=one_device or spread.needs_one_device(backend, interpret),
    )
    found = dict(zip(wanted, sums, strict=True))
    return dx, found.get("scale"), found.get("bias")


_LETTERS = {"x": "brd", "dy": "brd", "skip": "brd", "scale": "Bd", "epsilon": "B"}


def _module(backend: str) -> Any:
    """The kernels of a backend, imported where they are first needed."""
    return importlib.import_module(f"jaxnorm._kernels.rows_{backend}")
