r"""Switchable normalization (Luo et al., 2018, https://arxiv.org/abs/1806.10779).

    y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta
    \mu = \sum_k a_k \mu_k, \quad a = \mathrm{softmax}(w_\mu)
    \sigma^2 = \sum_k b_k \sigma_k^2, \quad b = \mathrm{softmax}(w_\sigma)

Statistics over: space; space and features; batch and space; mixed by learned weights.
Take it for: networks of which it is not known which of the three suits a layer.
Not for: inference at no cost: it takes the statistics of each example in evaluation as
    well, and cannot be folded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments, mix, pool
from jaxnorm._reduce import moments
from jaxnorm._sharding import vary_together
from jaxnorm._stateful import RunningNorm


class SwitchableNorm(RunningNorm):
    """Normalizes by a learned mixture of instance, layer and batch statistics.

    `axis_name` pools the batch statistics, so it names an axis that the batch is split
    along.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
    """

    param_names = ("scale", "bias", "mean_weight", "var_weight")
    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def single_value_problem(self, shape: Shape, by_batch: bool) -> str | None:
        # The layer statistics are still of many values.
        return None

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """As usual; ones for the weights, so that they are equal."""
        ones = {k: jnp.ones(3, dtype) for k in ("mean_weight", "var_weight")}
        return super().init_params(feature_shape, dtype) | ones

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
        instance, layer = self._of_examples(x, mask)
        batch = pool(instance, lambda v: v.sum(0, keepdims=True))
        batch = self.sync(batch)
        return self._mixed(x, params, instance, layer, batch, mask, dtype), batch

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
        kept = running.read(stats, self.axes(x.shape), x.dtype)
        return self._mixed(x, params, *self._of_examples(x, mask), kept, mask, dtype)

    def _of_examples(self, x: Array, mask: ArrayLike | None) -> tuple[Moments, Moments]:
        """Instance and layer statistics, the latter from the former."""
        axes = Axes.per_example(x.shape, self.axis)
        instance = moments(x, axes, mask=mask)
        return instance, pool(instance, lambda v: v.sum(axes.feature, keepdims=True))

    def _mixed(
        self,
        x: Array,
        params: Params,
        instance: Moments,
        layer: Moments,
        batch: Moments,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        names = ("mean_weight", "var_weight")
        weights = [_shares(k, params.get(k), layer.var.dtype) for k in names]
        batch = batch.broadcast_to(batch.var.shape)
        mean, var, residue, *weights = vary_together(
            x, batch.mean, batch.var, batch.residue, *weights
        )
        batch = Moments(mean, var, 1, residue)
        of_mean, of_var = weights
        m = mix((instance, layer, batch), of_mean, of_var)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)


def _shares(name: str, weight: Any, dtype: DTypeLike) -> Array:
    weight = jnp.ones(3, dtype) if weight is None else jnp.asarray(weight, dtype)
    if weight.shape != (3,):
        raise ValueError(
            f"{name} has shape {weight.shape}, but it is (3,): one weight each for "
            "instance, layer and batch statistics"
        )
    return jax.nn.softmax(weight)


def switchable_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean_weight: ArrayLike | None = None,
    var_weight: ArrayLike | None = None,
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
    """Normalizes by a mixture of instance, layer and batch statistics.

        a, b = softmax(mean_weight), softmax(var_weight)
        mean = a[0] * instance_mean + a[1] * layer_mean + a[2] * batch_mean
        var = b[0] * instance_var + b[1] * layer_var + b[2] * batch_var
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Layer and batch statistics are pooled from those of the instances, so `x` is read
    once for all three. All variances are biased, so that single positions and single
    examples give no NaN. `stats` follow the batch statistics and stand in for them
    with `use_running_average=True`; the others are always those of the example.

    Args:
        mean_weight, var_weight: (3,), for instance, layer and batch statistics; None
            is equal weights.
        axis_name: mapped axis, or several, that the batch is split along.

    All else is as in `jaxnorm.batch_norm`, but a batch of one single value per feature
    is taken.

    Source: Luo, Ren, Peng, Zhang and Li, 2018.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[[1.0, 10.0], [3.0, 30.0]]])
    >>> only_instance = jnp.array([1e9, 0.0, 0.0])
    >>> y, _ = jaxnorm.switchable_norm(
    ...     x,
    ...     jaxnorm.init_stats(2),
    ...     mean_weight=only_instance,
    ...     var_weight=only_instance,
    ...     use_running_average=False,
    ... )
    >>> print(y.round(3).tolist())
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    norm = SwitchableNorm(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    params |= {"mean_weight": mean_weight, "var_weight": var_weight}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
