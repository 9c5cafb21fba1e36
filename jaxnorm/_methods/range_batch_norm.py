r"""Range batch normalization (Banner et al., 2018, https://arxiv.org/abs/1805.11046).

    y = \frac{x - \mu}{\sqrt{d^2 + \epsilon}} \gamma + \beta
    d = \frac{\max x - \min x}{\sqrt{2 \ln n}}

Statistics over: all axes but the features.
Take it for: training in 8 bits, for which the paper made it: a range does not overflow
    as a sum of squares does.
Not for: data with outliers, which alone set the range, and many devices: it takes two
    collectives in each direction.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments
from jaxnorm._reduce import moments
from jaxnorm._stateful import RunningNorm
from jaxnorm._working import as_mask, mask_to_working, to_working


class RangeBatchNorm(RunningNorm):
    """Batch norm by the range of the values in the place of their deviation.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
    """

    real_only = True
    keeps_moments = False
    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    @one_rounding
    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, Moments]:
        axes = self.axes(x.shape)
        own = moments(x, axes, mask=mask)
        m = self.sync(own)
        size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape).astype(m.var.dtype)
        low, high = self._extremes(x, mask, own.size, axes)
        # What normal numbers reach above the mean, in standard deviations.
        span = jnp.sqrt(2 * jnp.log(jnp.maximum(size, 2)))
        var = jnp.square((high - low) / span)
        m = m._replace(var=var)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype), m

    def _extremes(
        self, x: Array, mask: ArrayLike | None, size: Any, axes: Axes
    ) -> tuple[Array, Array]:
        """The least and the largest valid value, on all devices; 0 of nothing."""
        both = _negated_least_and_largest(x, as_mask(mask, x.shape), axes)
        some = jnp.broadcast_to(jnp.asarray(size) > 0, both.shape[1:])
        each = jnp.concatenate([both, some[None].astype(both.dtype)])
        each = devices.gather(each, self.peers())
        valid = each[:, 2:] > 0
        most = jnp.where(valid, each[:, :2], -jnp.inf).max(0)
        most = jnp.where(valid.any(0), most, 0)
        return -most[0], most[1]


def _negated_least_and_largest(x: Array, mask: Array | None, axes: Axes) -> Array:
    """Stacked; of x's size only `x` itself is kept for the backward pass."""

    def extremes(x: Array) -> Array:
        x = to_working(x, mask, axes)
        valid = mask_to_working(jnp.asarray(True) if mask is None else mask, axes)
        options = {"axis": axes.reduce, "keepdims": True, "where": valid}
        least = jnp.min(x, initial=jnp.inf, **options)
        largest = jnp.max(x, initial=-jnp.inf, **options)
        some = jnp.any(valid, axes.reduce, keepdims=True)
        return jnp.where(some, jnp.stack([-least, largest]), 0)

    return jax.checkpoint(extremes, prevent_cse=False)(x)


def range_batch_norm(
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
    """Normalizes each feature of `x` by its mean and the range of its n values.

        deviation = (x.max(other_axes) - x.min(other_axes)) / sqrt(2 * log(n))
        y = (x - mean) / sqrt(deviation**2 + epsilon) * scale + bias

    For normal numbers the deviation is about two standard ones, so that y is half of
    what batch norm gives. `stats["var"]` follows its square, so that evaluation is that
    of batch norm. Over devices it takes two collectives each way.

    All else is as in `jaxnorm.batch_norm`.

    Source: Banner, Hubara, Hoffer and Soudry, 2018.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, _ = jaxnorm.range_batch_norm(
    ...     x, jaxnorm.init_stats(1), use_running_average=False
    ... )
    >>> print(np.asarray(y).round(3).ravel())
    [-0.589  0.589]
    """
    norm = RangeBatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
