"""Flax NNX: one generic module for any norm, and the classes that Flax has.

The named classes take Flax's arguments, written out for type checkers and editors, and
then their own; what they compute is jaxnorm's.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm._arguments import as_array, as_feature_shape, as_flag
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm._marks import HELD, MARKS
from jaxnorm._modules import refuse, run, settings, stats_dtype, warn
from jaxnorm.nnx._constructor import ConstructorSignature, checked

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})
_NO_FLAG = (
    "{} needs use_running_average: pass it to the constructor or to the call, or set "
    "it on the whole model with model.train(), model.eval() or nnx.view"
)


class Norm(nnx.Module):
    """Applies `norm`, with its parameters as nnx.Param, its statistics as BatchStat.

    `model.train()` and `model.eval()` switch between the batch's statistics (which
    update the running ones) and the running ones; `use_running_average` at the call
    takes precedence and may be traced. Raises what the norm raises.

    Args:
        norm: the settings, such as `jaxnorm.BatchNorm(momentum=0.9)`.
        num_features: the number of features, or the shape of several feature axes.
        use_running_average: normalize by the running statistics, and keep them.
        dtype: of the result; by default that of input and parameters together.
        param_dtype: of the parameters.
        use_scale, use_bias: have that parameter, if the norm has it at all.
        scale_init, bias_init: initializers in place of the norm's own values.
        promote_dtype: as in Flax, decides the dtype of the result where `dtype` is
            None.
        rngs: key for the initializers, needed only where these are given.
        scale_metadata, bias_metadata: of the nnx.Param, such as `out_sharding`.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        norm: jaxnorm.Norm,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        use_bias: bool = True,
        scale_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs | None = None,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
    ):
        shape = as_feature_shape("num_features", num_features)
        metadata = {"scale": scale_metadata, "bias": bias_metadata}
        inits = {"scale": scale_init, "bias": bias_init}
        absent = {"scale": not use_scale, "bias": not use_bias}
        self.norm = norm
        self.use_running_average = use_running_average
        self.dtype = dtype
        self.promote_dtype = promote_dtype
        kept = jnp.float32 if dtype is None else at_least_float32(dtype)
        for k, v in norm.init_stats(shape, kept).items():
            setattr(self, k, nnx.BatchStat(v))
        for k, v in norm.init_params(shape, param_dtype).items():
            if absent.get(k):
                setattr(self, k, nnx.data(None))
                continue
            # A key for each parameter, used or not, as Flax draws them.
            key, init = None if rngs is None else rngs.params(), inits.get(k)
            if init is not None:
                if key is None:
                    raise ValueError(f"{k}_init needs a key: pass rngs=nnx.Rngs(seed)")
                v = init(key, v.shape, param_dtype)
            setattr(self, k, nnx.Param(v, **metadata.get(k, {})))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0.

        `inputs` are what the norm's `inputs` name, such as the domain of each example.
        """
        flag = self.norm.has_stats and _merged_flag(self, use_running_average)
        return _apply(self, self.norm, x, flag, mask, refuse, inputs)

    def set_view(self, use_running_average: bool | None = None):
        """Sets the default of `use_running_average`; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


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
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
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

    def _settings(self) -> jaxnorm.Norm:
        return settings(jaxnorm.BatchNorm, self)

    def __call__(self, x, use_running_average=None, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        return _apply(
            self, self._settings(), x, flag, mask, inputs={"residual": residual}
        )


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
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
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

    def _settings(self) -> jaxnorm.Norm:
        return settings(jaxnorm.LayerNorm, self)

    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, self._settings(), x, False, mask)


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
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
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

    def _settings(self) -> jaxnorm.Norm:
        return settings(jaxnorm.RMSNorm, self)

    def __call__(self, x, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, self._settings(), x, False, mask)


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
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        activation: str | None = None,
        implementation: str | None = None,
    ):
        # Flax divides by these before it looks at them.
        norm = jaxnorm.GroupNorm(num_groups=num_groups, group_size=group_size)
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

    def _settings(self) -> jaxnorm.Norm:
        # Flax keeps both the number of groups and their size; one says it all.
        return settings(jaxnorm.GroupNorm, self, group_size=None)

    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(
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
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
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

    def _settings(self) -> jaxnorm.Norm:
        return settings(jaxnorm.InstanceNorm, self, axis=self.feature_axes)

    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(
            self, self._settings(), x, False, mask, inputs={"residual": residual}
        )


def _merged_flag(module: Any, at_call: bool | Array | None) -> bool | Array:
    return as_flag(
        first_from(
            at_call,
            module.use_running_average,
            error_msg=_NO_FLAG.format(type(module).__name__),
        )
    )


def _apply(
    module: Any,
    norm: jaxnorm.Norm,
    x: ArrayLike,
    flag: bool | Array,
    mask: ArrayLike | None,
    on_single_values: Callable[[str], None] = warn,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Array:
    """Applies `norm` to `x` with the variables of `module`."""
    x = as_array("x", x)
    shape = norm.axes(x.shape).feature_shape
    marks = [k for k in MARKS if hasattr(module, k)]
    variables = {k: getattr(module, k) for k in [*norm.init_stats(shape), *marks]}
    named = {k: getattr(module, k, None) for k in norm.param_names}
    params = {k: v[...] for k, v in named.items() if v is not None}
    stats = {k: v[...] for k, v in variables.items()}
    y, stats = run(
        norm,
        x,
        params,
        stats,
        flag=flag,
        mask=mask,
        dtype=_dtype(module, norm, x, stats, params),
        on_single_values=on_single_values,
        inputs=inputs,
    )
    if flag is not True and HELD not in variables:
        for k, v in variables.items():
            _write(v, stats[k])
    return y


def _write(variable: nnx.Variable, value: Array) -> None:
    if variable.dtype == value.dtype:
        variable[...] = value
    else:  # which would cast it: a mean has become complex
        variable.set_value(value)


def _dtype(
    module: Any, norm: jaxnorm.Norm, x: Array, stats: dict, params: dict
) -> DTypeLike | None:
    """The dtype that Flax gives the result: `promote_dtype` decides.

    It is asked for dtypes only. What it would return is rounded to `dtype`, running
    statistics included, and statistics of rounded inputs are wrong.
    """
    if module.dtype is not None:
        return module.dtype
    kept = [stats[k] for k in ("mean", "var") if k in stats]
    named = [params.get(k) for k in norm.param_names]
    with jax.numpy_dtype_promotion("standard"):
        x, *rest = jax.eval_shape(
            lambda *arrays: module.promote_dtype(arrays, dtype=None), x, *kept, *named
        )
    affine = rest[len(kept) :]
    return promote(*(v.dtype for v in (x, *affine) if v is not None))
