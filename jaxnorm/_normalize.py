"""Steps 2 and 3 as one call: the one place where an implementation is chosen."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._activation import add_and_activate, check_activation
from jaxnorm._arguments import as_bool, as_epsilon, check_mapping, shown
from jaxnorm._axes import Axes
from jaxnorm._devices import Peers
from jaxnorm._dtypes import as_floating, at_least_float32, out_dtype
from jaxnorm._fused import Operands, standardize_by_own
from jaxnorm._moments import Moments, like_moments
from jaxnorm._primitives._operation import Reduction
from jaxnorm._rectify import rectify
from jaxnorm._reduce import moments
from jaxnorm._sharding import automatically, on_explicit_mesh
from jaxnorm._standardize import as_param
from jaxnorm._working import as_mask, check_axes

IMPLEMENTATIONS = ("xla", "triton", "mosaic")


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

    `implementation` is None for kernels on CPUs where they serve, with all derivatives,
    and XLA's formula elsewhere; "xla" for XLA's formula everywhere; or "triton" or
    "mosaic" for Pallas kernels for GPUs, which give the same to rounding, but no
    forward mode and no second derivatives.

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
    center, dtype = as_bool("center", center), out_dtype(x, dtype)
    reduction = Reduction(axes, center, dtype, implementation)
    peers = devices.peers(axis_name, axis_index_groups)
    mask = as_mask(mask, x.shape)
    scale, bias = (as_param(k, params.get(k), axes, wide) for k in ("scale", "bias"))
    if implementation not in (None, "xla"):
        _check_unfit(implementation, mask, peers, residual, epsilon)
        return _by_kernels(
            implementation, activation, reduction, x, epsilon, scale, bias
        )
    epsilon = jnp.asarray(epsilon, wide).real
    operands = Operands(x, mask, peers, epsilon, scale, bias, residual)
    if not on_explicit_mesh(operands):
        return _normalize_and_activate(reduction, activation, operands)
    formula = functools.partial(_normalize_and_activate, reduction, activation)
    return automatically(formula, operands, like=(x, like_moments(x, axes)))


def as_implementation(name: str, value: Any) -> str | None:
    """`value` as one of the implementations there are, or None for the usual one."""
    if value is not None and value not in list(IMPLEMENTATIONS):
        raise ValueError(
            f"{name}={shown(value)} is none of None and {list(IMPLEMENTATIONS)}"
        )
    return value


def _by_kernels(
    implementation: str,
    activation: str | None,
    reduction: Reduction,
    x: Array,
    epsilon: Any,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, Moments]:
    """The same by kernels; raises ValueError if they do not fit."""
    from jaxnorm import _kernels as kernels  # not loaded for those who need none

    axes, center, dtype, _ = reduction
    problem = kernels.why_unfit(
        implementation, axes, x, dtype, center, activation, (scale, bias)
    )
    if problem:
        raise _misfit(implementation, problem)
    call = kernels.KernelCall(
        implementation, float(epsilon), dtype, center=center, activation=activation
    )
    y = kernels.normalized(call, axes, x, scale, bias)
    return y, moments(x, axes, center=center)


def _check_unfit(
    implementation: str,
    mask: Array | None,
    peers: Peers | None,
    residual: Array | None,
    epsilon: ArrayLike,
) -> None:
    """Raises ValueError for what no kernel takes."""
    unfit = {
        "a mask": mask is not None,
        "axis_name": peers is not None,
        "a residual": residual is not None,
        "an epsilon that is traced": isinstance(epsilon, Tracer),
    }
    for what, given in unfit.items():
        if given:
            raise _misfit(implementation, f"they do not take {what}")


def _misfit(implementation: str, problem: str) -> ValueError:
    return ValueError(
        f"implementation={implementation!r} does not fit: {problem}. Leave it out "
        "to have XLA's"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalize_and_activate(
    reduction: Reduction, activation: str | None, operands: Operands
) -> tuple[Array, Moments]:
    """Traced once for all norms alike, with its derivatives; and one program where
    nothing around it is compiled."""
    if activation == "relu":
        return rectify(reduction, operands)
    y, m = standardize_by_own(reduction, operands._replace(residual=None))
    return add_and_activate(y, activation, operands.residual, operands.mask), m
