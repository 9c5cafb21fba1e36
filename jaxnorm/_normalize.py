"""Steps 2 and 3 as one call: the one place where an implementation is chosen."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._activation import add_and_activate, check_activation
from jaxnorm._arguments import as_bool, as_epsilon, check_mapping, shown
from jaxnorm._axes import Axes
from jaxnorm._dtypes import as_floating, at_least_float32, out_dtype
from jaxnorm._fused import Operands, activated_by_own, standardize_by_own
from jaxnorm._kernels import defaults
from jaxnorm._kernels.columns import ACTIVATIONS as KERNEL_ACTIVATIONS
from jaxnorm._moments import Moments, like_moments
from jaxnorm._primitives._operation import Reduction, asks_for_gpu_kernels
from jaxnorm._rectify import rectify
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

    `implementation` is None for kernels where they serve and are the default, with all
    derivatives, and XLA's formula elsewhere: on CPUs they are, on a GPU for arrays for
    which `_kernels/defaults.json` names them. It is "xla" for XLA's formula everywhere;
    or "triton" or "mosaic" for Pallas kernels on NVIDIA's GPUs where they serve, with
    all derivatives, too: the gradients of rows, and of groups with "relu" or "silu".
    `jaxnorm.models.implementations` says which code runs.

    Raises what these three raise, and ValueError or TypeError for another activation
    and a residual of another shape.
    """
    x = as_floating(x)
    residual = None if residual is None else as_floating(residual, "residual")
    check_activation(activation, residual, x)
    reduction, operands = _checked(
        x,
        residual,
        params,
        axes,
        epsilon=epsilon,
        center=center,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
        dtype=dtype,
    )
    reduction = _with_default(reduction, x, activation)
    formula = functools.partial(_normalize_and_activate, reduction, activation)
    return _on_any_mesh(formula, operands, like=(x, like_moments(x, axes)))


def pass_and_normalize(
    x: ArrayLike, params: Mapping[str, ArrayLike | None], axes: Axes, **how: Any
) -> tuple[Array, Array]:
    """`x` as it is, and normalized as by `normalize`, which takes `how`, too.

    What else reads x reads it from here, so that a kernel for GPUs adds its gradient to
    the norm's in one pass.
    """
    x = as_floating(x)
    reduction, operands = _checked(x, None, params, axes, **how)
    reduction = _with_default(reduction, x)
    formula = functools.partial(_pass_and_normalize, reduction)
    return _on_any_mesh(formula, operands, like=(x, x))


def _checked(
    x: Array,
    residual: Array | None,
    params: Mapping[str, ArrayLike | None],
    axes: Axes,
    *,
    epsilon: ArrayLike,
    center: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Reduction, Operands]:
    """What is known of a normalization before any array is, and its arrays."""
    check_mapping("params", params, "init_params")
    unknown = sorted(set(params) - {"scale", "bias"})
    if unknown:
        raise ValueError(f"params holds {unknown}, but takes scale and bias alone")
    check_axes(axes, x.shape)
    epsilon = as_epsilon("epsilon", epsilon)
    implementation = as_implementation("implementation", implementation)
    wide = at_least_float32(x.dtype)
    center, dtype = as_bool("center", center), out_dtype(x, dtype)
    reduction = Reduction(axes, center, dtype, implementation)
    peers = devices.peers(axis_name, axis_index_groups)
    mask = as_mask(mask, x.shape)
    scale, bias = (as_param(k, params.get(k), axes, wide) for k in ("scale", "bias"))
    epsilon = jnp.asarray(epsilon, wide).real
    return reduction, Operands(x, mask, peers, epsilon, scale, bias, residual)


def _on_any_mesh(formula: Callable[..., Any], operands: Operands, like: Any) -> Any:
    """`formula(operands)`, whose results are sharded as the arrays of `like`."""
    if not on_explicit_mesh(operands):
        return formula(operands)
    return automatically(formula, operands, like=like)


def as_implementation(name: str, value: Any) -> str | None:
    """`value` as one of the implementations there are, or None for the usual one."""
    if value is not None and value not in list(IMPLEMENTATIONS):
        raise ValueError(
            f"{name}={shown(value)} is none of None and {list(IMPLEMENTATIONS)}"
        )
    return value


def _with_default(
    reduction: Reduction, x: Array, activation: str | None = None
) -> Reduction:
    """With the kernels that are the default on this GPU, where none is asked for.

    Of columns these are measured for silu of the groups of each example alone.
    """
    axes = reduction.axes
    if reduction.implementation is not None:
        return reduction
    if axes.as_rows is not None:
        pattern, features = "rows", axes.as_rows.size
    elif activation == "silu" and axes.stats_shape[0] == axes.shape[0]:
        pattern, features = "columns", axes.shape[-1]
    else:
        return reduction
    found = defaults.backend(pattern, axes.shape, features, x.dtype)
    return reduction._replace(implementation=found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalize_and_activate(
    reduction: Reduction, activation: str | None, operands: Operands
) -> tuple[Array, Moments]:
    """Traced once for all norms alike, with its derivatives; and one program where
    nothing around it is compiled."""
    if activation is not None and _is_for_kernels(reduction, activation, operands):
        return activated_by_own(reduction, activation, operands)
    if activation == "relu":
        return rectify(reduction, operands)
    _, y, m = standardize_by_own(reduction, operands._replace(residual=None))
    return add_and_activate(y, activation, operands.residual, operands.mask), m


def _is_for_kernels(reduction: Reduction, activation: str, operands: Operands) -> bool:
    """Whether a norm and its activation are one operation, as kernels for GPUs need."""
    asked = asks_for_gpu_kernels(reduction) and activation in KERNEL_ACTIVATIONS
    others = operands.mask, operands.peers, operands.residual
    return asked and reduction.axes.as_rows is None and others == (None, None, None)


@functools.partial(jax.jit, static_argnums=0)
def _pass_and_normalize(
    reduction: Reduction, operands: Operands
) -> tuple[Array, Array]:
    x, y, _ = standardize_by_own(reduction, operands)
    return x, y
