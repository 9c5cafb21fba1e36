"""Flax NNX: the norms over batch, groups and instances, under Flax's names.

They take Flax's arguments, written out for type checkers and editors, and then their
own; what they compute is jaxnorm's.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike

from jaxnorm import _base as base
from jaxnorm._methods import batch_norm, group_norm, instance_norm
from jaxnorm._modules import settings, stats_dtype
from jaxnorm.nnx._constructor import ConstructorSignature, checked
from jaxnorm.nnx._norm import NO_METADATA, apply, merged_flag


class BatchNorm(nnx.BatchNorm):
    """Flax's BatchNorm, with exact statistics, masks and synchronization.

    Beyond Flax's arguments, `momentum=None` keeps the average over all batches, and
    `unbiased=True` the unbiased variance, as PyTorch does; `residual`, at the call, is
    added to the result, and `activation` applied to it, in one rule.
    `use_fast_variance` is accepted and has no effect: the variance is exact.
    `promote_dtype` decides the dtype of the result; neither the input nor the running
    statistics are rounded to it before they are used. The running mean of complex
    inputs is complex, from the first training step on, or from the start if `dtype` is.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        unbiased: bool = False,
        activation: str | None = None,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,  # pyright: ignore[reportArgumentType]
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.unbiased = unbiased
        self.activation = activation
        kept = self._settings().init_stats((num_features,), stats_dtype(dtype))
        for k, v in kept.items():
            setattr(self, k, nnx.BatchStat(v))

    def _settings(self) -> base.Norm:
        return settings(batch_norm.BatchNorm, self)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = merged_flag(self, use_running_average)
        return apply(
            self, self._settings(), x, flag, mask, inputs={"residual": residual}
        )


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        activation: str | None = None,
        implementation: str | None = None,
    ):
        # Flax divides by these before it looks at them.
        norm = group_norm.GroupNorm(num_groups=num_groups, group_size=group_size)
        norm.axes((1, num_features))
        super().__init__(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.implementation = implementation
        self._settings()

    def _settings(self) -> base.Norm:
        # Flax keeps both the number of groups and their size; one says it all.
        return settings(group_norm.GroupNorm, self, group_size=None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return apply(
            self, self._settings(), x, False, mask, inputs={"residual": residual}
        )


class InstanceNorm(nnx.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        activation: str | None = None,
        implementation: str | None = None,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.activation = activation
        self.implementation = implementation
        self._settings()

    def _settings(self) -> base.Norm:
        return settings(instance_norm.InstanceNorm, self, axis=self.feature_axes)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return apply(
            self, self._settings(), x, False, mask, inputs={"residual": residual}
        )
