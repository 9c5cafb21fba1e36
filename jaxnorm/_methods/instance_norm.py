r"""Instance normalization (Ulyanov et al., 2016, https://arxiv.org/abs/1607.08022).

    y = \frac{x - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}} \gamma + \beta

Statistics over: space, for each example and feature.
Take it for: images and signals whose contrast and mean should not matter, as in style
    transfer.
Not for: tasks whose answer lies in contrast or mean, and inputs with one position, of
    which it leaves nothing.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._stateless import ActivatedKernelNorm


class InstanceNorm(ActivatedKernelNorm):
    """Normalizes each feature of each example by its statistics over space.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too; "xla" for XLA's formula.
        activation: applied to the result, such as "relu".
        axis: the feature axis or axes.
    """

    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: str | None = None,
) -> Array:
    """Normalizes each feature of each example of `x` over the remaining axes.

        mean, var = x.mean(space, keepdims=True), x.var(space, keepdims=True)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of numbers, (batch, ..., features) by default; integers are read as
            float32.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        axis: the feature axis or axes; not the leading one.
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

    Source: Ulyanov, Vedaldi and Lempitsky, 2016.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
    >>> print(jaxnorm.instance_norm(x).round(3))
    [[[-1. -1.]
      [ 1.  1.]]]
    """
    norm = InstanceNorm(
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, {}, mask=mask, residual=residual)[0]
