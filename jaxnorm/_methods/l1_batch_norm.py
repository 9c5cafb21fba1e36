r"""L1 batch normalization (Wu et al., 2018, https://arxiv.org/abs/1802.09769).

    y = \frac{x - \mu}{\sqrt{d^2 + \epsilon}} \gamma + \beta
    d = \sqrt{\frac{\pi}{2}} \frac{1}{n} \sum |x - \mu|

Statistics over: all axes but the features.
Take it for: number formats and devices for which squares and roots are dear.
Not for: many devices: it takes two collectives in each direction where batch norm takes
    one.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments
from jaxnorm._stateful import RunningNorm
from jaxnorm._working import as_mask, mask_to_working, to_working


class L1BatchNorm(RunningNorm):
    """Batch norm by the mean absolute deviation in the place of the standard one.

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
        m = self.batch_moments(x, mask)
        total = devices.group_sum(_absolute(x, mask, m, axes), self.peers())
        size = jnp.maximum(jnp.asarray(m.size), 1).astype(total.dtype)
        # For normal numbers this is the standard deviation.
        var = (math.pi / 2) * jnp.square(total / size)
        m = m._replace(var=var)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype), m


def _absolute(x: Array, mask: ArrayLike | None, m: Moments, axes: Axes) -> Array:
    """The sum of distances from the mean; of x's size only `x` is kept for later."""
    mask = as_mask(mask, x.shape)

    def total(x: Array, mean: Array, residue: Array) -> Array:
        far = jnp.abs((to_working(x, mask, axes) - mean) - residue)
        if mask is not None:
            far = jnp.where(mask_to_working(mask, axes), far, 0)
        return far.sum(axes.reduce, keepdims=True)

    return jax.checkpoint(total, prevent_cse=False)(x, m.mean, m.residue)


def l1_batch_norm(
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
    """Normalizes each feature of `x` by its mean and its mean absolute deviation.

        deviation = sqrt(pi / 2) * abs(x - mean).mean(other_axes)
        y = (x - mean) / sqrt(deviation**2 + epsilon) * scale + bias

    `stats["var"]` follows the square of the deviation, so that evaluation is that of
    batch norm. Over devices it takes two collectives each way.

    All else is as in `jaxnorm.batch_norm`.

    Source: Wu et al., 2018.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, _ = jaxnorm.l1_batch_norm(
    ...     x, jaxnorm.init_stats(1), use_running_average=False
    ... )
    >>> print(np.asarray(y).round(3).ravel())
    [-0.798  0.798]
    """
    norm = L1BatchNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
