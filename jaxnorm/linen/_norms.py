"""Flax Linen: one generic module for any norm, and the norms that Flax has."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _base as base
from jaxnorm._arguments import as_array, as_flag
from jaxnorm._marks import MARKS
from jaxnorm._methods import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from jaxnorm._modules import (
    prepared,
    refuse,
    settings,
    stats_dtype,
    warn,
)
from jaxnorm.linen._checked import Checked


class Norm(Checked, nn.Module):
    """Applies `norm`, with its parameters in `params`, its statistics in `batch_stats`.

    A norm with running statistics needs `use_running_average`, at construction or at
    the call, where it may be traced. While initializing, no mapped axis is needed and
    nothing is updated. Raises what the norm raises.

    Attributes:
        norm: the settings, such as `jaxnorm.BatchNorm(momentum=0.9)`.
        use_running_average: normalize by the running statistics, and keep them.
        dtype: of the result; by default that of input and parameters together.
        param_dtype: of the parameters.
        use_scale, use_bias: have that parameter, if the norm has it at all.
        scale_init, bias_init: initializers in place of the norm's own values.
    """

    norm: base.Norm
    use_running_average: bool | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    scale_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0.

        `inputs` are what `norm` takes beside `x`, such as the domain of each example.
        """
        flag = self.norm.has_stats and _merged_flag(self, use_running_average)
        return _apply(self, self.norm, x, flag, mask, refuse, inputs)


class BatchNorm(Checked, nn.BatchNorm):
    """Flax's BatchNorm, with exact statistics, masks and synchronization.

    Beyond Flax's arguments, `momentum=None` keeps the average over all batches, and
    `unbiased=True` the unbiased variance, as PyTorch does; `residual`, at the call, is
    added to the result, and `activation` applied to it, in one rule.
    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    the variance is exact, and statistics are taken and kept in at least float32.
    """

    momentum: float | None = 0.99  # pyright: ignore[reportIncompatibleVariableOverride]
    unbiased: bool = dataclasses.field(default=False, kw_only=True)
    activation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        norm = settings(batch_norm.BatchNorm, self)
        return _apply(self, norm, x, flag, mask, inputs={"residual": residual})


class LayerNorm(Checked, nn.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32.
    """

    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
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
        norm = settings(layer_norm.LayerNorm, self)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


class RMSNorm(Checked, nn.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    the mean square is taken in at least float32.
    """

    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
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
        norm = settings(rms_norm.RMSNorm, self)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


class GroupNorm(Checked, nn.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    activation: str | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(group_norm.GroupNorm, self)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


class InstanceNorm(Checked, nn.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    activation: str | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(instance_norm.InstanceNorm, self, axis=self.feature_axes)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


def _merged_flag(module: Any, at_call: bool | Array | None) -> bool | Array:
    return as_flag(
        nn.merge_param("use_running_average", module.use_running_average, at_call)
    )


def _apply(
    module: Any,
    norm: base.Norm,
    x: ArrayLike,
    flag: bool | Array,
    mask: ArrayLike | None,
    on_single_values: Callable[[str], None] = warn,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Array:
    """Applies `norm` to `x` with the variables of `module`, created on first use."""
    x = as_array("x", x)
    shape = norm.axes(x.shape).feature_shape
    initial = norm.init_stats(shape, stats_dtype(x.dtype, module.dtype))
    variables = {
        k: module.variable("batch_stats", k, lambda v=v: v) for k, v in initial.items()
    }
    marks = [k for k in MARKS if module.has_variable("batch_stats", k)]
    variables |= {k: module.variable("batch_stats", k) for k in marks}
    params = {
        k: _param(module, k, default)
        for k, default in norm.init_params(shape, module.param_dtype).items()
        if getattr(module, f"use_{k}", True)
    }
    initializing = module.is_initializing()
    norm = norm.without_devices() if initializing else norm
    call = prepared(
        norm,
        x,
        params,
        {k: v.value for k, v in variables.items()},
        inputs,
        flag=flag,
        dtype=module.dtype,
        on_single_values=_ignore if initializing else on_single_values,
    )
    how = {"use_running_average": flag, "mask": mask, "dtype": call.dtype, **inputs}
    y, new = norm.apply(call.x, params, call.stats, **how)
    if call.updates and not initializing:
        for k, v in new.items():
            variables[k].value = v
    return y


def _param(module: Any, name: str, default: Array) -> Array:
    if module.has_variable("params", name):
        value = as_array(name, meta.unbox(module.get_variable("params", name)))
        if value.shape != default.shape:
            raise ValueError(
                f"the parameter {name} has shape {value.shape}, but the features of "
                f"this input are {default.shape}: initialize with an input of its shape"
            )
    given = getattr(module, f"{name}_init", None)
    init = given or (lambda key, shape, dtype: default)
    return module.param(name, init, default.shape, module.param_dtype)


def _ignore(problem: str) -> None:
    """Takes a batch of single values, as models may be initialized with one example."""
