r"""Global response norm (Woo et al., 2023, https://arxiv.org/abs/2301.00808).

    y = x + \gamma x \frac{l}{\mathrm{mean}(l) + \epsilon} + \beta
    l = \sqrt{\sum x^2}

Statistics over: space, then features, for each example.
Take it for: blocks of ConvNeXt V2, after the activation: features compete.
Not for: fixing the scale of activations, which it leaves as it is.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding
from jaxnorm._exact import overflow_as_nan
from jaxnorm._standardize import as_param, pointwise
from jaxnorm._stateless import StatelessNorm


class GlobalResponseNorm(StatelessNorm):
    """Multiplies each feature of each example by its length over space, relative to
    the mean length of its features; adds the input.

    Attributes:
        epsilon: added to the mean length.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        axis: the feature axis or axes.
    """

    center = False
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Zeros: at first the input passes unchanged."""
        return {k: jnp.zeros(feature_shape, dtype) for k in self.param_names}

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
        size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape).astype(m.var.dtype)
        length = _root(m.var * size)
        valid = (size > 0).astype(size.dtype)
        count = jnp.maximum(valid.sum(axes.feature, keepdims=True), 1)
        mean = length.sum(axes.feature, keepdims=True) / count
        relative = length / (overflow_as_nan(mean) + self.epsilon)
        scale, bias = (
            as_param(k, params.get(k), axes, m.var.dtype) for k in self.param_names
        )

        def respond(
            x: Array, relative: Array, scale: Array | None, bias: Array | None
        ) -> Array:
            y = x * (1 + (relative if scale is None else scale * relative))
            return y if bias is None else y + bias

        return pointwise(
            respond, x, axes, relative, scale, bias, mask=mask, dtype=dtype
        )


def _root(x: Array) -> Array:
    """The square root, of derivative 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def global_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Adds to `x` its features, weighted by how strongly each responds over space.

        length = sqrt((x**2).sum(space, keepdims=True))
        relative = length / (length.mean(axis, keepdims=True) + epsilon)
        y = x + scale * (x * relative) + bias

    Features with nothing valid under the mask do not count in the mean length.

    Args:
        epsilon: added to the mean length.

    All else is as in `jaxnorm.instance_norm`; scale and bias start at 0 in the modules.

    Source: Woo et al., 2023 (ConvNeXt V2).

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[[3.0, 4.0], [4.0, 3.0]]])
    >>> print(np.asarray(jaxnorm.global_response_norm(x)).round(3))
    [[[6. 8.]
      [8. 6.]]]
    """
    norm = GlobalResponseNorm(
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    return norm(x, {"scale": scale, "bias": bias}, {}, mask=mask)[0]
