"""What the Linen and the NNX modules have in common: settings in, a call out."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.base import Norm
from jaxnorm.dtypes import as_floating, promote, widened
from jaxnorm.running import RUNNING
from jaxnorm.weights.arguments import features
from jaxnorm.weights.spectral_norm import spectral_norm
from jaxnorm.weights.weight_norm import weight_norm
from jaxnorm.weights.weight_standardize import weight_standardize


def settings(kind: type[Norm], module: Any, **others: Any) -> Norm:
    """The settings value of `kind`, from the attributes that `module` names alike."""
    names = [f.name for f in dataclasses.fields(kind) if hasattr(module, f.name)]
    return kind(**({k: getattr(module, k) for k in names} | others))


def refuse(problem: str) -> None:
    """What a generic module does about a variance of single values."""
    raise ValueError(problem)


def warn(problem: str) -> None:
    """What a class of Flax's name does: Flax takes such inputs, in shape probes say."""
    warnings.warn(problem, stacklevel=2)


def run(
    norm: Norm,
    x: ArrayLike,
    params: Mapping[str, Array],
    stats: Mapping[str, Array],
    *,
    flag: bool | Array,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    on_lone_values: Callable[[str], None],
    inputs: Mapping[str, Any],
) -> tuple[Array, dict[str, Array]]:
    """Applies `norm` with Flax's output dtype: `dtype`, or that of all inputs."""
    given = jnp.asarray(x).dtype
    x = as_floating(x)
    dtypes = (given, *(p.dtype for p in params.values()))
    dtype = promote(*dtypes) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = promote(dtype, jnp.float32)
    norm.check_call(x, params, inputs)
    problem = norm.lone_values(x.shape, RUNNING in stats or flag)
    if problem:
        on_lone_values(problem)
    x = widened(x, dtype)
    return norm.apply(
        x, params, stats, use_running_average=flag, mask=mask, dtype=dtype, **inputs
    )


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
    axes = features(kernel.shape, module.feature_axes).reduce
    kernel = weight_standardize(
        kernel, axes, module.epsilon, scale, scaled=module.scaled
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
