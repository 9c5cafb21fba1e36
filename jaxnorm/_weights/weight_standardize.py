"""Weight standardization (Qiao et al., 2019, https://arxiv.org/abs/1903.10520)."""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_bool, as_epsilon
from jaxnorm._axes import Axes, canonicalize
from jaxnorm._dtypes import as_floating
from jaxnorm._normalize import normalize
from jaxnorm._weights._arguments import per_feature, rescaled


def weight_standardize(
    kernel: ArrayLike,
    axes: int | Sequence[int] | None = None,
    epsilon: float = 1e-6,
    gain: ArrayLike | None = None,
    *,
    scaled: bool = False,
) -> Array:
    """Gives the weights of each output of a layer mean 0 and variance 1.

        mean = kernel.mean(axes, keepdims=True)
        var = kernel.var(axes, keepdims=True)
        w = (kernel - mean) / sqrt(var + epsilon) * gain
        w = w / sqrt(fan_in)  # if scaled

    where the fan-in is the number of elements along `axes`. The variance is biased.
    Where the fan-in is 1, everything is 0, as for any constant kernel.

    Args:
        kernel: array of numbers; integers are read as float32.
        axes: those that lead into one output, all but the last by default.
        epsilon: added to the variance.
        gain: a scalar, or of the shape of the other axes; None is 1.
        scaled: divide by the square root of the fan-in, so that a layer keeps the
            variance of inputs of mean 0 (Brock et al., 2021; theirs has a gain).

    Returns:
        w, of the shape and dtype of the kernel, computed in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes, shapes or dtypes that do not
            fit, a negative epsilon, and a kernel of less than two axes if none are
            named.

    Source: Qiao et al., 2019; Brock et al., 2021, https://arxiv.org/abs/2101.08692.

    >>> import jax.numpy as jnp, jaxnorm
    >>> kernel = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> print(jaxnorm.weight_standardize(kernel).round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(jaxnorm.weight_standardize(kernel, scaled=True).round(3))
    [[-0.707 -0.707]
     [ 0.707  0.707]]
    """
    kernel, epsilon = as_floating(kernel, "kernel"), as_epsilon("epsilon", epsilon)
    scaled = as_bool("scaled", scaled)
    if axes is None:
        if kernel.ndim < 2:
            raise ValueError(
                f"a kernel of shape {kernel.shape} has no axes that lead into an "
                "output: name them with axes, or leave biases and scales as they are"
            )
        axes = range(kernel.ndim - 1)
    fan_in = canonicalize(axes, kernel.ndim, "axes")
    split = Axes.keep(kernel.shape, [a for a in range(kernel.ndim) if a not in fan_in])
    scale = per_feature("gain", gain, split, kernel)
    if scaled:
        scale = rescaled(scale, split, kernel)
    return normalize(kernel, {"scale": scale}, split, epsilon=epsilon)[0]
