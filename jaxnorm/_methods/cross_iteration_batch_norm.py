r"""Cross-iteration batch norm (Yao et al., 2020, https://arxiv.org/abs/2002.05712).

    y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta
    \mu = \frac{1}{k} \sum_t (\mu_t + \mu_t' (W - W_t))
    \mu_t' = \frac{\partial \mu_t}{\partial W_t}

Statistics over: all axes but the features, of the last `window` batches, each corrected
    for the change of the kernel since. A call takes the `kernel` and the `layer`.
    Nothing is shared over devices.
Take it for: convolutions with few examples in a batch, where these cannot be pooled
    over devices.
Not for: layers whose input does not come from one kernel, and large kernels: `window -
    1` of them are kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_array, check_function
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import at_least_float32, one_rounding
from jaxnorm._marks import BATCH
from jaxnorm._moments import Moments, pool
from jaxnorm._running import all_finite, replaced
from jaxnorm._sharding import vary_together
from jaxnorm._stateful import RunningNorm


class CrossIterationBatchNorm(RunningNorm):
    """Batch norm by the statistics of the last `window` batches, each corrected to the
    first order for what the kernel of the layer before has changed since.

    The input `kernel` is that layer's, with the features along its last axis, and
    `layer` is a function that gives x from it. `kernel_shape` is known in advance, as
    the statistics hold the kernels and slopes of past batches.

    Attributes:
        epsilon: added to the variance.
        axis_name: none is taken: devices share nothing.
        axis_index_groups: none are taken, likewise.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        kernel_shape: shape of the kernel of the layer before.
        window: number of batches, this one among them.
        axis: the feature axis.
    """

    required_inputs = ("kernel", "layer")
    can_sync = False
    epsilon: float = 1e-5
    kernel_shape: tuple[int, ...] = ()
    window: int = 4
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1 batch, got {self.window}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Those of batch norm, and the statistics, slopes and kernels of the past."""
        shapes = {"mean": feature_shape, "var": feature_shape}
        shapes |= dict.fromkeys(
            ("mean_slope", "var_slope", "kernel"), self.kernel_shape
        )
        wide = at_least_float32(dtype)
        past = {
            f"past_{k}": jnp.zeros((self.window - 1, *v), wide)
            for k, v in shapes.items()
        }
        batches = {"batches": jnp.zeros((), jnp.int32)}
        return super().init_stats(feature_shape, dtype) | past | batches

    @one_rounding
    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, Moments]:
        past = self._past(stats, x.shape)
        kernel = self._checked(inputs["kernel"], x.shape)
        own = self.batch_moments(x, mask)
        m = self._over_batches(own, past, kernel, x.shape)
        y = self.normalize_by(x, params, m, mask=mask, dtype=dtype)
        # Those of past batches have been gathered, or are of other data.
        return y, own if BATCH[0] in stats else m

    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        y, new = super().train(x, params, stats, mask=mask, dtype=dtype, **inputs)
        past, layer = self._past(stats, x.shape), inputs["layer"]
        check_function("layer", layer)
        # Each device has slopes of its own, where the kernel is shared.
        (kernel,) = vary_together(x, self._checked(inputs["kernel"], x.shape))
        now, size = self._with_slopes(
            kernel, lambda k: self.batch_moments(layer(k), mask)
        )
        usable = all_finite(*now.values()) & jnp.any(jnp.asarray(size) > 1)
        rolled = {f"past_{k}": _rolled(past[k], v) for k, v in now.items()}
        rolled["batches"] = past["batches"] + 1
        return y, replaced(new, rolled, usable)

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> Array:
        return super().evaluate(x, params, stats, mask=mask, dtype=dtype)

    def _past(self, stats: Stats, shape: Shape) -> dict[str, Array]:
        """The statistics of past batches, checked."""
        self.check_stats(stats, shape)
        past = {
            k.removeprefix("past_"): jnp.asarray(v)
            for k, v in stats.items()
            if k.startswith("past_")
        }
        return past | {"batches": jnp.asarray(stats["batches"])}

    def _checked(self, kernel: Array, shape: Shape) -> Array:
        features = self.axes(shape).feature_shape
        if jnp.shape(kernel) != self.kernel_shape or self.kernel_shape[-1:] != features:
            raise ValueError(
                f"kernel has shape {jnp.shape(kernel)}, but kernel_shape is "
                f"{self.kernel_shape}, and its last axis holds the {features} features"
            )
        return as_array("kernel", kernel)

    def _over_batches(
        self, own: Moments, past: dict[str, Array], kernel: Array, shape: Shape
    ) -> Moments:
        """Moments of this batch and of past ones, as if by the present kernel."""
        wide = own.var.dtype
        moved = kernel.astype(wide)[None] - past["kernel"].astype(wide)
        over = tuple(range(1, moved.ndim - 1))
        shift = (past["mean_slope"].astype(wide) * moved).sum(over)
        change = (past["var_slope"].astype(wide) * moved).sum(over)
        batches = past["batches"]
        filled = jnp.arange(self.window - 1, dtype=batches.dtype) < batches
        shape = (-1, *own.var.shape)
        mean = past["mean"].astype(wide).reshape(shape)
        shift = shift.reshape(shape)  # apart from the mean, which would round it
        # That of the squares, to the first order, less the square of this mean.
        var = (past["var"].astype(wide) + change).reshape(shape) - shift * shift
        mean, var, shift = lax.stop_gradient((mean, jnp.maximum(var, 0), shift))
        each = Moments(
            jnp.concatenate([own.mean[None], mean]),
            jnp.concatenate([own.var[None], var]),
            jnp.concatenate([jnp.ones(1, jnp.int32), filled.astype(jnp.int32)]),
        )
        residue = jnp.broadcast_to(own.residue, own.var.shape)[None]
        each = each._replace(
            size=each.size.reshape(-1, *[1] * own.var.ndim),
            residue=jnp.concatenate([residue, shift]),
        )
        pooled = pool(each, lambda v: v.sum(0, keepdims=True))
        size = jnp.broadcast_to(jnp.asarray(own.size), own.var.shape)
        return Moments(pooled.mean[0], pooled.var[0], size, pooled.residue[0])

    def _with_slopes(
        self, kernel: Array, measure: Callable[[Array], Moments]
    ) -> tuple[dict[str, Array], Any]:
        """This batch's statistics, their slopes by the kernel, and their sizes."""

        def measured(kernel: Array) -> tuple[tuple[Array, Array], Any]:
            m = measure(kernel)
            return (m.mean, m.var), m.size

        values, pull, size = jax.vjp(measured, lax.stop_gradient(kernel), has_aux=True)
        one, zero = jnp.ones_like(values[0]), jnp.zeros_like(values[0])
        slopes = {"mean_slope": (one, zero), "var_slope": (zero, one)}
        slopes = {k: pull(v)[0] for k, v in slopes.items()}
        now = dict(zip(("mean", "var"), values, strict=True))
        return now | slopes | {"kernel": kernel}, size


def _rolled(past: Array, now: Array) -> Array:
    """With this batch as the latest, and without the oldest."""
    now = now.reshape(1, *past.shape[1:]).astype(past.dtype)
    return jnp.concatenate([now, past])[:-1]


def cross_iteration_batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    kernel: ArrayLike,
    layer: Callable[[Array], Array],
    use_running_average: bool | ArrayLike,
    window: int = 4,
    axis: int = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm by the statistics of this batch and of the `window - 1` before it.

        moved = kernel - past_kernel
        mean[t] = past_mean + (d past_mean / d past_kernel * moved).sum()
        square[t] = past_square + (d past_square / d past_kernel * moved).sum()
        mean = average of all mean[t] and of this batch's own
        var = average of all maximum(square[t], mean[t]**2) and own - mean**2
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    The running statistics follow these. Derivatives of statistics are by the kernel of
    the layer before, and of each feature by its own part of it. Gradients go
    through this batch's own statistics. It is a pure function of a bounded history,
    which `stats` hold: window - 1 kernels and twice as many slopes. The layer is
    computed again for its slopes, which XLA shares with the computation of x. It shares
    nothing between devices but under plain jit.

    Args:
        stats: from `CrossIterationBatchNorm(kernel_shape=...).init_stats`.
        kernel: of the layer that gave x; its last axis holds the features.
        layer: such that `x == layer(kernel)`; as it is differentiated, what `mask`
            excludes must be finite.
        window: number of batches, this one among them.

    All else is as in `jaxnorm.batch_norm`.

    Source: Yao, Cao, Zheng, Huang and Lin, 2020.

    >>> import jax.numpy as jnp, jaxnorm
    >>> inputs, kernel = jnp.array([[1.0, 0.0], [3.0, 1.0]]), jnp.ones((2, 1))
    >>> def layer(kernel):
    ...     return inputs @ kernel
    >>> norm = jaxnorm.CrossIterationBatchNorm(kernel_shape=(2, 1))
    >>> y, stats = jaxnorm.cross_iteration_batch_norm(
    ...     layer(kernel), norm.init_stats((1,)), kernel=kernel, layer=layer,
    ...     use_running_average=False,
    ... )
    >>> print(y.round(3).ravel(), stats["past_mean_slope"][0].ravel())
    [-1.  1.] [2.  0.5]
    """
    norm = CrossIterationBatchNorm(
        kernel_shape=as_array("kernel", kernel).shape,
        window=window,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        unbiased=unbiased,
    )
    return norm(
        x,
        {"scale": scale, "bias": bias},
        stats,
        use_running_average=use_running_average,
        mask=mask,
        kernel=kernel,
        layer=layer,
    )
