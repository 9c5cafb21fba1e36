"""How does the result of a norm become float8, for a product that takes it?"""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_positive, dtype_or_none, shown
from jaxnorm._axis_sum import AxisName
from jaxnorm._devices import as_axis_name, axis_size
from jaxnorm._dtypes import as_floating, at_least_float32

# Not those with "fnuz", where XLA on CPUs makes NaN of small negative numbers.
DTYPES = ("float8_e4m3fn", "float8_e5m2")


def to_float8(
    y: ArrayLike,
    scale: ArrayLike,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    *,
    axis_name: str | Sequence[str] | None = None,
) -> tuple[Array, Array]:
    """`y / scale` in float8, saturated, and the largest magnitude of `y`.

        limit = jnp.finfo(dtype).max
        q = jnp.clip(y / scale, -limit, limit).astype(dtype)
        amax = abs(y).max()

    so that `q.astype(jnp.float32) * scale` is about `y`, as in flax.linen.fp8_ops. NaN
    stays NaN; what lies beyond the limit, which is NaN or infinite by `astype` alone,
    becomes the limit. Give it a norm in float32, so that a number is rounded once: in
    one program with the norm, XLA writes nothing of that size but `q`.

    Args:
        y: array of real numbers.
        scale: one number over 0, of shape () or (1,), such as `amax / limit` of a step
            before.
        dtype: jnp.float8_e4m3fn or jnp.float8_e5m2.
        axis_name: mapped axis, or several, over whose devices `y` is split: amax is
            then that of all.

    Returns:
        q, of the shape of y, in `dtype`; amax, a number in float32, or float64 where y
        is, 0 if y is empty, and NaN or infinite where y is so anywhere.

    Raises:
        ValueError, TypeError: while tracing, for a dtype or scale that does not fit,
            and where a derivative is taken: a cotangent of q would be float8 itself,
            in which small gradients are 0.

    Source: Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433.

    >>> import jax.numpy as jnp, jaxnorm
    >>> print(*jaxnorm.to_float8(jnp.array([0.5, -3.1, 99.0]), scale=0.1))
    [5 -32 448] 99.0
    """
    y, limits = as_floating(y, "y"), jnp.finfo(_as_float8("dtype", dtype))
    if jnp.iscomplexobj(y):
        raise TypeError(f"y must be of real numbers, got {y.dtype}")
    name = as_axis_name(axis_name)
    if name is not None:
        axis_size(name)
    wide = at_least_float32(y.dtype)
    y, divisor = _refuse_derivatives(y.astype(wide), _as_scale(scale).astype(wide))
    low, high = (v.astype(wide) for v in (limits.min, limits.max))
    q = jnp.clip(y / divisor, low, high).astype(limits.dtype)
    return q, _largest(y, name)


def _as_float8(name: str, value: DTypeLike) -> jnp.dtype:
    """`value` as one of the dtypes of `DTYPES`."""
    dtype = dtype_or_none(value)
    if dtype is None or dtype.name not in DTYPES:
        raise TypeError(
            f"{name} must be jnp.float8_e4m3fn or jnp.float8_e5m2, got {shown(value)}"
        )
    return dtype


def _as_scale(value: ArrayLike) -> Array:
    """`value`, which may be the one element of an axis, as a number over 0."""
    if isinstance(value, Array | np.ndarray) and value.shape == (1,):
        value = value[0]
    return jnp.asarray(as_positive("scale", value))


def _largest(y: Array, axis_name: AxisName | None) -> Array:
    """The largest magnitude of `y`, on all devices along `axis_name`."""
    if y.ndim:
        # Of rows first, and apart: a norm's kernel on a GPU holds a row, and for a
        # maximum of the whole array XLA would write that in float32.
        y = lax.optimization_barrier(jnp.max(abs(y), axis=-1, initial=0))
    amax = jnp.max(abs(y), initial=0)
    return amax if axis_name is None else lax.pmax(amax, axis_name)


@jax.custom_jvp
def _refuse_derivatives(y: Array, scale: Array) -> tuple[Array, Array]:
    return y, scale


@_refuse_derivatives.defjvp
def _no_derivative(primals: Any, tangents: Any) -> NoReturn:
    raise TypeError(
        "to_float8 has no derivative, as that of a float8 array would be float8: pass "
        "it jax.lax.stop_gradient(y), call it in a jax.custom_vjp, or train with "
        "flax.linen.fp8_ops.Fp8DirectDotGeneralOp, which quantizes what it multiplies"
    )
