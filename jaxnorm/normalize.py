"""Steps 2 and 3 as one call: the one place where an implementation is chosen."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import zero_from_primal
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import devices
from jaxnorm.axes import Axes
from jaxnorm.devices import AxisName, Groups
from jaxnorm.dtypes import as_floating, at_least_float32
from jaxnorm.moments import Moments, as_mask, moments, moments_tangent
from jaxnorm.standardize import as_param, standardize_tangent, standardized


class Plan(NamedTuple):
    """What is known of a normalization before any array is."""

    axes: Axes
    center: bool
    axis_name: AxisName | None
    groups: Groups | None
    dtype: jnp.dtype


def normalize(
    x: ArrayLike,
    params: Mapping[str, ArrayLike | None],
    axes: Axes,
    *,
    epsilon: ArrayLike,
    center: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Standardizes `x` by its own moments and returns these with it. The same as

        m = sync(moments(x, axes, mask=mask, center=center), axis_name)
        y = standardize(x, m.mean, m.rstd(epsilon), axes, **params, mask=mask)

    but for what the backward pass keeps, which is `x` in its own dtype, once, and
    arrays of the size of the statistics and parameters. Raises what these three raise.
    """
    x = as_floating(x)
    wide = at_least_float32(x.dtype)
    plan = Plan(
        axes,
        center,
        devices.as_axis_name(axis_name),
        devices.as_groups(axis_index_groups),
        jnp.dtype(x.dtype if dtype is None else dtype),
    )
    scale, bias = (as_param(k, params.get(k), axes, wide) for k in ("scale", "bias"))
    epsilon = jnp.asarray(epsilon, wide).real
    return _normalize(plan, x, as_mask(mask, x.shape), epsilon, scale, bias)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(plan, x, mask, epsilon, scale, bias):
    own = moments(x, plan.axes, mask=mask, center=plan.center)
    m = devices.sync(own, plan.axis_name, plan.groups)
    rstd = m.rstd(epsilon)
    return standardized(plan.axes, plan.dtype, x, mask, m.mean, rstd, scale, bias), m


@_normalize.defjvp
def _normalize_jvp(plan, primals, tangents):
    x, mask, epsilon, scale, bias = primals
    dx, _, depsilon, dscale, dbias = tangents
    own = moments(x, plan.axes, mask=mask, center=plan.center)
    m = devices.sync(own, plan.axis_name, plan.groups)
    rstd = m.rstd(epsilon)
    y = standardized(plan.axes, plan.dtype, x, mask, m.mean, rstd, scale, bias)
    # Recomputed, not kept: x in its own dtype is all of its size the backward needs.
    tangent = jax.checkpoint(functools.partial(_tangent, plan), prevent_cse=False)
    synced = None if plan.axis_name is None else (m.mean, m.size)
    dy, dmean, dvar = tangent(
        x, mask, own.mean, own.size, synced, rstd, scale, dx, depsilon, dscale, dbias
    )
    dm = Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))
    return (y, m), (dy, dm)


def _tangent(
    plan, x, mask, mean, size, synced, rstd, scale, dx, depsilon, dscale, dbias
):
    """The chain rule over the parts; its transpose sums x's cotangent twice."""
    dmean, dvar = moments_tangent(plan.axes, plan.center, x, mask, mean, size, dx)
    if synced is not None:
        own, (mean, whole) = mean, synced
        dmean, dvar = devices.sync_tangent(
            plan.axis_name, plan.groups, own - mean, size, whole, dmean, dvar
        )
    drstd = -0.5 * rstd**3 * (dvar + depsilon)
    dy = standardize_tangent(
        plan.axes,
        plan.dtype,
        x,
        mask,
        mean,
        rstd,
        scale,
        dx,
        dmean,
        drstd,
        dscale,
        dbias,
    )
    return dy, dmean, dvar
