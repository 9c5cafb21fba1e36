r"""Moving average batch norm (Yan et al., 2020, https://arxiv.org/abs/2001.06838).

    y = \frac{x}{\sqrt{\bar\nu + \epsilon}} r \gamma + \beta
    \bar\nu = \frac{1}{k} \sum_{t < k} \nu_t, \quad \nu = \frac{1}{n} \sum x^2

Statistics over: all axes but the features, of the last `window` batches, in the
    backward pass as well; no mean is subtracted.
Take it for: small batches after layers with centred weights
    (`jaxnorm.weight_standardize`).
Not for: forward-mode derivatives, and optimizers that cannot leave the controls to
    plain gradient descent.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import at_least_float32
from jaxnorm._methods._control import as_control, controlled
from jaxnorm._moments import Moments
from jaxnorm._stateful import StatefulNorm


class MovingAverageBatchNorm(StatefulNorm):
    """Divides by the root of a mean square that is averaged over the last `window`
    batches, in the backward pass as well; for small batches.

    The averages of the backward pass are the parameter "control", see
    `jaxnorm.models.control_labels`.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics.
        window: number of batches to average over.
        clip: limit of the correction towards evaluation, from 1 on.
        axis: the feature axis or axes.
    """

    real_only = True
    param_names = ("scale", "bias", "control")
    controls = ("control",)
    center = False
    epsilon: float = 1e-5
    momentum: float = 0.98
    window: int = 16
    clip: float = 1.05
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1 batch, got {self.window}")
        if isinstance(self.clip, int | float) and not self.clip >= 1:
            raise ValueError(f"clip must be at least 1, got {self.clip}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias and for the control of each batch."""
        return super().init_params(feature_shape, dtype) | {
            "control": jnp.zeros((self.window, *feature_shape), jnp.float32)
        }

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Mean squares of the last `window` batches, their average, and how many."""
        dtype = at_least_float32(dtype)
        return {
            "var": jnp.ones(feature_shape, dtype),
            "buffer": jnp.zeros((self.window, *feature_shape), dtype),
            "count": jnp.zeros(feature_shape, jnp.int32),
        }

    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, dict[str, Array]]:
        axes = self.axes(x.shape)
        self.check_stats(stats, x.shape)
        m = self.batch_moments(x, mask)
        some = jnp.broadcast_to(jnp.asarray(m.size) > 0, m.var.shape)
        count, kept = (
            jnp.asarray(stats[k]).reshape(axes.param_shape()) for k in ("count", "var")
        )
        kept = kept.astype(m.var.dtype)
        # Each feature counts its own batches: a mask may leave some out.
        rows = jnp.arange(self.window, dtype=count.dtype)
        rows = rows.reshape(-1, *[1] * count.ndim)
        here = (rows == (count % self.window)[None]) & some[None]
        seen = count + some.astype(count.dtype)
        filled = (rows < seen[None]).astype(m.var.dtype)
        buffer = jnp.asarray(stats["buffer"]).astype(m.var.dtype)
        buffer = buffer.reshape(self.window, *axes.param_shape())
        buffer = jnp.where(here, m.var[None], buffer)
        var = _average(buffer, filled)
        ratio = jnp.sqrt((var + self.epsilon) / (kept + self.epsilon))
        ratio = jnp.clip(ratio, 1 / self.clip, self.clip)
        y = controlled(
            _renewed,
            x,
            axes,
            Moments(m.mean, var, 1).rstd(self.epsilon),
            as_control(
                "control", params.get("control"), axes, m.var.dtype, self.window
            ),
            (here, filled),
            gain=jnp.where(count < self.window, 1, ratio),
            size=m.size,
            params=params,
            mask=mask,
            dtype=dtype,
            peers=self.peers(),
        )
        moved = running.moving_average(kept, var, self.momentum)
        moved = jnp.where(some, jnp.where(count == 0, var, moved), kept)
        new = {"var": moved, "buffer": buffer, "count": seen}
        return y, running.replaced(stats, new, running.all_finite(m.var))

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        m = running.read(stats, self.axes(x.shape), x.dtype, stat_names=("var",))
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)


def _average(buffer: Array, filled: Array) -> Array:
    return (buffer * filled).sum(0) / jnp.maximum(filled.sum(0), 1)


def _renewed(
    product: Array, control: Array, here: Array, filled: Array
) -> tuple[Array, Array]:
    """The average over the last batches, this one among them, and its terms."""
    control = jnp.where(here, product[None], control)
    return _average(control, filled), control


def moving_average_batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    control: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    window: int = 16,
    clip: float = 1.05,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.98,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Divides each feature of `x` by the root of its mean square over recent batches.

        buffer = stats["buffer"].at[stats["count"] % window].set((x**2).mean())
        var = buffer.mean(0)
        z = x / sqrt(var + epsilon)
        r = clip(sqrt((var + epsilon) / (stats["var"] + epsilon)), 1 / clip, clip)
        y = z * r * scale + bias
        stats["var"] = momentum * stats["var"] + (1 - momentum) * var

    Until the buffers are full, their mean is over the batches so far, and r is 1.
    Evaluation divides by `sqrt(stats["var"] + epsilon)`. The gradient is

        g = dy * scale * r
        control = control.at[stats["count"] % window].set((g * z).mean())
        dx = (g - z * control.mean(0)) / sqrt(var + epsilon)

    and the old control less the new one is the gradient of `control`: see
    `jaxnorm.models.control_labels`. There is no forward mode. The mean is not
    subtracted: centre the weights of the layer before it
    (`jaxnorm.weight_standardize`).

    Args:
        stats: {"var", "buffer", "count"}, from `MovingAverageBatchNorm().init_stats`.
        control: (window, *features), zeros at first; None is zeros.
        window: number of batches to average over.
        clip: limit of the correction r towards evaluation, from 1 on.
        momentum: weight of the old statistics.

    All else is as in `jaxnorm.batch_norm`.

    Source: Yan, Wan, Zhang, Zhang, Wei and Sun, 2020.

    >>> import jax.numpy as jnp, jaxnorm
    >>> y, stats = jaxnorm.moving_average_batch_norm(
    ...     jnp.array([[3.0], [-3.0]]),
    ...     jaxnorm.MovingAverageBatchNorm().init_stats((1,)),
    ...     use_running_average=False,
    ... )
    >>> print(y.round(3).ravel(), stats["var"])
    [ 1. -1.] [9.]
    """
    norm = MovingAverageBatchNorm(
        window=window,
        clip=clip,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias, "control": control}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
