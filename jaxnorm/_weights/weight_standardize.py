r"""Weight standardization (Qiao et al., 2019, https://arxiv.org/abs/1903.10520).

    W' = \frac{W - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma

Statistics over: the fan-in of each output.
Take it for: convolutions before group norm, in place of batch norm; with `scaled=True`,
    networks without norms.
Not for: kernels with one input, whose variance is 0.

The scaled form, which divides by the root of the fan-in as well, is that of Brock et
al., 2021, https://arxiv.org/abs/2101.08692.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_bool, as_epsilon
from jaxnorm._dtypes import as_floating
from jaxnorm._normalize import normalize
from jaxnorm._weights._arguments import features, per_feature, rescaled


def weight_standardize(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    feature_axes: int | Sequence[int] | None = -1,
    epsilon: float = 1e-6,
    scaled: bool = False,
) -> Array:
    """Gives the weights of each output of a layer mean 0 and variance 1.

        axes = all axes of the kernel but feature_axes
        mean = kernel.mean(axes, keepdims=True)
        var = kernel.var(axes, keepdims=True)
        w = (kernel - mean) / sqrt(var + epsilon) * scale
        w = w / sqrt(fan_in)  # if scaled

    where the fan-in is the number of weights with one mean. The variance is biased.
    Where the fan-in is 1, everything is 0, as for any constant kernel.

    Args:
        kernel: array of numbers; integers are read as float32.
        scale: a scalar, or of the shape of `feature_axes`; None is 1.
        feature_axes: each index along these, which are those of the outputs, has a
            mean and a variance of its own; None gives the whole kernel one.
        epsilon: added to the variance.
        scaled: divide by the square root of the fan-in, so that a layer keeps the
            variance of inputs of mean 0 (Brock et al., 2021; theirs has a gain).

    Returns:
        w, of the shape and dtype of the kernel, computed in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes, shapes or dtypes that do not
            fit, a negative epsilon, and a kernel with no axis beside `feature_axes`.

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
    split = features(kernel.shape, feature_axes)
    if not split.reduce:
        raise ValueError(
            f"a kernel of shape {kernel.shape} has no axis beside feature_axes="
            f"{feature_axes} that leads into an output: name fewer, or leave biases "
            "and scales as they are"
        )
    scale = per_feature("scale", scale, split, kernel)
    if scaled:
        scale = rescaled(scale, split, kernel)
    return normalize(kernel, {"scale": scale}, split, epsilon=epsilon)[0]
