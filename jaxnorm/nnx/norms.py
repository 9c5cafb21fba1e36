"""Flax NNX: one generic module for any norm, and the classes that Flax has.

The named classes inherit their constructors and defaults from the Flax that is
installed, so that they follow it; what they compute is jaxnorm's.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm.base import as_flag
from jaxnorm.dtypes import at_least_float32, promote
from jaxnorm.modules import (
    refuse,
    run,
    settings,
    warn,
)
from jaxnorm.running import HELD, MARKS

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
        rngs: key for the initializers, needed only where these are given.
    """

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
        rngs: nnx.Rngs | None = None,
    ):
        shape = (num_features,) if isinstance(num_features, int) else num_features
        inits = {"scale": scale_init, "bias": bias_init}
        absent = {"scale": not use_scale, "bias": not use_bias}
        self.norm = norm
        self.use_running_average = use_running_average
        self.dtype = dtype
        stats_dtype = jnp.float32 if dtype is None else at_least_float32(dtype)
        for k, v in norm.init_stats(shape, stats_dtype).items():
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
            setattr(self, k, nnx.Param(v))

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
    statistics are rounded to it before they are used.
    """

    def __init__(
        self,
        *args,
        unbiased: bool = False,
        activation: str | None = None,
        implementation: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.unbiased = unbiased
        self.activation = activation
        self.implementation = implementation
        if self.momentum is None:
            count = settings(jaxnorm.BatchNorm, self).init_stats(self.mean.shape)
            self.count = nnx.BatchStat(count["count"])

    def __call__(self, x, use_running_average=None, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        norm = settings(jaxnorm.BatchNorm, self)
        return _apply(self, norm, x, flag, mask, inputs={"residual": residual})


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result.
    """

    def __init__(self, *args, implementation: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.implementation = implementation

    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.LayerNorm, self), x, False, mask)


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` is accepted and has no effect. `promote_dtype` decides the dtype
    of the result.
    """

    def __init__(self, *args, implementation: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.implementation = implementation

    def __call__(self, x, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.RMSNorm, self), x, False, mask)


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    def __init__(
        self,
        *args,
        activation: str | None = None,
        implementation: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation

    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        # Flax keeps both the number of groups and their size; one says it all.
        norm = settings(jaxnorm.GroupNorm, self, group_size=None)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


class InstanceNorm(nnx.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    def __init__(
        self,
        *args,
        activation: str | None = None,
        implementation: str | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.implementation = implementation

    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(jaxnorm.InstanceNorm, self, axis=self.feature_axes)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


def signature(cls: type) -> inspect.Signature:
    """Flax's signature of the constructor of `cls`, with what that adds by keyword."""
    flax = inspect.signature(cls.__mro__[1].__init__)
    own = inspect.signature(cls.__init__).parameters.values()
    new = [p for p in own if p.name not in flax.parameters]
    added = [p for p in new if p.kind is p.KEYWORD_ONLY]
    return flax.replace(parameters=[*flax.parameters.values(), *added])


for _named in (BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm):
    _named.__init__.__signature__ = signature(_named)  # pyright: ignore


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
    on_lone_values: Callable[[str], None] = warn,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Array:
    """Applies `norm` to `x` with the variables of `module`."""
    x = jnp.asarray(x)
    shape = norm.axes(x.shape).feature_shape
    marks = [k for k in MARKS if hasattr(module, k)]
    held = {k: getattr(module, k) for k in [*norm.init_stats(shape), *marks]}
    variables = {k: getattr(module, k, None) for k in norm.params}
    params = {k: v[...] for k, v in variables.items() if v is not None}
    stats = {k: v[...] for k, v in held.items()}
    y, stats = run(
        norm,
        x,
        params,
        stats,
        flag=flag,
        mask=mask,
        dtype=_dtype(module, x, stats, params),
        on_lone_values=on_lone_values,
        inputs=inputs,
    )
    if flag is not True and HELD not in held:
        for k, v in held.items():
            v[...] = stats[k]
    return y


def _dtype(module: Any, x: Array, stats: dict, params: dict) -> DTypeLike | None:
    """The dtype that Flax gives the result: `promote_dtype` decides, if there is one.

    It is asked for dtypes only. What it would return is rounded to `dtype`, running
    statistics included, and statistics of rounded inputs are wrong.
    """
    promote_dtype = getattr(module, "promote_dtype", None)
    if promote_dtype is None or module.dtype is not None:
        return module.dtype
    kept = [stats[k] for k in ("mean", "var") if k in stats]
    named = [params.get(k) for k in ("scale", "bias") if hasattr(module, k)]
    with jax.numpy_dtype_promotion("standard"):
        x, *rest = jax.eval_shape(
            lambda *arrays: promote_dtype(arrays, dtype=None), x, *kept, *named
        )
    affine = rest[len(kept) :]
    return promote(*(v.dtype for v in (x, *affine) if v is not None))
