r"""EvoNorm-B0 (Liu et al., 2020, https://arxiv.org/abs/2004.02967).

    y = \frac{x}{\max(\sigma_b, v x + \sigma_i)} \gamma + \beta

Statistics over: batch and space; space.
Take it for: convolutional networks with batches as for batch norm, in place of the norm
    and the activation.
Not for: small batches (evo norm S0), and layers with another activation after it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._exact import overflow_as_nan
from jaxnorm._moments import Moments
from jaxnorm._reduce import moments
from jaxnorm._standardize import affine, as_param, pointwise
from jaxnorm._stateful import RunningNorm


class EvoNormB0(RunningNorm):
    """Normalization and activation in one: divides by the larger of the deviation over
    the batch and of a line through the deviation of the example.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share the batch.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        axis: the feature axis or axes.
    """

    real_only = True
    param_names = ("scale", "bias", "slope")
    stat_names = ("var",)
    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale and for the slope of the line, zeros for the bias."""
        return super().init_params(feature_shape, dtype) | {
            "slope": jnp.ones(feature_shape, dtype)
        }

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
        m = self.batch_moments(x, mask)
        return self._divided(x, m.var, params, mask, dtype), m

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
        m = running.read(stats, self.axes(x.shape), x.dtype, stat_names=self.stat_names)
        return self._divided(x, m.var, params, mask, dtype)

    def _divided(
        self,
        x: Array,
        var: Array,
        params: Params,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        own = moments(x, Axes.per_example(x.shape, self.axis), mask=mask)
        affines = [
            as_param(k, params.get(k), axes, var.dtype) for k in self.param_names
        ]

        def divide(
            x: Array,
            batch: Array,
            example: Array,
            scale: Array | None,
            bias: Array | None,
            slope: Array | None,
        ) -> Array:
            line = (x if slope is None else slope * x) + example
            return affine(x / jnp.maximum(batch, line), scale, bias)

        deviations = [
            jnp.sqrt(overflow_as_nan(v + self.epsilon)) for v in (var, own.var)
        ]
        return pointwise(divide, x, axes, *deviations, *affines, mask=mask, dtype=dtype)


def evo_norm_b0(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    slope: ArrayLike | None = None,
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
    """Divides `x` by the larger of two deviations, which also makes it an activation.

        batch = sqrt(x.var(other_axes) + epsilon)
        example = sqrt(x.var(space, keepdims=True) + epsilon)
        y = x / maximum(batch, slope * x + example) * scale + bias

    It takes the place of a normalization and the activation after it.

    Args:
        stats: {"var"}, of the shape of the features, from `init_stats`; a "mean" that
            stands beside it is left as it is.
        slope: of the shape of the features; None is 1.
        axis_name: mapped axis, or several, whose devices share the batch.

    All else is as in `jaxnorm.batch_norm`.

    Source: Liu, Brock, Simonyan and Le, 2020.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0], [3.0], [-1.0], [-3.0]])
    >>> y, stats = jaxnorm.evo_norm_b0(
    ...     x, jaxnorm.init_stats(1), use_running_average=False, momentum=0.0
    ... )
    >>> print(np.asarray(y).round(3).ravel(), np.asarray(stats["var"]).round(3))
    [ 0.447  0.999 -0.447 -1.342] [5.]
    """
    norm = EvoNormB0(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias, "slope": slope}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
