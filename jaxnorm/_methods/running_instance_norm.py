r"""Running instance norm (Ulyanov et al., 2016, https://arxiv.org/abs/1607.08022).

    y = \frac{x - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}} \gamma + \beta

Statistics over: space, for each example and feature; in evaluation a running average,
    which alone is pooled over devices.
Take it for: models that come from PyTorch's InstanceNorm with
    `track_running_stats=True`.
Not for: new models: what normalizes them in evaluation is not what they were trained
    with.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._marks import BATCH
from jaxnorm._moments import Moments, pool
from jaxnorm._normalize import normalize
from jaxnorm._stateful import RunningNorm


class RunningInstanceNorm(RunningNorm):
    """Instance norm at training; at evaluation, batch norm by the average of the
    statistics of the instances. `axis_name` pools the running statistics only.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, to pool the running statistics over.
        axis_index_groups: groups of indices along `axis_name` that share these.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
    """

    keeps_moments = False
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
    ) -> tuple[Array, Moments]:
        instances = Axes.per_example(x.shape, self.axis)
        y, m = normalize(
            x, params, instances, epsilon=self.epsilon, mask=mask, dtype=dtype
        )
        return y, self._averaged(m, gathers=BATCH[0] in stats)

    def single_value_problem(self, shape: Shape, by_batch: bool) -> str | None:
        if Axes.per_example(shape, self.axis).size == 1 and by_batch:
            return (
                f"RunningInstanceNorm over an input of shape {shape} would take each "
                "variance of one single position, so that everything becomes 0: give "
                "it more positions, or pass use_running_average=True"
            )
        return None

    def _averaged(self, m: Moments, gathers: bool) -> Moments:
        """The mean over all positions of the mean, the variance and the reciprocal of
        the size of the instance they belong to.

        Where batches are gathered, the size is the number of positions, by which these
        weigh, and the variance is the unbiased one already, if that is kept.
        """
        size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)
        share = 1 / jnp.maximum(size, 1).astype(m.var.dtype)
        each = jnp.stack([v.astype(m.mean.dtype) for v in (m.mean, m.var, share)])
        spread = jnp.zeros(each.shape, m.var.dtype)
        sets = Moments(each, spread, jnp.broadcast_to(size, each.shape))
        pooled = pool(sets, lambda v: v.sum(1, keepdims=True))
        pooled = self.sync(pooled)
        mean, var, share = pooled.mean[:, 0]
        var, share, positions = var.real, share.real, pooled.size[0, 0]
        if gathers:
            lost = jnp.where(share < 1, share, 0) if self.unbiased else 0
            return Moments(mean, var / (1 - lost), positions)
        some = positions > 0
        return Moments(mean, var, jnp.where(some, 1 / jnp.where(some, share, 1), 0))


def running_instance_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Instance norm that keeps running statistics and evaluates with them.

        mean, var = x.mean(space, keepdims=True), x.var(space, keepdims=True)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias
        stats = {"mean": momentum * stats["mean"] + (1 - momentum) * mean.mean(batch),
                 "var": momentum * stats["var"] + (1 - momentum) * var.mean(batch)}

    With `use_running_average=True`, `stats` take the place of mean and var. It is
    PyTorch's InstanceNorm with track_running_stats, given `unbiased=True` and 1 -
    momentum. Instances count by their valid positions in the average; `unbiased` is the
    pooled estimate, `sum(n * var) / sum(n - 1)`, also where these differ.

    Args:
        axis_name: mapped axis, or several, to pool the running statistics over.

    All else is as in `jaxnorm.batch_norm`.

    Source: Ulyanov, Vedaldi and Lempitsky, 2016; running statistics as in PyTorch.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
    >>> y, stats = jaxnorm.running_instance_norm(
    ...     x, jaxnorm.init_stats(1), use_running_average=False, momentum=0.0
    ... )
    >>> print(np.asarray(y).round(3).ravel(), stats["mean"])
    [-1.  1. -1.  1.] [11.]
    """
    norm = RunningInstanceNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
