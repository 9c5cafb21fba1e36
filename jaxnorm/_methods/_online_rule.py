"""The backward pass of online normalization: a second stream, of gradients."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxnorm._axes import Axes
from jaxnorm._methods import _control as control
from jaxnorm._normalize import normalize
from jaxnorm._standardize import standardize
from jaxnorm._working import from_working


class Stream(NamedTuple):
    """How a stream of examples is read: what is known before any array is."""

    axes: Axes
    dtype: jnp.dtype
    epsilon: float
    momentum: float
    layer_scaling: bool
    copies: tuple[int, ...]


def scaled(
    plan: Stream,
    mask: ArrayLike | None,
    y: Array,
    scale: Array | None,
    bias: Array | None,
) -> Array:
    """Each example divided by its root mean square, then scaled and shifted."""
    axes = plan.axes
    if not plan.layer_scaling:
        zero, one = jnp.zeros((), y.dtype), jnp.ones((), y.dtype)
        return standardize(y, zero, one, axes, scale=scale, bias=bias, mask=mask)
    whole = axes._replace(reduce=tuple(range(1, len(axes.shape))))
    params = {"scale": scale, "bias": bias}
    return normalize(y, params, whole, epsilon=plan.epsilon, center=False, mask=mask)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def online(
    plan: Stream,
    x: Array,
    mask: ArrayLike | None,
    mean: Array,
    rstd: Array,
    residue: Array,
    scale: Array | None,
    bias: Array | None,
    product: Array,
    shift: Array,
) -> Array:
    y = _standardized(plan, x, mask, mean, rstd, residue)
    return scaled(plan, mask, y, scale, bias).astype(plan.dtype)


def _standardized(
    plan: Stream,
    x: Array,
    mask: ArrayLike | None,
    mean: Array,
    rstd: Array,
    residue: Array,
) -> Array:
    given = {"residue": residue, "mask": mask, "dtype": mean.dtype}
    return standardize(x, mean, rstd, plan.axes, **given)


def _forward(plan: Stream, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    return online(plan, *args), args


def _backward(plan: Stream, args: Any, dz: Array) -> tuple[Any, ...]:
    x, mask, mean, rstd, residue, scale, bias, product, shift = args
    axes, rate = plan.axes, 1 - plan.momentum
    y = _standardized(plan, x, mask, mean, rstd, residue)
    _, pull = jax.vjp(functools.partial(scaled, plan, mask), y, scale, bias)
    g, dscale, dbias = pull(dz.astype(y.dtype))
    count = jnp.broadcast_to(True if mask is None else mask, x.shape)
    count = count.sum(axes.reduce, keepdims=True).astype(y.dtype)
    means = [
        v.sum(axes.reduce, keepdims=True) / jnp.maximum(count, 1)
        for v in (g * y, y * y, g, y)
    ]

    def step(state: tuple[Array, ...], example: Array) -> tuple[Any, Any]:
        product, shift = state
        gy, yy, g, y, rstd, valid = (e[None] for e in example)
        gone = (g - rate * product * y) * rstd - rate * shift
        after = product + gy - rate * product * yy, shift + valid * gone
        return after, (product[0], shift[0])

    valid = (count > 0).astype(y.dtype)
    rstds = jnp.broadcast_to(rstd, valid.shape)
    new, before = lax.scan(step, (product, shift), cast(Any, (*means, rstds, valid)))
    dx = (g - rate * before[0] * y) * rstd - rate * before[1]
    controls = (
        control.renewal(old, v, copies, x)
        for old, v, copies in zip((product, shift), new, plan.copies, strict=True)
    )
    return from_working(dx, mask, axes, x.dtype), *[None] * 4, dscale, dbias, *controls


online.defvjp(_forward, _backward)
