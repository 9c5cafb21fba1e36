"""Flax Linen: one generic module for any norm, and the classes that Flax has.

The named classes inherit their constructors and defaults from the Flax that is
installed, so that they follow it; what they compute is jaxnorm's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm.base import as_flag
from jaxnorm.modules import refuse, run, settings, warn


class Norm(nn.Module):
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

    norm: jaxnorm.Norm
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

        `inputs` are what the norm's `inputs` name, such as the domain of each example.
        """
        flag = self.norm.has_stats and _merged_flag(self, use_running_average)
        return _apply(self, self.norm, x, flag, mask, refuse, inputs)


class BatchNorm(nn.BatchNorm):
    """Flax's BatchNorm, with exact statistics, masks and synchronization.

    Beyond Flax's arguments, `momentum=None` keeps the average over all batches, and
    `unbiased=True` the unbiased variance, as PyTorch does. `use_fast_variance` and
    `force_float32_reductions` are accepted and have no effect: there is one formula,
    exact and of one pass, and statistics are taken and kept in at least float32.
    """

    unbiased: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        return _apply(self, settings(jaxnorm.BatchNorm, self), x, flag, mask)


class LayerNorm(nn.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32.
    """

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.LayerNorm, self), x, False, mask)


class RMSNorm(nn.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    the mean square is taken in at least float32.
    """

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.RMSNorm, self), x, False, mask)


class GroupNorm(nn.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32.
    """

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.GroupNorm, self), x, False, mask)


class InstanceNorm(nn.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32.
    """

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(jaxnorm.InstanceNorm, self, axis=self.feature_axes)
        return _apply(self, norm, x, False, mask)


def _merged_flag(module: Any, at_call: bool | Array | None) -> bool | Array:
    return as_flag(
        nn.merge_param("use_running_average", module.use_running_average, at_call)
    )


def _apply(
    module: Any,
    norm: jaxnorm.Norm,
    x: ArrayLike,
    flag: bool | Array,
    mask: ArrayLike | None,
    on_lone_values: Callable[[str], None] = warn,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Array:
    """Applies `norm` to `x` with the variables of `module`, created on first use."""
    x = jnp.asarray(x)
    shape = norm.axes(x.shape).feature_shape
    stats_dtype = x.dtype if jnp.iscomplexobj(x) else jnp.float32
    held = {
        k: module.variable("batch_stats", k, lambda v=v: v)
        for k, v in norm.init_stats(shape, stats_dtype).items()
    }
    params = {
        k: _param(module, k, default)
        for k, default in norm.init_params(shape, module.param_dtype).items()
        if getattr(module, f"use_{k}", True)
    }
    initializing = module.is_initializing()
    y, stats = run(
        norm.local() if initializing else norm,
        x,
        params,
        {k: v.value for k, v in held.items()},
        flag=flag,
        mask=mask,
        dtype=module.dtype,
        on_lone_values=_ignore if initializing else on_lone_values,
        inputs=inputs,
    )
    if flag is not True and not initializing:
        for k, v in held.items():
            v.value = stats[k]
    return y


def _param(module: Any, name: str, default: Array) -> Array:
    given = getattr(module, f"{name}_init", None)
    init = given or (lambda key, shape, dtype: default)
    return module.param(name, init, default.shape, module.param_dtype)


def _ignore(problem: str) -> None:
    """While initializing, a single example is as good as many."""
