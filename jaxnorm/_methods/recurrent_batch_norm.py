r"""Recurrent batch norm (Cooijmans et al., 2016, https://arxiv.org/abs/1603.09025).

    y_t = \frac{x_t - \mu_t}{\sqrt{\sigma_t^2 + \epsilon}} \gamma + \beta

Statistics over: all axes but the features, for each step of the sequence by itself. A
    call takes the `step`.
Take it for: recurrent networks over sequences that begin alike, with batches as for
    batch norm.
Not for: sequences much longer than `max_steps`: all later steps share the statistics of
    the last.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._arguments import as_array
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._stateful import RunningNorm


class RecurrentBatchNorm(RunningNorm):
    """Batch norm with statistics of its own for each of the first `max_steps` steps of
    a sequence; later steps share the last ones. The scale starts at 0.1.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        max_steps: steps that have statistics of their own.
        axis: the feature axis or axes.
    """

    required_inputs = ("step",)
    epsilon: float = 1e-5
    max_steps: int = 64
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """0.1 for the scale, so that gates do not saturate; zeros for the bias."""
        params = super().init_params(feature_shape, dtype)
        return params | {"scale": jnp.full(feature_shape, 0.1, dtype)}

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Those of batch norm, along a leading axis of `max_steps`."""
        stats = super().init_stats(feature_shape, dtype)
        shape = (self.max_steps, *feature_shape)
        return {k: jnp.broadcast_to(v, shape) for k, v in stats.items()}

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
        place = self._place(inputs["step"])
        now = self._at(stats, place)
        y, new = super().train(x, params, now, mask=mask, dtype=dtype)
        return y, {
            k: jnp.asarray(v).at[place].set(new[k]) if k in new else jnp.asarray(v)
            for k, v in stats.items()
        }

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
        now = self._at(stats, self._place(inputs["step"]))
        return super().evaluate(x, params, now, mask=mask, dtype=dtype)

    def _place(self, step: Any) -> Array:
        step = as_array("step", step)
        if step.shape or not jnp.issubdtype(step.dtype, jnp.integer):
            raise TypeError(
                f"step must be an integer scalar, got {step.dtype} of shape "
                f"{step.shape}"
            )
        return jnp.clip(step.astype(jnp.int32), 0, self.max_steps - 1)

    def _at(self, stats: Stats, place: Array) -> dict[str, Array]:
        running.require(stats, self.stat_names)
        return {
            k: lax.dynamic_index_in_dim(jnp.asarray(v), place, keepdims=False)
            for k, v in stats.items()
        }


def recurrent_batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    step: ArrayLike,
    use_running_average: bool | ArrayLike,
    max_steps: int = 64,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm of one step of a sequence, with the statistics of that step.

        t = min(step, max_steps - 1)
        y, row = batch_norm(x, {k: v[t] for k, v in stats.items()}, scale, bias)
        stats = {k: v.at[t].set(row[k]) for k, v in stats.items()}

    In a recurrent net the first steps differ from the later ones, and statistics of all
    steps together fit none. Scale and bias are shared by the steps; start the scale at
    0.1. In `jax.lax.scan`, `stats` are part of the carry.

    Args:
        stats: {"mean", "var"} of shape (max_steps, *features), from
            `RecurrentBatchNorm(max_steps=...).init_stats`.
        step: integer scalar, which may be traced, from 0 on.
        max_steps: steps that have statistics of their own.

    All else is as in `jaxnorm.batch_norm`.

    Source: Cooijmans, Ballas, Laurent, Gulcehre and Courville, 2016.

    >>> import jax.numpy as jnp, jaxnorm
    >>> stats = jaxnorm.RecurrentBatchNorm(max_steps=3).init_stats((1,))
    >>> y, stats = jaxnorm.recurrent_batch_norm(
    ...     jnp.array([[1.0], [3.0]]), stats, step=1, max_steps=3, momentum=0.0,
    ...     use_running_average=False,
    ... )
    >>> print(y.round(3).ravel(), stats["mean"].ravel())
    [-1.  1.] [0. 2. 0.]
    """
    norm = RecurrentBatchNorm(
        max_steps=max_steps,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    return norm(
        x,
        {"scale": scale, "bias": bias},
        stats,
        use_running_average=use_running_average,
        mask=mask,
        step=step,
    )
