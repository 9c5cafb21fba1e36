r"""Group normalization (Wu and He, 2018, https://arxiv.org/abs/1803.08494).

    y = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} \gamma + \beta

Statistics over: space and a group of features, for each example.
Take it for: convolutional networks with fewer than 16 examples for each statistic.
Not for: inference at no cost: it cannot be folded into the layer before it, as batch
    norm can.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import check_no_count
from jaxnorm._axes import Axes, Shape
from jaxnorm._stateless import ActivatedKernelNorm


class GroupNorm(ActivatedKernelNorm):
    """Normalizes each example over space and within each group of features.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too; "xla" for XLA's formula.
        activation: applied to the result, such as "relu".
        num_groups: number of groups of consecutive features, or None.
        group_size: number of features in each, or None; one of the two is given.
        axis: the feature axis.
        reduction_axes: the axes to reduce, `axis` among them; all but the first by
            default.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    axis: int = -1
    reduction_axes: int | Sequence[int] | None = None

    def axes(self, shape: Shape) -> Axes:
        return Axes.groups(
            shape,
            self.axis,
            num_groups=self.num_groups,
            group_size=self.group_size,
            reduction_axes=self.reduction_axes,
        )


def group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int | None = 32,
    group_size: int | None = None,
    axis: int = -1,
    reduction_axes: int | Sequence[int] | None = None,
    epsilon: float = 1e-6,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: str | None = None,
) -> Array:
    """Normalizes each example of `x` over space and within each group of features.

        g = x.reshape(batch, -1, num_groups, features // num_groups)
        mean, var = g.mean((1, 3), keepdims=True), g.var((1, 3), keepdims=True)
        y = ((g - mean) / sqrt(var + epsilon)).reshape(x.shape) * scale + bias

    Args:
        x: array of numbers, (batch, ..., features) by default; integers are read as
            float32.
        scale, bias: (features,), or (batch, features); None is 1 and 0.
        num_groups, group_size: the number of groups of consecutive features, or the
            features in each; exactly one is not None, and divides the features.
        axis: the feature axis.
        reduction_axes: the axes to reduce, `axis` among them; all but the first by
            default.
        epsilon: added to the variance.
        activation: applied to y: "relu", "leaky_relu", "elu", "gelu", "silu",
            "sigmoid" or "tanh"; "relu" in one rule with the norm.
        residual: array of the shape of x, added to y before the activation.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices `x` is split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too, of the gradient with "relu"
            or "silu"; "xla" for XLA's formula everywhere.

    Returns:
        y, of the shape and dtype of x; moments are taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit, and where each variance would be that of one single value.

    Source: Wu and He, 2018.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
    >>> print(jaxnorm.group_norm(x, num_groups=2).round(3))
    [[-1.  1. -1.  1.]]
    """
    check_no_count("scale", scale, "num_groups")
    norm = GroupNorm(
        num_groups=num_groups,
        group_size=group_size,
        axis=axis,
        reduction_axes=reduction_axes,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, {}, mask=mask, residual=residual)[0]
