"""Flax NNX: one generic module for any norm, and what all norms of the API do."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import PromoteDtypeFn
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _base as base
from jaxnorm._arguments import as_array, as_feature_shape, as_flag
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm._marks import MARKS
from jaxnorm._modules import prepared, refuse, warn
from jaxnorm.nnx._constructor import ConstructorSignature, checked

NO_METADATA: Mapping[str, Any] = MappingProxyType({})
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
        norm: base.Norm,
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
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
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

        `inputs` are what `norm` takes beside `x`, such as the domain of each example.
        """
        flag = self.norm.has_stats and merged_flag(self, use_running_average)
        return apply(self, self.norm, x, flag, mask, refuse, inputs)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the default of `use_running_average`; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def merged_flag(module: Any, at_call: bool | Array | None) -> bool | Array:
    return as_flag(
        first_from(
            at_call,
            module.use_running_average,
            error_msg=_NO_FLAG.format(type(module).__name__),
        )
    )


def apply(
    module: Any,
    norm: base.Norm,
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
    call = prepared(
        norm,
        x,
        params,
        stats,
        inputs,
        flag=flag,
        dtype=_dtype(module, norm, x, stats, params),
        on_single_values=on_single_values,
    )
    how = {"use_running_average": flag, "mask": mask, "dtype": call.dtype, **inputs}
    y, new = norm.apply(call.x, params, call.stats, **how)
    if call.updates:
        for k, v in new.items():
            _write(variables[k], v)
    return y


def _write(variable: nnx.Variable[Any], value: Array) -> None:
    if variable.dtype == value.dtype:
        variable[...] = value
    else:  # which would cast it: a mean has become complex
        variable.set_value(value)


def _dtype(
    module: Any,
    norm: base.Norm,
    x: Array,
    stats: dict[str, Array],
    params: dict[str, Array],
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
