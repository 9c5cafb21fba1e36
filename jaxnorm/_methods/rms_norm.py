r"""Root mean square norm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

    y = \frac{x}{\sqrt{\frac{1}{n} \sum x^2 + \epsilon}} \gamma

Statistics over: `reduction_axes`, the last by default; no mean is subtracted.
Take it for: transformers; it has one sum less than layer norm, and no bias.
Not for: inputs with a large mean that says nothing: it stays, and sets the scale.
"""

from collections.abc import Sequence
from typing import Any

from jax.typing import ArrayLike

from jaxnorm._stateless import ReductionNorm


class RMSNorm(ReductionNorm):
    """Divides each example by its root mean square over `reduction_axes`.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels on CPUs, and XLA's formula elsewhere; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too; "xla" for XLA's formula.
        reduction_axes: the axes that share a mean square.
        feature_axes: the axes that the scale varies along.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
    """

    param_names = ("scale",)
    center = False


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
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
    """Divides `x` by its root mean square over `reduction_axes`; no mean is subtracted.

        y = x / sqrt((x**2).mean(reduction_axes, keepdims=True) + epsilon) * scale

    Args:
        x: array of numbers; integers are read as float32.
        scale: of the shape of `feature_axes`, or (batch, *features) for one per
            example; None is 1.
        reduction_axes: the axes that share a mean square.
        feature_axes: the axes that the scale varies along.
        epsilon: added to the mean square.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
        residual: array of the shape of x, or 0, added to x before the norm: the sum is
            returned, too, and the gradient of what reads it is added within the norm's.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices `x` is split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels on CPUs, and XLA's formula elsewhere; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too, of the gradient; "xla" for
            XLA's formula everywhere.

    Returns:
        y, of the shape and dtype of x; with a residual, (x + residual, y). The mean
        square is taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit.

    Source: Zhang and Sennrich, 2019.

    >>> import jax.numpy as jnp, jaxnorm
    >>> print(jaxnorm.rms_norm(jnp.array([[2.0, 2.0], [-30.0, 30.0]])).round(3))
    [[ 1.  1.]
     [-1.  1.]]
    """
    norm = RMSNorm(
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=epsilon,
        zero_centered_scale=zero_centered_scale,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    return norm(x, {"scale": scale}, {}, mask=mask, residual=residual)[0]
