r"""Layer normalization (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450).

    y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

Statistics over: `reduction_axes`, the last by default.
Take it for: transformers and recurrent networks, with batches and sequences of any
    size.
Not for: images, unless `reduction_axes` are all axes but the first: by default each
    position is normalized by itself.
"""

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from jaxnorm._stateless import ReductionNorm


class LayerNorm(ReductionNorm):
    """Normalizes each example by its statistics over `reduction_axes`.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too; "xla" for XLA's formula.
        reduction_axes: the axes that share a mean and a variance.
        feature_axes: the axes that parameters vary along.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
    """


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    zero_centered_scale: bool = False,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: str | None = None,
) -> Any:
    """Normalizes `x` by its mean and variance over `reduction_axes`.

        mean = x.mean(reduction_axes, keepdims=True)
        var = x.var(reduction_axes, keepdims=True)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        x: array of numbers; integers are read as float32.
        scale, bias: of the shape of `feature_axes`, or (batch, *features) for one per
            example; None is 1 and 0.
        reduction_axes: the axes that share a mean and a variance.
        feature_axes: the axes that scale and bias vary along.
        epsilon: added to the variance.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
        residual: array of the shape of x, or 0, added to x before the norm: the sum is
            returned, too, for what else reads it, whose gradient kernels for GPUs add
            to the norm's.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices `x` is split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too, of the gradient; "xla" for
            XLA's formula everywhere.

    Returns:
        y, of the shape and dtype of x; with a residual, (x + residual, y). Moments are
        taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit, and where each variance would be that of one single value.

    Source: Ba, Kiros and Hinton, 2016.

    >>> import jax.numpy as jnp, jaxnorm
    >>> print(jaxnorm.layer_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3))
    [[-1.  1.]
     [-1.  1.]]
    """
    norm = LayerNorm(
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=epsilon,
        zero_centered_scale=zero_centered_scale,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    return norm(x, {"scale": scale, "bias": bias}, {}, mask=mask, residual=residual)[0]
