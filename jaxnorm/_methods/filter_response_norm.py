r"""Filter response norm (Singh and Krishnan, 2019, https://arxiv.org/abs/1911.09737).

    y = \max\left(\frac{x}{\sqrt{\nu + \epsilon}} \gamma + \beta, \tau\right)
    \nu = \frac{1}{n} \sum x^2

Statistics over: space, for each example and feature; no mean is subtracted.
Take it for: convolutional networks with batches of any size, in place of the norm and
    the activation.
Not for: inputs with one position, of which the sign is left, unless `learn_epsilon` is
    set.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding
from jaxnorm._standardize import affine, as_param, pointwise
from jaxnorm._stateless import StatelessNorm


class FilterResponseNorm(StatelessNorm):
    """Divides each feature of each example by its root mean square over space, then
    takes the larger of the result and a learned threshold.

    With `learn_epsilon`, the magnitude of a learned parameter is added to `epsilon`, as
    the paper advises where there is a single position. `use_threshold=False` leaves the
    threshold, and so the nonlinearity, out.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        axis: the feature axis or axes.
        use_threshold: have the parameter threshold.
        learn_epsilon: have the parameter extra_epsilon.
    """

    real_only = True
    param_names = ("scale", "bias", "threshold", "extra_epsilon")
    center = False
    axis: int | Sequence[int] = -1
    use_threshold: bool = True
    learn_epsilon: bool = False

    def axes(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """As usual; a threshold of 0, and 1e-4 to add to epsilon."""
        fill = {"scale": 1.0, "bias": 0.0}
        fill |= {"threshold": 0.0} if self.use_threshold else {}
        fill |= {"extra_epsilon": 1e-4} if self.learn_epsilon else {}
        return {k: jnp.full(feature_shape, v, dtype) for k, v in fill.items()}

    @one_rounding
    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        m = self.batch_moments(x, mask)
        scale, bias, threshold, extra = (
            as_param(k, params.get(k), axes, m.var.dtype) for k in self.param_names
        )
        epsilon = self.epsilon if extra is None else self.epsilon + jnp.abs(extra)

        def respond(
            x: Array,
            rstd: Array,
            scale: Array | None,
            bias: Array | None,
            threshold: Array | None,
        ) -> Array:
            y = affine(x * rstd, scale, bias)
            return y if threshold is None else jnp.maximum(y, threshold)

        arrays = (m.rstd(epsilon), scale, bias, threshold)
        return pointwise(respond, x, axes, *arrays, mask=mask, dtype=dtype)


def filter_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    extra_epsilon: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Divides each feature of each example by its root mean square over space.

        square = (x**2).mean(space, keepdims=True)
        y = x / sqrt(square + epsilon + abs(extra_epsilon)) * scale + bias
        y = maximum(y, threshold)

    Args:
        threshold: of the shape of the features; None takes no maximum.
        extra_epsilon: of the shape of the features; None is 0.

    All else is as in `jaxnorm.instance_norm`.

    Source: Singh and Krishnan, 2019.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[[3.0], [-3.0]]])
    >>> print(jaxnorm.filter_response_norm(x, threshold=jnp.zeros(1)).round(3).ravel())
    [1. 0.]
    """
    norm = FilterResponseNorm(
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias}
    params |= {"threshold": threshold, "extra_epsilon": extra_epsilon}
    return norm(x, params, {}, mask=mask)[0]
