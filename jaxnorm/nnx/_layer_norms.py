"""Flax NNX: the norms over features, under Flax's names.

They take Flax's arguments, written out for type checkers and editors, and then their
own; what they compute is jaxnorm's.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxnorm import _base as base
from jaxnorm._methods import layer_norm, rms_norm
from jaxnorm._modules import settings
from jaxnorm.nnx._constructor import ConstructorSignature, checked
from jaxnorm.nnx._norm import NO_METADATA, apply


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result.
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
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
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
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.implementation = implementation
        self._settings()

    def _settings(self) -> base.Norm:
        return settings(layer_norm.LayerNorm, self)

    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Any:
        """Returns `x` normalized; what `mask` excludes comes out as 0.

        With a residual, `x + residual` and that normalized.
        """
        how = {"residual": residual}
        return apply(self, self._settings(), x, False, mask, inputs=how)


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` is accepted and has no effect. `promote_dtype` decides the dtype
    of the result.
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
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        implementation: str | None = None,
    ):
        super().__init__(
            num_features,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_scale=use_scale,
            scale_init=scale_init,
            reduction_axes=reduction_axes,
            feature_axes=feature_axes,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            scale_metadata=scale_metadata,
        )
        self.implementation = implementation
        self._settings()

    def _settings(self) -> base.Norm:
        return settings(rms_norm.RMSNorm, self)

    def __call__(
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        residual: ArrayLike | None = None,
    ) -> Any:
        """Returns `x` normalized; what `mask` excludes comes out as 0.

        With a residual, `x + residual` and that normalized.
        """
        how = {"residual": residual}
        return apply(self, self._settings(), x, False, mask, inputs=how)
