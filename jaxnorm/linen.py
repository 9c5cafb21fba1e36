"""Flax Linen: one generic module for any norm, and the classes that Flax has.

The named classes inherit their constructors and defaults from the Flax that is
installed, so that they follow it; what they compute is jaxnorm's.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm.arguments import as_array
from jaxnorm.base import as_flag
from jaxnorm.modules import (
    check,
    has_spectrum,
    refuse,
    run,
    scale_shape,
    settings,
    spectral_normed,
    stats_dtype,
    warn,
    weight_normed,
    weight_standardized,
)
from jaxnorm.running import HELD, MARKS

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardization",
]


def __dir__() -> list[str]:
    return __all__


class _Checked:
    """A module that raises for an argument of a wrong kind when it is made."""

    def __post_init__(self):
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        check(given, nn.Module)
        parts = given.get("variable_filter")
        if isinstance(parts, str):
            raise TypeError(
                f"variable_filter must be a set of parts of names, got {parts!r}, a "
                f"set of letters: pass {{{parts!r}}}"
            )
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]


class Norm(_Checked, nn.Module):
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


class BatchNorm(_Checked, nn.BatchNorm):
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
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        norm = settings(jaxnorm.BatchNorm, self)
        return _apply(self, norm, x, flag, mask, inputs={"residual": residual})


class LayerNorm(_Checked, nn.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32.
    """

    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.LayerNorm, self), x, False, mask)


class RMSNorm(_Checked, nn.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    the mean square is taken in at least float32.
    """

    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.RMSNorm, self), x, False, mask)


class GroupNorm(_Checked, nn.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    activation: str | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(jaxnorm.GroupNorm, self)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


class InstanceNorm(_Checked, nn.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` and `force_float32_reductions` are accepted and have no effect:
    there is one formula, exact and in at least float32. Beyond Flax's arguments,
    `residual`, at the call, is added to the result, and `activation` applied to it.
    """

    activation: str | None = dataclasses.field(default=None, kw_only=True)
    implementation: str | None = dataclasses.field(default=None, kw_only=True)

    @nn.compact
    def __call__(self, x, *, mask=None, residual=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(jaxnorm.InstanceNorm, self, axis=self.feature_axes)
        return _apply(self, norm, x, False, mask, inputs={"residual": residual})


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
    x = as_array("x", x)
    shape = norm.axes(x.shape).feature_shape
    initial = norm.init_stats(shape, stats_dtype(x.dtype, module.dtype))
    held = {
        k: module.variable("batch_stats", k, lambda v=v: v) for k, v in initial.items()
    }
    marks = [k for k in MARKS if module.has_variable("batch_stats", k)]
    held |= {k: module.variable("batch_stats", k) for k in marks}
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
    if flag is not True and not initializing and HELD not in held:
        for k, v in held.items():
            v.value = stats[k]
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
    """While initializing, a single example is as good as many."""


class WeightNorm(_Checked, nn.WeightNorm):
    """Flax's WeightNorm, which leaves the kernels of the layer as they are.

    Flax's stores them normalized when it initializes. Layers with statistics of their
    own, such as batch norm, may be wrapped too. Only what is in `params` is normalized,
    also with `variable_filter=None`.
    """

    @nn.compact
    def __call__(self, *args, **kwargs):
        """Returns what the layer makes of the arguments, its kernels normalized."""
        transform = functools.partial(_rescaled, self, weight_normed)
        return _call_layer(self, transform, args, kwargs)


class WeightStandardization(_Checked, nn.Module):
    """Calls a layer with its kernels standardized (`jaxnorm.weight_standardize`).

    The kernels are stored as they are. Each has a trainable gain, named `scale`, as in
    WeightNorm, whose arguments these are.

    Attributes:
        layer_instance: the layer, or any module.
        epsilon: added to the variance.
        dtype: of the kernels that the layer is called with; by default that of the
            stored ones and the gain together.
        param_dtype: of the gain.
        use_scale: have a gain.
        scale_init: initializer of the gain.
        feature_axes: those with a mean and a variance for each index; None gives each
            kernel one.
        variable_filter: standardize the parameters whose path, joined by `/`, contains
            one of these; None standardizes all. Those of one axis never are.
        scaled: divide by the square root of the fan-in, too (Brock et al., 2021).
    """

    layer_instance: nn.Module
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    feature_axes: int | Sequence[int] | None = -1
    variable_filter: Iterable[str] | None = dataclasses.field(
        default_factory=lambda: {"kernel"}
    )
    scaled: bool = False

    @nn.compact
    def __call__(self, *args, **kwargs):
        """Returns what the layer makes of the arguments, its kernels standardized."""

        def transform(name, kernel):
            if kernel.ndim < 2:
                return kernel
            return _rescaled(self, weight_standardized, name, kernel)

        return _call_layer(self, transform, args, kwargs)


class SpectralNorm(_Checked, nn.SpectralNorm):
    """Flax's SpectralNorm, which leaves the kernels of the layer as they are.

    Flax's stores them normalized when it initializes, and whenever all collections are
    mutable. Once `u` has settled, no kernel has a norm above 1, however small it was
    (Flax makes 40 of 1e-6, by its `epsilon`), and none of 0 sets `u` to 0 for ever.
    """

    @nn.compact
    def __call__(self, *args, update_stats: bool, **kwargs):
        """Returns what the layer makes of the arguments, its kernels normalized.

        With `update_stats`, the estimates of the singular values are kept for the next
        call; their collection must be mutable.
        """

        def transform(name, kernel):
            if not has_spectrum(self, kernel):
                return kernel
            held = functools.partial(self.variable, self.collection_name)
            u = held(f"{name}/u", lambda: self._first_u(kernel.shape[-1]))
            sigma = held(f"{name}/sigma", lambda: jnp.ones((), self.param_dtype))
            kernel, new_u, new_sigma = spectral_normed(
                self, kernel, u.value, sigma.value
            )
            if update_stats:
                u.value, sigma.value = new_u, new_sigma
            return kernel

        return _call_layer(self, transform, args, kwargs)

    def _first_u(self, features: int) -> Array:
        return jax.random.normal(
            self.make_rng("params"), (1, features), self.param_dtype
        )


def _call_layer(
    module: Any, transform: Callable[[str, Array], Array], args: tuple, kwargs: dict
) -> Any:
    """Calls the layer of `module` on parameters that `transform` maps by their names.

    What the layer stores are the parameters before this map.
    """

    def name(path):
        keys = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        return f"{module.layer_instance.name}/{keys}"

    if module.is_initializing():
        # Creates the variables; map_variables could, but it would store them mapped.
        module.layer_instance(*args, **kwargs)
    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        lambda variables: jax.tree_util.tree_map_with_path(
            lambda path, v: transform(name(path), jnp.asarray(v)), variables
        ),
    )(module.layer_instance)


def _rescaled(
    module: Any,
    function: Callable[[Any, Array, Array | None], Array],
    name: str,
    kernel: Array,
) -> Array:
    """`function` of the kernel and its scale, if `module` normalizes it."""
    parts = module.variable_filter
    if parts and not any(part in name for part in parts):
        return kernel
    scale = None
    if module.use_scale:
        shape = scale_shape(module, kernel)
        scale = module.param(
            f"{name}/scale", module.scale_init, shape, module.param_dtype
        )
    return function(module, kernel, scale)
