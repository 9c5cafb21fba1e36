r"""EvoNorm-S0 (Liu et al., 2020, https://arxiv.org/abs/2004.02967).

    y = \frac{x \, \mathrm{sigmoid}(v x)}{\sqrt{\sigma_g^2 + \epsilon}} \gamma + \beta

Statistics over: space and a group of features, for each example.
Take it for: convolutional networks with batches of any size, in place of the norm and
    the activation.
Not for: layers with another activation after it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import check_no_count
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding
from jaxnorm._standardize import affine, as_param, pointwise
from jaxnorm._stateless import StatelessNorm


class EvoNormS0(StatelessNorm):
    """Normalization and activation in one: a swish divided by the deviation of each
    group of features of each example; the mean is not subtracted.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        num_groups: number of groups of consecutive features, or None.
        group_size: number of features in each, or None; one of the two is given.
        axis: the feature axis or axes.
    """

    real_only = True
    param_names = ("scale", "bias", "slope")
    epsilon: float = 1e-5
    num_groups: int | None = 32
    group_size: int | None = None
    axis: int = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.groups(
            shape,
            self.axis,
            num_groups=self.num_groups,
            group_size=self.group_size,
        )

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale and for the slope of the swish, zeros for the bias."""
        return super().init_params(feature_shape, dtype) | {
            "slope": jnp.ones(feature_shape, dtype)
        }

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
        affines = [
            as_param(k, params.get(k), axes, m.var.dtype) for k in self.param_names
        ]

        def swish(
            x: Array,
            rstd: Array,
            scale: Array | None,
            bias: Array | None,
            slope: Array | None,
        ) -> Array:
            gate = jax.nn.sigmoid(x if slope is None else slope * x)
            return affine(x * gate * rstd, scale, bias)

        rstd = m.rstd(self.epsilon)
        return pointwise(swish, x, axes, rstd, *affines, mask=mask, dtype=dtype)


def evo_norm_s0(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    slope: ArrayLike | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Divides a swish of `x` by the deviation of each group of features per example.

        g = x.reshape(batch, -1, num_groups, features // num_groups)
        std = sqrt(g.var((1, 3), keepdims=True) + epsilon)
        y = (g * sigmoid(slope * g) / std).reshape(x.shape) * scale + bias

    It takes the place of a normalization and the activation after it.

    Args:
        slope: of the shape of the features; None is 1.

    All else is as in `jaxnorm.group_norm`.

    Source: Liu, Brock, Simonyan and Le, 2020.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 3.0, -10.0, -30.0]])
    >>> print(jaxnorm.evo_norm_s0(x, num_groups=2).round(3))
    [[ 0.731  2.858 -0.    -0.   ]]
    """
    check_no_count("scale", scale, "num_groups")
    norm = EvoNormS0(
        num_groups=num_groups,
        group_size=group_size,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias, "slope": slope}
    return norm(x, params, {}, mask=mask)[0]
