r"""Batch renormalization (Ioffe, 2017, https://arxiv.org/abs/1702.03275).

    y = \left(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} r + d\right) \gamma + \beta
    r = \mathrm{clip}\left(\frac{\sigma}{\hat\sigma}, \frac{1}{r_{max}}, r_{max}\right)
    d = \mathrm{clip}\left(\frac{\mu - \hat\mu}{\hat\sigma}, -d_{max}, d_{max}\right)

Statistics over: all axes but the features, corrected towards the running statistics
    within limits, which may be schedules.
Take it for: batches that are small, or that differ in what they hold, where training is
    to normalize nearly as evaluation does.
Not for: the first steps of training, unless `rmax=1` and `dmax=0` there: the running
    statistics are not yet those of the data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._arguments import as_real
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments
from jaxnorm._standardize import standardize
from jaxnorm._stateful import RunningNorm

Limit = ArrayLike | Callable[[Array], ArrayLike]


class BatchRenorm(RunningNorm):
    """Batch norm, moved towards what the running statistics would give, within limits.

    `rmax` and `dmax` limit how far the batch's deviation and mean are corrected; each
    is a number, or a function of the number of batches seen, which the statistics then
    count as "step". (An array, which may be traced, cannot be hashed.)

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
        rmax: limit of the correction of the deviation, from 1 on; a number, or a
            function of the number of batches so far.
        dmax: limit of the correction of the mean, from 0 on; likewise.
    """

    real_only = True
    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1
    rmax: Limit = 3.0
    dmax: Limit = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("rmax", 1), ("dmax", 0)):
            limit = getattr(self, name)
            limit = limit if callable(limit) else as_real(name, limit)
            object.__setattr__(self, name, limit)
            if isinstance(limit, int | float) and not limit >= least:
                raise ValueError(f"{name} must be at least {least}, got {limit}")

    @property
    def _scheduled(self) -> bool:
        return callable(self.rmax) or callable(self.dmax)

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Mean 0 and variance 1, and a step of 0 where a limit is a function of it."""
        stats = super().init_stats(feature_shape, dtype)
        return stats | ({"step": jnp.zeros((), jnp.int32)} if self._scheduled else {})

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
        old = running.read(stats, axes, x.dtype)
        rmax, dmax = (
            self._limit(v, stats, m.var.dtype) for v in (self.rmax, self.dmax)
        )
        rstd, old_rstd = m.rstd(self.epsilon), old.rstd(self.epsilon)
        r = lax.stop_gradient(jnp.clip(old_rstd / rstd, 1 / rmax, rmax))
        offset = (m.mean - old.mean) + m.residue
        d = lax.stop_gradient(jnp.clip(offset * old_rstd, -dmax, dmax))
        # (x - mean) * rstd * r + d, with d as a part of the mean.
        rstd = rstd * r
        y = standardize(
            x,
            m.mean,
            rstd,
            axes,
            scale=params.get("scale"),
            bias=params.get("bias"),
            residue=m.residue - d / rstd,
            mask=mask,
            dtype=dtype,
        )
        return y, m

    def _limit(self, limit: Any, stats: Stats, dtype: DTypeLike | None) -> Array:
        if callable(limit):
            running.require(stats, ("step",))
            limit = limit(jnp.asarray(stats["step"]))
        return jnp.asarray(limit, dtype)


def batch_renorm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    rmax: Limit = 3.0,
    dmax: Limit = 5.0,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm whose training outputs are close to those of evaluation.

        std, running_std = sqrt(var + epsilon), sqrt(stats["var"] + epsilon)
        r = stop_gradient(clip(std / running_std, 1 / rmax, rmax))
        d = stop_gradient(clip((mean - stats["mean"]) / running_std, -dmax, dmax))
        y = ((x - mean) / std * r + d) * scale + bias

    With rmax = 1 and dmax = 0 it is batch norm; train so for some thousand steps first.
    Evaluation is that of batch norm, with the same statistics.

    Args:
        rmax: from 1 on; a number, which may be traced, or a function of
            `stats["step"]`, the number of batches so far (start with
            `BatchRenorm(rmax=...).init_stats`).
        dmax: from 0 on; likewise.

    All else is as in `jaxnorm.batch_norm`.

    Source: Ioffe, 2017.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, _ = jaxnorm.batch_renorm(
    ...     x, jaxnorm.init_stats(1), use_running_average=False
    ... )
    >>> print(np.asarray(y).round(3).ravel())  # as by the running mean 0 and variance 1
    [1. 3.]
    """
    norm = BatchRenorm(
        rmax=rmax,
        dmax=dmax,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
