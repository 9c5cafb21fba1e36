r"""Batch normalization (Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167).

    y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

Statistics over: all axes but the features; running averages of these in evaluation.
Take it for: convolutional and dense networks in which each statistic is of 16 examples
    or more, counted over all devices if `axis_name` pools them.
Not for: smaller batches (group norm), recurrent networks (recurrent batch norm, layer
    norm), examples that come one by one (online norm).
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._activation import add_and_activate
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import ActivatedNorm, Params, Stats
from jaxnorm._moments import Moments
from jaxnorm._stateful import RunningNorm
from jaxnorm._working import as_mask


class BatchNorm(ActivatedNorm, RunningNorm):
    """Normalizes each feature by its statistics over the batch and over space.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        activation: applied to the result, such as "relu".
        axis: the feature axis or axes.
    """

    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        residual: ArrayLike | None = None,
    ) -> tuple[Array, Moments]:
        what_follows = {"activation": self.activation, "residual": residual}
        how = {"mask": mask, "dtype": dtype, **what_follows}
        return self.normalize_by_batch(x, params, **how)

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        residual: ArrayLike | None = None,
    ) -> Array:
        y = super().evaluate(x, params, stats, mask=mask, dtype=dtype)
        return add_and_activate(y, self.activation, residual, as_mask(mask, x.shape))


def batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Normalizes each feature of `x` by its mean and variance over all other axes.

        mean, var = x.mean(other_axes), x.var(other_axes)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias
        stats = {"mean": momentum * stats["mean"] + (1 - momentum) * mean,
                 "var": momentum * stats["var"] + (1 - momentum) * var}

    With `use_running_average=True`, `stats` take the place of mean and var, and are
    returned as they are; it may be a traced boolean.

    Args:
        x: floating point array, (batch, ..., features) by default; integers are read
            as float32, complex numbers need `init_stats(..., dtype=complex64)`.
        stats: {"mean", "var"}, each of the shape of the features, from `init_stats`.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        use_running_average: normalize by `stats` instead of the batch's own moments.
        axis: the feature axis or axes.
        momentum: weight of the old statistics; None for the average of all batches.
        epsilon: added to the variance.
        activation: applied to y: "relu", "leaky_relu", "elu", "gelu", "silu",
            "sigmoid" or "tanh"; "relu" in one rule with the norm.
        residual: array of the shape of x, added to y before the activation.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        unbiased: keep `var * n / (n - 1)` in stats, as PyTorch does.

    Returns:
        y, of the shape and dtype of x, and the new stats, of their own dtypes. Moments
        are taken in at least float32. A batch with a mean or variance that is not
        finite leaves `stats` as they were; so does a feature with no two valid values.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit, and for a batch of one single value per feature.

    Source: Ioffe and Szegedy, 2015.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> stats = jaxnorm.init_stats(2)
    >>> y, stats = jaxnorm.batch_norm(x, stats, use_running_average=False, momentum=0.5)
    >>> print(y.round(3).tolist(), stats["mean"].tolist(), stats["var"].tolist())
    [[-1.0, -1.0], [1.0, 1.0]] [1.0, 10.0] [1.0, 50.5]
    """
    norm = BatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        activation=activation,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    flag = use_running_average
    return norm(
        x, params, stats, use_running_average=flag, mask=mask, residual=residual
    )
