"""The row pattern: each row of (rows, features) is normalized by its own moments.

Layer norm and RMS norm in training. `forward` reads x once and writes y once;
`backward` reads x and dy once and writes dx once. Neither has been timed on a GPU.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._kernels import spread, support
from jaxnorm._kernels.tiles import SUMS


@functools.partial(jax.jit, static_argnames=("center", "dtype", "backend", "interpret"))
def forward(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    *,
    epsilon: ArrayLike,
    center: bool,
    dtype: DTypeLike,
    backend: str,
    interpret: Any = False,
) -> tuple[Array, Array | None, Array]:
    """Rows of mean 0 and variance 1, then scaled and shifted. The same as

        x_hat = (x - mean) * rstd
        y = (x_hat * scale + bias).astype(dtype)

    in float32, with `rstd = rsqrt(var + epsilon)` and the biased variance, taken as the
    mean square of `x - mean` once the mean is known. Without `center`, the mean is
    taken to be 0 and returned as None.

    `x` is (rows, features), `scale` and `bias` are (features,) or None, `epsilon` is a
    scalar; `mean` and `rstd` are (rows,) in float32. `backend` is "triton" or "mosaic";
    `interpret` runs the kernel without a GPU, as Pallas means it.

    Raises ValueError where `support.why_unfit` has one.
    """
    params = [v.dtype for v in (scale, bias) if v is not None]
    support.require("rows", backend, x.shape, x.dtype, dtype, *params)
    epsilon = jnp.asarray(epsilon, SUMS)
    given = _batch_of_one(x=x, scale=scale, bias=bias, epsilon=epsilon)

    def kernel(*arrays):
        named = dict.fromkeys(("scale", "bias")) | dict(zip(given, arrays, strict=True))
        y, mean, rstd = _module(backend).forward(
            **named, center=center, dtype=jnp.dtype(dtype), interpret=interpret
        )
        per_row = arrays[0].shape[:2]
        return y, *(v.reshape(per_row) for v in (mean, rstd) if v is not None)

    results = ("brd", "br", "br") if center else ("brd", "br")
    y, *stats = _spread(kernel, given, results, backend, interpret)
    mean, rstd = stats if center else (None, *stats)
    return y[0], mean if mean is None else mean[0], rstd[0]


@functools.partial(
    jax.jit, static_argnames=("center", "with_bias", "backend", "interpret")
)
def backward(
    x: Array,
    dy: Array,
    scale: Array | None,
    mean: Array | None,
    rstd: Array,
    *,
    center: bool,
    with_bias: bool,
    backend: str,
    interpret: Any = False,
) -> tuple[Array, Array | None, Array | None]:
    """The cotangents of x, scale and bias for `dy`, that of the result of `forward`:

        d = dy * scale
        dx = rstd * (d - mean(d) - x_hat * mean(d * x_hat))
        dscale, dbias = sum(dy * x_hat), sum(dy)

    with means over the features, sums over the rows, all in float32. Without `center`,
    `mean(d)` is left out and `mean` not read.

    `dx` has the dtype of `x`; `dscale` and `dbias` are (features,) in float32, and None
    without `scale` and without `with_bias`. Of a sharded `x` they are the sums over all
    devices; in shard_map, where each device calls this, they are its own.

    Raises ValueError where `support.why_unfit` has one.
    """
    support.require("rows", backend, x.shape, x.dtype, dy.dtype)
    if center and mean is None:
        raise ValueError(
            "center=True needs the mean that forward has returned, got None"
        )
    mean = mean if center else None
    given = _batch_of_one(x=x, dy=dy, scale=scale, mean=mean, rstd=rstd)

    def kernel(*arrays):
        named = dict.fromkeys(("scale", "mean")) | dict(zip(given, arrays, strict=True))
        per_row = {k: named[k] for k in ("mean", "rstd")}
        dx, *parts = _module(backend).backward(
            named["x"],
            named["dy"],
            named["scale"],
            **{k: v if v is None else v.reshape(-1) for k, v in per_row.items()},
            with_bias=with_bias,
            interpret=interpret,
        )
        return dx, *(jnp.sum(v, axis=1) for v in parts if v is not None)

    results = ("brd", *["bd"] * ((scale is not None) + with_bias))
    dx, *sums = _spread(kernel, given, results, backend, interpret)
    dscale = None if scale is None else sums.pop(0)[0]
    return dx[0], dscale, sums[0][0] if with_bias else None


_LETTERS = {
    "x": "brd",
    "dy": "brd",
    "scale": "Bd",
    "bias": "Bd",
    "epsilon": "B",
    "mean": "br",
    "rstd": "br",
}


def _batch_of_one(**operands: Array | None) -> dict[str, Array]:
    """Those that are given, with a leading axis for `spread.call`."""
    return {k: v[None] for k, v in operands.items() if v is not None}


def _spread(kernel, given, results, backend, interpret) -> spread.Results:
    signature = spread.Signature(tuple(_LETTERS[k] for k in given), results, whole="d")
    alone = spread.needs_one_device(backend, interpret)
    return spread.call(kernel, signature, list(given.values()), one_device=alone)


def _module(backend: str) -> Any:
    """The kernels of a backend, imported where they are first needed."""
    return importlib.import_module(f"jaxnorm._kernels.rows_{backend}")
