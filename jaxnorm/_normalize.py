"""Steps 2 and 3 as one call: the one place where an implementation is chosen."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import zero_from_primal
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._activation import add_and_activate, check_activation, pack, unpack
from jaxnorm._arguments import as_bool, as_epsilon, check_mapping, shown
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating, at_least_float32, out_dtype
from jaxnorm._moments import (
    Moments,
    as_mask,
    check_axes,
    moments,
    moments_tangent,
    row_moments,
    to_working,
)
from jaxnorm._standardize import (
    affine,
    apply_line,
    as_param,
    from_working,
    line_tangent,
    standardize_tangent,
)

IMPLEMENTATIONS = ("xla", "triton", "mosaic")


class Plan(NamedTuple):
    """What is known of a normalization before any array is."""

    axes: Axes
    center: bool
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
    activation: str | None = None,
    residual: ArrayLike | None = None,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Standardizes `x` by its own moments and returns these with it. The same as

        m = sync(moments(x, axes, mask=mask, center=center), axis_name)
        y = standardize(x, m.mean, m.rstd(epsilon), axes, **params, mask=mask)
        y = activation(y + residual)

    but for what the backward pass keeps, which is `x` in its own dtype, once, and
    arrays of the size of the statistics and parameters; after "relu" one bit for each
    element of y, too (a byte, where the last axis of `x` is no multiple of 8), and
    after a residual and "relu" y itself, which the next layer keeps as well; another
    activation keeps what it is applied to.

    `activation` is "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid" or "tanh",
    as in `jax.nn`; `residual` has the shape of `x`.

    `implementation` is "xla", which is the default everywhere, or "triton" or "mosaic"
    for the kernels for GPUs of `jaxnorm._kernels`, which give the same to rounding, but
    no forward mode and no second derivatives.

    Raises what these three raise, and ValueError or TypeError for another activation,
    a residual of another shape, and kernels that do not fit.
    """
    x = as_floating(x)
    residual = None if residual is None else as_floating(residual, "residual")
    check_mapping("params", params, "init_params")
    unknown = sorted(set(params) - {"scale", "bias"})
    if unknown:
        raise ValueError(f"params holds {unknown}, but takes scale and bias alone")
    check_axes(axes, x.shape)
    epsilon = as_epsilon("epsilon", epsilon)
    implementation = as_implementation("implementation", implementation)
    check_activation(activation, residual, x)
    wide = at_least_float32(x.dtype)
    plan = Plan(
        axes,
        as_bool("center", center),
        out_dtype(x, dtype),
    )
    shared = devices.peers(axis_name, axis_index_groups)
    scale, bias = (as_param(k, params.get(k), axes, wide) for k in ("scale", "bias"))
    mask = as_mask(mask, x.shape)
    if implementation not in (None, "xla"):
        following = activation, residual, implementation
        return _by_kernels(plan, x, mask, shared, epsilon, scale, bias, *following)
    given = x, mask, shared, jnp.asarray(epsilon, wide).real, scale, bias, residual
    how = functools.partial(_normalize_and_activate, plan, activation)
    like = x, devices.like_moments(x, axes)
    return devices.automatically(how, *given, like=like)


def _normalize_and_activate(
    plan, activation, x, mask, shared, epsilon, scale, bias, residual
):
    """Normalizes, and does what follows."""
    given = x, mask, shared, epsilon, scale, bias
    if activation == "relu":
        return _rectify(plan, *given, residual)
    y, m = _normalize(plan, *given)
    return add_and_activate(y, activation, residual, mask), m


def as_implementation(name: str, value: Any) -> str | None:
    """`value` as one of the implementations there are, or None for the usual one."""
    if value is not None and value not in list(IMPLEMENTATIONS):
        raise ValueError(
            f"{name}={shown(value)} is none of None and {list(IMPLEMENTATIONS)}"
        )
    return value


def _by_kernels(
    plan, x, mask, shared, epsilon, scale, bias, activation, residual, implementation
):
    """The same by kernels; raises ValueError if they do not fit."""
    from jaxnorm import (
        _kernels as kernels,  # not needed by most, and not loaded for these
    )

    unfit = {
        "a mask": mask is not None,
        "axis_name": shared is not None,
        "a residual": residual is not None,
        "an epsilon that is traced": isinstance(epsilon, Tracer),
    }
    problem = next(
        (f"they do not take {k}" for k, given in unfit.items() if given), None
    )
    settings = plan.axes, x, plan.dtype, plan.center, activation, (scale, bias)
    problem = problem or kernels.why_unfit(implementation, *settings)
    if problem:
        raise ValueError(
            f"implementation={implementation!r} does not fit: {problem}. Leave it out "
            "to have XLA's"
        )
    how = kernels.Plan(
        implementation,
        float(epsilon),
        plan.dtype,
        center=plan.center,
        activation=activation,
    )
    y = kernels.normalized(how, plan.axes, x, scale, bias)
    return y, moments(x, plan.axes, center=plan.center)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(plan, x, mask, shared, epsilon, scale, bias):
    _, m = _moments(plan, x, mask, shared)
    y = _line(plan, x, mask, m, epsilon, scale, bias)
    return from_working(y, mask, plan.axes, plan.dtype), m


@_normalize.defjvp
def _normalize_jvp(plan, primals, tangents):
    x, mask, shared, epsilon, scale, bias = primals
    dx, _, _, depsilon, dscale, dbias = tangents
    own, m = _moments(plan, x, mask, shared)
    y = _line(plan, x, mask, m, epsilon, scale, bias)
    y = from_working(y, mask, plan.axes, plan.dtype)
    rstd = m.rstd(epsilon)
    dx = _widened(plan, dx, mask)
    dparams = dscale, dbias
    if plan.axes.of_rows and mask is None and shared is None:
        tangent = _recomputed(functools.partial(_row_tangent, plan))
        given = x, own, epsilon, rstd, scale, dx, depsilon, *dparams
        dy, dmean, dvar = tangent(*given)
    else:
        dmean, dvar = _moments_tangent(plan, x, mask, shared, own, m, dx)
        drstd = _rstd_tangent(rstd, dvar, depsilon)
        tangent = functools.partial(standardize_tangent, plan.axes, plan.dtype)
        given = x, mask, m.mean, _residue(plan, m), rstd, scale
        dy = _recomputed(tangent)(*given, dx, dmean, drstd, *dparams)
    dm = Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))
    return (y, m), (dy, dm)


def _recomputed(tangent):
    """`tangent`, for whose transpose arguments alone are kept, and x in its own dtype
    is all of its size among these."""
    return jax.checkpoint(tangent, prevent_cse=False)


def _widened(plan, dx, mask):
    """`dx` in the working shape, so wide that its uses are summed before rounding."""
    return _recomputed(functools.partial(to_working, axes=plan.axes))(dx, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _rectify(plan, x, mask, shared, epsilon, scale, bias, residual):
    _, m = _moments(plan, x, mask, shared)
    return _rectified(plan, x, mask, m, epsilon, scale, bias, residual), m


def _rectified(plan, x, mask, m, epsilon, scale, bias, residual):
    y = _line(plan, x, mask, m, epsilon, scale, bias)
    y = y if residual is None else y + to_working(residual, mask, plan.axes)
    return from_working(jnp.maximum(y, 0), mask, plan.axes, plan.dtype)


@_rectify.defjvp
def _rectify_jvp(plan, primals, tangents):
    x, mask, shared, epsilon, scale, bias, residual = primals
    dx, _, _, depsilon, dscale, dbias, dresidual = tangents
    own, m = _moments(plan, x, mask, shared)
    rstd = m.rstd(epsilon)
    y = _rectified(plan, x, mask, m, epsilon, scale, bias, residual)
    # The second is for TPUs: what the sign of y follows from, with the least to keep.
    signs = pack(y > 0), bias if residual is None else y
    dx = _widened(plan, dx, mask)
    dmean, dvar = _moments_tangent(plan, x, mask, shared, own, m, dx, _barrier_on_gpu)
    drstd = _rstd_tangent(rstd, dvar, depsilon)
    tangent = _recomputed(functools.partial(_rectify_tangent, plan))
    changes = dx, dmean, drstd, dscale, dbias, dresidual
    dy = tangent(x, mask, signs, m, rstd, scale, changes)
    dm = Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))
    return (y, m), (dy, dm)


def _rectify_tangent(plan, x, mask, signs, m, rstd, scale, changes):
    """The rest of the chain rule, with a barrier between its transpose and that of
    `_moments_tangent`.

    The sums take x and the cotangent before it, the rest after it: a compiler that saw
    both together would write the gated cotangent to memory to share it.
    """
    dx, dmean, drstd, dscale, dbias, dresidual = changes
    positive = _positive(plan, x, mask, signs, m, rstd, scale, dresidual is not None)

    def gated(v):
        v = from_working(v, mask, plan.axes, plan.dtype)
        return jnp.where(positive, v, jnp.zeros((), v.dtype))

    rstd = rstd.astype(m.mean.dtype)
    dline = line_tangent(x, m.residue, rstd, scale, dmean, drstd, dscale, dbias)
    direct = affine(rstd, scale, None) * dx
    if dresidual is not None:
        direct = direct + to_working(dresidual, mask, plan.axes)
    direct, dslope, dshift = _barrier_on_gpu((gated(direct), *dline))
    centered = to_working(x, mask, plan.axes) - m.mean
    return direct + gated(centered * dslope + dshift)


def _barrier_on_gpu(values):
    """`values`, which a compiler for GPUs takes for others than those given."""
    barrier = lax.optimization_barrier
    return lax.platform_dependent(
        values, cuda=barrier, rocm=barrier, default=lambda same: same
    )


def _positive(plan, x, mask, signs, m, rstd, scale, has_residual):
    """Where y is positive: what the forward pass has packed.

    On a TPU packing would move data between lanes: there it is what y says, which the
    next layer keeps, or what x says again.
    """
    bits, y_or_bias = signs

    def again():
        if has_residual:
            return y_or_bias > 0
        given = x, mask, m.mean, _residue(plan, m), rstd, scale, y_or_bias
        return apply_line(plan.axes, *given).reshape(x.shape) > 0

    return lax.platform_dependent(tpu=again, default=lambda: unpack(bits))


def _moments(plan, x, mask, shared):
    """The moments of `x`, and those pooled over devices."""
    own = moments(x, plan.axes, mask=mask, center=plan.center)
    return own, devices.pooled(own, shared)


def _line(plan, x, mask, m, epsilon, scale, bias):
    """What normalizing gives, in the working shape and before it is rounded."""
    given = x, mask, m.mean, _residue(plan, m), m.rstd(epsilon), scale, bias
    return apply_line(plan.axes, *given)


def _residue(plan, m):
    """None where there is no mean to be exact about."""
    return m.residue if plan.center else None


def _moments_tangent(plan, x, mask, shared, own, m, dx, read=lambda x: x):
    """The tangents of the mean and variance, pooled; the sums take x as `read`."""

    def tangent(x, *given):
        return moments_tangent(plan.axes, plan.center, read(x), *given)

    given = x, mask, own.mean, own.residue, own.size, dx
    dmean, dvar = _recomputed(tangent)(*given)
    if shared is None:
        return dmean, dvar
    # Not within what is computed again, where a collective may know no axis any more.
    offset = (own.mean - m.mean) + (own.residue - m.residue)
    return devices.pooled_tangent(shared, offset, own.size, m.size, dmean, dvar)


def _rstd_tangent(rstd, dvar, depsilon):
    return -0.5 * rstd**3 * (dvar + depsilon)


def _row_tangent(plan, x, own, epsilon, rstd, scale, dx, depsilon, dscale, dbias):
    """The chain rule over the parts, all in one."""
    x, m, rstd = _rows_again(plan, x, own, rstd, epsilon)
    given = x, None, m.mean, m.residue, m.size, dx
    dmean, dvar = moments_tangent(plan.axes, plan.center, *given)
    drstd = _rstd_tangent(rstd, dvar, depsilon)
    given = x, None, m.mean, _residue(plan, m), rstd, scale
    given = *given, dx, dmean, drstd, dscale, dbias
    return standardize_tangent(plan.axes, plan.dtype, *given), dmean, dvar


def _rows_again(plan, x, own, rstd, epsilon):
    """On a GPU, the moments of rows once more, and about a pivot.

    The forward pass then is one kernel, which reads x once as nothing but its result
    leaves it; and the backward pass, which reads x anyway, takes all its sums along
    rows in one pass, as none of them needs another.
    """

    def again(x):
        x = lax.optimization_barrier(x)  # or they would be the forward pass's
        m = row_moments(x, plan.axes, plan.center)
        return x, m, m.rstd(epsilon)

    def same(x):
        return x, own, rstd

    return lax.platform_dependent(x, cuda=again, rocm=again, default=same)
