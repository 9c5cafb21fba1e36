"""Backward passes that learn: statistics of gradients, kept beside the parameters.

Some methods replace, in the backward pass, averages over the batch by running ones. The
backward pass of a pure function returns nothing but gradients, so these methods keep
such averages as parameters named "control", "control_product" and "control_mean", and
return for a gradient what must be subtracted to renew them: the old value less the new
one. Plain gradient descent with rate 1 is then their update, whatever optimizer the
others have:

    optax.multi_transform(
        {"parameter": optimizer, "control": optax.sgd(1.0)},
        jaxnorm.models.control_labels,
    )

Clip, unscale or accumulate gradients within `optimizer`, not before: what is done to
the gradients of controls is done to the statistics. In shard_map with check_vma, where
JAX adds up the gradients of shared parameters, the controls' add up to the mean over
devices; where you average gradients yourself (pmap), average these alike.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes
from jaxnorm._devices import Peers
from jaxnorm._sharding import axes_gained, vary_together
from jaxnorm._standardize import affine, as_param
from jaxnorm._working import as_mask, from_working, to_working

NAMES = ("control", "control_product", "control_mean")


def as_control(
    name: str, value: ArrayLike | None, axes: Axes, dtype: DTypeLike, *leading: int
) -> Array:
    """A control, in the precision of the statistics, that broadcasts against working x.

    It has the shape of the features, after axes of its own, `leading`; None is zeros.
    """
    shape = (*leading, *axes.feature_shape)
    value = jnp.zeros(shape, dtype) if value is None else jnp.asarray(value)
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {value.shape}, but for an input of shape {axes.shape} "
            f"it is {shape}: start from init_params"
        )
    return value.astype(dtype).reshape(*leading, *axes.param_shape())


def controlled(
    renew: Callable[..., tuple[Array, Array]],
    x: Array,
    axes: Axes,
    rstd: Array,
    control: Array,
    extra: tuple[Array, ...],
    *,
    gain: Array | None = None,
    size: Any,
    params: Mapping[str, ArrayLike | None],
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    peers: Peers | None,
) -> Array:
    """`z * gain * scale + bias` with z = x * rstd, and this backward pass, where g is
    the gradient of z:

        c, new_control = renew((g * z).mean(), control, *extra)
        dx = rstd * (g - c * z)

    No gradient goes through `rstd`, `gain` and `extra`. The mean is over `size`
    elements, on all `peers`. `renew` is a function without state of its own.
    """
    mask = as_mask(mask, x.shape)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    scale, bias = (
        as_param(k, params.get(k), axes, rstd.dtype) for k in ("scale", "bias")
    )
    gain = jnp.ones_like(rstd) if gain is None else gain
    rstd, gain, extra = lax.stop_gradient((rstd, gain, extra))
    size = jnp.maximum(jnp.asarray(size), 1).astype(rstd.dtype)
    plan = Renewal(renew, axes, dtype, copies(control, x))
    arrays = vary_together(x, rstd, gain, size, scale, bias, control, *extra)
    return _controlled(plan, x, mask, peers, *arrays[:6], tuple(arrays[6:]))


class Renewal(NamedTuple):
    """How controls are renewed: what is known before any array is."""

    renew: Callable[..., tuple[Array, Array]]
    axes: Axes
    dtype: jnp.dtype
    copies: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _controlled(
    plan: Renewal,
    x: Array,
    mask: Array | None,
    peers: Peers | None,
    rstd: Array,
    gain: Array,
    size: Any,
    scale: Array | None,
    bias: Array | None,
    control: Array,
    extra: tuple[Array, ...],
) -> Array:
    y = affine(to_working(x, mask, plan.axes) * (rstd * gain), scale, bias)
    return from_working(y, mask, plan.axes, plan.dtype)


def _forward(plan: Renewal, *args: Any) -> tuple[Array, tuple[Any, ...]]:
    return _controlled(plan, *args), args


def _backward(plan: Renewal, args: Any, dy: Array) -> tuple[Any, ...]:
    x, mask, peers, rstd, gain, size, scale, bias, control, extra = args
    z = to_working(x, mask, plan.axes) * rstd
    dy = to_working(dy, mask, plan.axes).astype(z.dtype)
    g = gain * dy if scale is None else gain * scale * dy
    total = (g * z).sum(plan.axes.reduce, keepdims=True)
    p = devices.group_sum(total, peers) / size
    c, new = plan.renew(p, control, *extra)
    dx = from_working(rstd * (g - c * z), mask, plan.axes, x.dtype)
    dscale = None if scale is None else _summed(gain * z * dy, scale)
    dbias = None if bias is None else _summed(dy, bias)
    dcontrol = renewal(control, new, plan.copies, x)
    return dx, None, None, None, None, None, dscale, dbias, dcontrol, None


_controlled.defvjp(_forward, _backward)


def _summed(v: Array, like: Array) -> Array:
    """The sum of `v` over the axes along which `like` was broadcast."""
    return v.sum([a for a, n in enumerate(like.shape) if n == 1], keepdims=True)


def copies(control: Array, like: Array) -> int:
    """The number of devices that share `control`, whose gradients JAX adds up.

    Known in shard_map with check_vma. Elsewhere gradients are averaged by whoever
    replicates the parameters, as usual.
    """
    gained = axes_gained(control, like)
    return lax.axis_size(gained) if gained else 1


def renewal(old: Array, new: Array, copies: int, like: Array) -> Array:
    """The gradient that renews a control: `old` less `new`, over the number of devices.

    Nothing, where the new value is not finite: a bad batch leaves no trace.
    """
    change = jnp.where(jnp.isfinite(new).all(), old - new, 0)
    return vary_together(like, change.astype(old.dtype) / copies)[0]
