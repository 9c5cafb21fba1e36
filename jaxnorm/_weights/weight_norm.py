r"""Weight normalization (Salimans and Kingma, 2016, https://arxiv.org/abs/1602.07868).

    W' = \frac{W}{\sqrt{\sum W^2 + \epsilon}} \gamma

Statistics over: the fan-in of each output.
Take it for: recurrent and generative networks, where statistics of a batch are noise.
Not for: layers before a norm, which takes their scale out again.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_epsilon
from jaxnorm._dtypes import as_floating
from jaxnorm._normalize import normalize
from jaxnorm._weights._arguments import features, per_feature, rescaled


def weight_norm(
    kernel: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    feature_axes: int | Sequence[int] | None = -1,
    epsilon: float = 1e-12,
) -> Array:
    """Gives the weights of each feature the length `scale`, and keeps their direction.

        axes = all axes of the kernel but feature_axes
        w = kernel / sqrt((abs(kernel) ** 2).sum(axes, keepdims=True) + epsilon) * scale

    Args:
        kernel: array of numbers; integers are read as float32.
        scale: a scalar, or of the shape of `feature_axes`; None is 1.
        feature_axes: each index along these has a length of its own; None gives the
            whole kernel one.
        epsilon: added to the squared length, so that weights of 0 stay 0 and have
            finite gradients.

    Returns:
        w, of the shape and dtype of the kernel, computed in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes, shapes or dtypes that do not
            fit, and a negative epsilon.

    Source: Salimans and Kingma, 2016.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> kernel = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> w = jaxnorm.weight_norm(kernel, jnp.array([10.0, 2.0]))
    >>> print(np.asarray(w).round(3))
    [[6. 2.]
     [8. 0.]]
    """
    kernel, epsilon = as_floating(kernel, "kernel"), as_epsilon("epsilon", epsilon)
    split = features(kernel.shape, feature_axes)
    # The length is the root mean square, times the root of the number of weights.
    scale = per_feature("scale", scale, split, kernel)
    params = {"scale": rescaled(scale, split, kernel)}
    epsilon = epsilon / max(split.size, 1)
    return normalize(kernel, params, split, epsilon=epsilon, center=False)[0]
