"""How does the last layer of a model follow the moments of its targets?"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxnorm._arguments import as_array, check_instance
from jaxnorm._dtypes import promote
from jaxnorm._standardizer import Standardizer
from jaxnorm._working import aligned


def pop_art(
    kernel: ArrayLike, bias: ArrayLike, old: Standardizer, new: Standardizer
) -> tuple[Array, Array]:
    """Kernel and bias of a last layer that predict the same in original units, though
    the moments of the targets have changed (PopArt).

        kernel = kernel * old.deviation / new.deviation
        bias = (bias * old.deviation + old.mean - new.mean) / new.deviation

    so that for any `h`, `new.invert(h @ kernel + bias)` is what `old.invert` was of
    the former, up to rounding. What optimizers keep of the layer is not changed.

    Args:
        kernel: (..., *features), real; the features are those of the moments.
        bias: (..., *features).
        old: moments of the targets that kernel and bias belong to;
            `Standardizer.init` for a layer that predicts them as they are.
        new: moments of the same features from now on.

    Returns:
        Kernel and bias, in their own dtypes. Those of a feature that is constant in old
        or new are left as they are: its prediction is the constant, whatever the layer
        says, and changes once, when it starts to vary. The moments get no gradient.

    Raises:
        ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.

    Source: van Hasselt, Guez, Hessel, Mnih and Silver, 2016,
    https://arxiv.org/abs/1602.07714.

    >>> import jax.numpy as jnp, jaxnorm
    >>> old = jaxnorm.Standardizer.fit(jnp.array([[0.0], [2.0]]))
    >>> new = old.update(jnp.array([[100.0], [300.0]]), decay=0.5)
    >>> kernel, bias, h = jnp.ones((2, 1)), jnp.zeros(1), jnp.array([3.0, 1.0])
    >>> print(old.invert(h @ kernel + bias))
    [5.]
    >>> kernel, bias = jaxnorm.pop_art(kernel, bias, old, new)
    >>> print(new.invert(h @ kernel + bias).round(3))
    [5.]
    """
    for name, moments in (("old", old), ("new", new)):
        check_instance(name, moments, Standardizer, "jaxnorm.Standardizer.fit")
    if old.mean.shape != new.mean.shape:
        raise ValueError(
            f"old and new must be moments of the same features, got those of shapes "
            f"{old.mean.shape} and {new.mean.shape}"
        )
    old, new = lax.stop_gradient((old, new))
    kernel = _as_layer("kernel", kernel, old.mean.shape)
    bias = _as_layer("bias", bias, old.mean.shape)
    varies = (old.deviation > 0) & (new.deviation > 0)
    ratio = jnp.where(varies, old.deviation / new.deviation, 1)
    offset = (old.mean - new.mean) + (old.residue - new.residue)
    shift = jnp.where(varies, offset / new.deviation, 0)
    return _rescaled(kernel, ratio), _rescaled(bias, ratio, shift)


def _as_layer(name: str, value: ArrayLike, features: tuple[int, ...]) -> Array:
    """`value` as an array of real numbers that ends with the axes of the features."""
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be of real floating point, got {array.dtype}")
    if array.shape[array.ndim - len(features) :] != features:
        raise ValueError(
            f"{name} of shape {array.shape} does not end with the features of the "
            f"targets, of shape {features}: transpose it, or fit the moments with "
            "the axis of the targets that the layer predicts"
        )
    return array


def _rescaled(x: Array, ratio: Array, shift: Array | None = None) -> Array:
    """`x * ratio + shift`, rounded once."""
    wide = promote(x.dtype, ratio.dtype)
    y = x.astype(wide) * aligned(ratio.astype(wide), x.shape)
    if shift is not None:
        y = y + aligned(shift.astype(wide), x.shape)
    return y.astype(x.dtype)
