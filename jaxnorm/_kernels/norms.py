"""Norms of which the sums are kernels: what `normalize` calls if asked for these.

Both are functions with a backward pass of their own, so they have no forward mode and
no second derivatives.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._axes import Axes
from jaxnorm._kernels import columns, rows, support


class KernelCall(NamedTuple):
    """Which kernel, and its settings: what is known before any array is."""

    backend: str
    epsilon: float
    dtype: jnp.dtype
    interpret: Any = False
    center: bool = True
    num_groups: int = 1
    activation: str | None = None


def why_unfit(
    backend: str,
    axes: Axes,
    x: Array,
    dtype: jnp.dtype,
    center: bool,
    activation: str | None,
    params: tuple[Array | None, ...],
) -> str | None:
    """Why no kernel of `backend` normalizes `x` so; None if one does."""
    pattern = _pattern(axes)
    if pattern is None:
        return (
            "there are kernels for the last axis alone, and for groups of the last "
            f"axis with all axes but the first, not for axes {axes.reduce} of an array "
            f"of shape {axes.working_shape}"
        )
    if any(v is not None and v.size != axes.shape[-1] for v in params):
        return "scale and bias must be of the shape of the last axis"
    known = (None,) if pattern == "rows" else columns.ACTIVATIONS
    if activation not in known:
        return f"kernels of {pattern} take activations {list(known)}, got {activation}"
    shape = _canonical(pattern, axes.shape)
    return support.why_unfit(pattern, backend, shape, x.dtype, dtype) or _too_old(
        backend
    )


def normalized(
    call: KernelCall, axes: Axes, x: Array, scale: Array | None, bias: Array | None
) -> Array:
    """`x` normalized over `axes` by kernels that `why_unfit` has nothing against."""
    pattern = _pattern(axes)
    scale = None if scale is None else scale.reshape(-1)
    bias = None if bias is None else bias.reshape(-1)
    canonical = x.reshape(_canonical(pattern, axes.shape))
    if pattern == "rows":
        return jnp.reshape(_rows(call, canonical, scale, bias), x.shape)
    groups = (
        axes.working_shape[-2]
        if len(axes.working_shape) > len(axes.shape)
        else x.shape[-1]
    )
    call = call._replace(num_groups=groups)
    return jnp.reshape(_columns(call, canonical, scale, bias), x.shape)


def _pattern(axes: Axes) -> str | None:
    last = len(axes.shape) - 1
    if axes.feature != (last,):
        return None
    if axes.reduce == (last,) and axes.working_shape == axes.shape:
        return "rows"
    # All of space, and the features of a group if they are in groups.
    ends = {len(axes.working_shape) - 1} if axes.working_shape != axes.shape else set()
    space = set(range(1, last)) | ends
    return "columns" if last > 1 and set(axes.reduce) == space else None


def _canonical(pattern: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if pattern == "rows":
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:-1]), shape[-1]


def _too_old(backend: str) -> str | None:
    """Why the GPUs at hand cannot run the kernels; None where there are none."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    least = support.LEAST_CAPABILITY[backend]
    if tuple(map(int, str(capability).split("."))) >= least:
        return None
    needed = ".".join(map(str, least))
    return f"{backend} needs compute capability {needed}, this GPU has {capability}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(call, x, scale, bias):
    """Not differentiated, XLA's own kernel reads x once, too."""
    wide = x.astype(jnp.float32)
    offset = wide - wide.mean(-1, keepdims=True) if call.center else wide
    offset = offset - offset.mean(-1, keepdims=True) if call.center else offset
    var = jnp.square(offset).mean(-1, keepdims=True)
    y = offset * lax.rsqrt(var + call.epsilon)
    y = y if scale is None else y * scale[None]
    y = y if bias is None else y + bias[None]
    return y.astype(call.dtype)


def _rows_forward(call, x, scale, bias):
    y, mean, rstd = rows.forward(
        x,
        scale,
        bias,
        epsilon=call.epsilon,
        center=call.center,
        dtype=call.dtype,
        backend=call.backend,
        interpret=call.interpret,
    )
    return y, (x, scale, bias, mean, rstd)


def _rows_backward(call, kept, dy):
    x, scale, bias, mean, rstd = kept
    dx, dscale, dbias = rows.backward(
        x,
        dy,
        scale,
        mean,
        rstd,
        center=call.center,
        with_bias=bias is not None,
        backend=call.backend,
        interpret=call.interpret,
    )
    return dx, _like(dscale, scale), _like(dbias, bias)


_rows.defvjp(_rows_forward, _rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _columns(call, x, scale, bias):
    return _columns_forward(call, x, scale, bias)[0]


def _columns_forward(call, x, scale, bias):
    mean, var = columns.moments(x, backend=call.backend, interpret=call.interpret)
    whole = _of_group(call, mean)
    spread = _of_group(call, var + jnp.square(mean - whole))
    rstd = lax.rsqrt(spread + call.epsilon)
    line = _line(rstd, scale, bias)
    z = _z(x, whole, *line)
    y = z * (1 / (1 + jnp.exp(-z))) if call.activation == "silu" else z
    y = jnp.maximum(z, 0) if call.activation == "relu" else y
    return y.astype(call.dtype), (x, scale, bias, whole, rstd)


def _columns_backward(call, kept, dy):
    x, scale, bias, mean, rstd = kept
    slope, shift = _line(rstd, scale, bias)
    sums = columns.gradient_sums(
        x,
        dy,
        mean,
        slope,
        shift - mean * slope,
        activation=call.activation,
        backend=call.backend,
        interpret=call.interpret,
    )
    dbias, along = sums[0].sum(0), (sums[1] * rstd).sum(0)
    gain = jnp.ones_like(mean) if scale is None else jnp.broadcast_to(scale, mean.shape)
    space = x.shape[1]
    level, tilt = (_of_group(call, s * gain) / space for s in sums)
    # Or XLA would take them for parts of one program, and write d to memory.
    x, dy, level, tilt = lax.optimization_barrier((x, dy, level, tilt))
    d = columns.activation_cotangent(
        call.activation, _z(x, mean, slope, shift), dy.astype(jnp.float32)
    )
    offset = x.astype(jnp.float32) - mean[:, None]
    inner = d * gain[:, None] - level[:, None]
    dx = rstd[:, None] * (inner - offset * (tilt * jnp.square(rstd))[:, None])
    return dx.astype(x.dtype), _like(along, scale), _like(dbias, bias)


_columns.defvjp(_columns_forward, _columns_backward)


def _of_group(call: KernelCall, v: Array) -> Array:
    """The mean over the features of each group, for each of them."""
    parts = v.reshape(v.shape[0], call.num_groups, -1)
    mean = parts.mean(-1, keepdims=True)
    return jnp.broadcast_to(mean, parts.shape).reshape(v.shape)


def _line(rstd: Array, scale: Array | None, bias: Array | None) -> tuple[Array, Array]:
    """What (x - mean) is multiplied by, and what is added then."""
    slope = rstd if scale is None else rstd * scale[None]
    shift = jnp.zeros_like(rstd) if bias is None else jnp.zeros_like(rstd) + bias[None]
    return slope, shift


def _z(x: Array, mean: Array, slope: Array, shift: Array) -> Array:
    offset = x.astype(jnp.float32) - mean[:, None]
    return offset * slope[:, None] + shift[:, None]


def _like(gradient: Array | None, param: Array | None) -> Array | None:
    return None if gradient is None or param is None else gradient.astype(param.dtype)
