"""What the Linen and the NNX modules have in common: settings in, a call out."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _flax_serialization
from jaxnorm._arguments import (
    as_bool,
    as_dtype,
    as_feature_shape,
    as_flag,
    as_integer,
    check_function,
    check_instance,
    check_mapping,
    optional,
    shown,
)
from jaxnorm._base import Norm
from jaxnorm._dtypes import as_floating, promote, widened
from jaxnorm._marks import use
from jaxnorm._methods.batch_norm import BatchNorm
from jaxnorm._methods.group_norm import GroupNorm
from jaxnorm._methods.instance_norm import InstanceNorm
from jaxnorm._methods.layer_norm import LayerNorm
from jaxnorm._methods.rms_norm import RMSNorm
from jaxnorm._weights._arguments import features
from jaxnorm._weights.spectral_norm import spectral_norm
from jaxnorm._weights.weight_norm import weight_norm
from jaxnorm._weights.weight_standardize import weight_standardize

_flax_serialization.register()


def _check_norm(name: str, value: Any) -> None:
    check_instance(name, value, Norm, "jaxnorm.BatchNorm()")


def _check_metadata(name: str, value: Any) -> None:
    check_mapping(name, value, 'dict(out_sharding=("model",))')


# What the arguments of constructors must be. What a settings value holds as well is
# checked there.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "norm": _check_norm,
    "num_features": as_feature_shape,
    "use_running_average": optional(lambda name, value: as_flag(value, name)),
    "dtype": optional(as_dtype),
    "param_dtype": as_dtype,
    "use_scale": as_bool,
    "use_bias": as_bool,
    "scale_init": optional(check_function),
    "bias_init": optional(check_function),
    "scale_metadata": _check_metadata,
    "bias_metadata": _check_metadata,
    "promote_dtype": check_function,
    "n_steps": as_integer,
    "error_on_non_matrix": as_bool,
    "update_stats": as_bool,
    "scaled": as_bool,
}


def check(arguments: Mapping[str, Any], module: type) -> None:
    """Raises TypeError or ValueError for an argument of a constructor that is wrong.

    `module` is the class that all modules of the API have in common.
    """
    for name in arguments.keys() & _CHECKS.keys():
        _CHECKS[name](name, arguments[name])
    if "num_features" in arguments and "norm" not in arguments:
        as_integer("num_features", arguments["num_features"])  # one axis, as in Flax
    layer = arguments.get("layer_instance")
    if "layer_instance" in arguments and not isinstance(layer, module):
        raise TypeError(
            f"layer_instance must be a layer, made of a subclass of {module.__module__}"
            f".Module, got {shown(layer)}"
        )


# The settings that a class of Flax's name has as attributes of the same name.
_ALL = ("epsilon", "axis_name", "axis_index_groups")
_OF_ROWS = (*_ALL, "reduction_axes", "feature_axes", "implementation")
_ATTRIBUTES: dict[type[Norm], tuple[str, ...]] = {
    BatchNorm: (*_ALL, "momentum", "unbiased", "axis", "activation"),
    LayerNorm: _OF_ROWS,
    RMSNorm: _OF_ROWS,
    GroupNorm: (
        *(*_ALL, "num_groups", "group_size", "reduction_axes"),
        *("activation", "implementation"),
    ),
    InstanceNorm: (*_ALL, "activation", "implementation"),
}


def settings(kind: type[Norm], module: Any, **others: Any) -> Norm:
    """The settings value of `kind` that `module` stands for; `others` come first."""
    return kind(**({k: getattr(module, k) for k in _ATTRIBUTES[kind]} | others))


def refuse(problem: str) -> None:
    """What a generic module does about a variance of single values."""
    raise ValueError(problem)


def warn(problem: str) -> None:
    """What a class of Flax's name does: Flax takes such inputs, in shape probes say."""
    warnings.warn(problem, stacklevel=2)


class Call(NamedTuple):
    """What a module passes to the norm, and whether it writes the statistics back."""

    x: Array
    stats: dict[str, Array]
    dtype: jnp.dtype
    updates: bool


def prepared(
    norm: Norm,
    x: ArrayLike,
    params: Mapping[str, Array],
    stats: Mapping[str, Array],
    inputs: Mapping[str, Any],
    *,
    flag: bool | Array,
    dtype: DTypeLike | None,
    on_single_values: Callable[[str], None],
) -> Call:
    """A call of `norm` with Flax's output dtype: `dtype`, or that of all inputs."""
    given = jnp.asarray(x).dtype
    x = as_floating(x)
    means = (v for v in stats.values() if jnp.iscomplexobj(v))
    dtypes = (given, *(v.dtype for v in (*params.values(), *means)))
    dtype = promote(*dtypes) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = promote(dtype, jnp.float32)
    norm.check_call(x, params, inputs)
    by_batch, updates = use(stats, flag)
    problem = norm.single_value_problem(x.shape, by_batch)
    if problem:
        on_single_values(problem)
    x = widened(x, dtype)
    stats = dict(stats) if flag is True else _with_room(norm, stats, x)
    return Call(x, stats, dtype, updates)


def stats_dtype(*dtypes: DTypeLike | None) -> jnp.dtype:
    """What statistics begin in: Flax's float32, or complex if one of `dtypes` is."""
    wide = promote(*(jnp.float32 if d is None else d for d in dtypes))
    return wide if jnp.issubdtype(wide, jnp.complexfloating) else jnp.dtype("float32")


def _with_room(norm: Norm, stats: Mapping[str, Array], x: Array) -> dict[str, Array]:
    """`stats` whose means are complex if `x` is, so that they can follow it.

    As Flax's become in Linen at the first step: a layer is made, or a checkpoint
    written, before the layer is known to read complex numbers.
    """
    if not jnp.iscomplexobj(x):
        return dict(stats)
    features = norm.axes(x.shape).feature_shape
    like = jax.eval_shape(lambda: norm.init_stats(features, x.dtype))
    means = {k for k, v in like.items() if jnp.iscomplexobj(v)}
    means |= {"batch_mean", "batch_residue"}
    return {
        k: v.astype(promote(v.dtype, jnp.complex64)) if k in means else v
        for k, v in stats.items()
    }


def scale_shape(module: Any, kernel: Array) -> tuple[int, ...]:
    """The shape of the scale of `kernel` in a wrapper that normalizes it."""
    return features(kernel.shape, module.feature_axes).feature_shape


def weight_normed(module: Any, kernel: Array, scale: Array | None) -> Array:
    """`kernel` as the layer in a WeightNorm computes with it."""
    kernel = _promoted(kernel, scale)
    kernel = weight_norm(
        kernel, scale, feature_axes=module.feature_axes, epsilon=module.epsilon
    )
    return kernel.astype(module.dtype or kernel.dtype)


def weight_standardized(module: Any, kernel: Array, scale: Array | None) -> Array:
    """`kernel` as the layer in a WeightStandardization computes with it."""
    kernel = _promoted(kernel, scale)
    kernel = weight_standardize(
        kernel,
        scale,
        feature_axes=module.feature_axes,
        epsilon=module.epsilon,
        scaled=module.scaled,
    )
    return kernel.astype(module.dtype or kernel.dtype)


def has_spectrum(module: Any, kernel: Array) -> bool:
    """Whether a SpectralNorm normalizes `kernel`; raises where it is set to."""
    if module.error_on_non_matrix and kernel.ndim > 2:
        raise ValueError(
            f"error_on_non_matrix is set, and a kernel of shape {kernel.shape} is no "
            "matrix: leave it False to flatten all axes but the last into one"
        )
    return kernel.ndim >= 2 and module.n_steps >= 1


def spectral_normed(
    module: Any, kernel: Array, u: Array, sigma: Array
) -> tuple[Array, Array, Array]:
    """`kernel` as the layer in a SpectralNorm computes with it, and u and sigma."""
    kernel, new_u, new_sigma = spectral_norm(
        _promoted(kernel, u, sigma), u, n_steps=module.n_steps, epsilon=module.epsilon
    )
    kernel = kernel.astype(module.dtype or kernel.dtype)
    return kernel, new_u, new_sigma.astype(sigma.dtype)


def _promoted(kernel: Array, *others: Array | None) -> Array:
    """`kernel` in the dtype that Flax infers from it and the other variables."""
    dtypes = (v.dtype for v in others if v is not None)
    return kernel.astype(promote(kernel.dtype, *dtypes))
