"""What the functions of kernels ask of their arguments."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_array, check_real
from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._dtypes import at_least_float32, promote


def features(shape: Shape, feature_axes: int | Sequence[int] | None) -> Axes:
    """Reduces every axis of a kernel but `feature_axes`; with None, all of them."""
    axes = () if feature_axes is None else feature_axes
    return Axes.keep(shape, canonicalize(axes, len(shape), "feature_axes"))


def per_feature(
    name: str, value: ArrayLike | None, axes: Axes, kernel: Array
) -> Array | None:
    """`value` in the shape of the features; raises if it does not fit the kernel."""
    if value is None:
        return None
    value = as_array(name, value)
    check_real(name, value, kernel)
    if value.shape not in ((), axes.feature_shape):
        raise ValueError(
            f"{name} has shape {value.shape}, but the features of a kernel of shape "
            f"{axes.shape} are {axes.feature_shape} (axes {axes.feature}): pass that "
            "shape, or a scalar for all of them"
        )
    return jnp.broadcast_to(value, axes.feature_shape)


def rescaled(scale: Array | None, axes: Axes, kernel: Array) -> Array:
    """`scale`, divided by the square root of the number of weights of each feature."""
    wide = at_least_float32(kernel.dtype)
    if scale is None:
        scale = jnp.ones(axes.feature_shape, wide)
    scale = scale.astype(promote(wide, scale.dtype))
    return scale / math.sqrt(max(axes.size, 1))
