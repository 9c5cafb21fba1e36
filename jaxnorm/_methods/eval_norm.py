r"""EvalNorm (Singh and Shrivastava, 2019, https://arxiv.org/abs/1904.06031).

    y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta
    \mu = (1 - w) \hat\mu + w \mu_i
    \sigma^2 = (1 - w) \hat\sigma^2 + w \sigma_i^2 + w (1 - w) (\mu_i - \hat\mu)^2

Statistics over: all axes but the features in training; in evaluation a mixture of the
    running statistics and those of the example over space.
Take it for: evaluation of networks that were trained by batch norm with small batches.
Not for: networks that were trained with large batches: the weight that fits them is
    near 0, which is batch norm.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._arguments import as_share
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import mix
from jaxnorm._reduce import moments
from jaxnorm._stateful import RunningNorm


class EvalNorm(RunningNorm):
    """Batch norm whose evaluation blends each example's own statistics with the running
    ones, as in training each example is part of its batch.

    `weight` is that of the example's own.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
        weight: of the example's own statistics, from 0 to 1.
    """

    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1
    weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        as_share("weight", self.weight)

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    @one_rounding
    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        kept = running.read(stats, axes, x.dtype)
        own = moments(x, Axes.per_example(x.shape, self.axis), mask=mask)
        # An example of which nothing is valid has no statistics to blend in.
        weight = self.weight * (jnp.asarray(own.size) > 0).astype(own.var.dtype)
        m = mix((kept, own), (1 - weight, weight))
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)


def eval_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    weight: float = 0.1,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm that blends statistics at evaluation; training is that of batch norm.

        own_mean, own_var = x.mean(space, keepdims=True), x.var(space, keepdims=True)
        mean = (1 - weight) * stats["mean"] + weight * own_mean
        var = (1 - weight) * stats["var"] + weight * own_var
        var += weight * (1 - weight) * (own_mean - stats["mean"])**2

    which are the mean and variance of a mixture of both.

    A model that was trained with small batches saw each example normalized in part by
    itself; about the reciprocal of that batch size is a good weight.

    Args:
        weight: of the example's own statistics, from 0 to 1.

    All else is as in `jaxnorm.batch_norm`.

    Source: Singh and Shrivastava, 2019; the weight is given, not learned. See also
    Summers and Dinneen, 2019, https://arxiv.org/abs/1906.03548.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[[1.0], [3.0]]])
    >>> y, _ = jaxnorm.eval_norm(
    ...     x, jaxnorm.init_stats(1), use_running_average=True, weight=0.5
    ... )
    >>> print(np.asarray(y).round(3).ravel())
    [0.    1.414]
    """
    norm = EvalNorm(
        weight=weight,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
