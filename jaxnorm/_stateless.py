"""Norms by the statistics of the array at hand, in training and evaluation alike."""

from collections.abc import Sequence
from typing import Any, final

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._activation import add_residual
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import ActivatedNorm, Norm, Params, Stats
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm._marks import MARKS, without
from jaxnorm._mesh import apply_automatically
from jaxnorm._running import as_arrays
from jaxnorm._sharding import on_explicit_mesh


class StatelessNorm(Norm):
    """A norm by the moments of its input, in training and evaluation alike."""

    has_stats = False

    @final
    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Nothing: the method keeps no statistics."""
        return {}

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        """Normalizes by the moments over `axes`, unless a method says otherwise."""
        return self.normalize_by_batch(x, params, mask=mask, dtype=dtype)[0]

    @final
    def apply(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        use_running_average: bool | Array,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        how = {"mask": mask, "dtype": dtype, **inputs}
        if on_explicit_mesh(x, params, stats, how):
            how["use_running_average"] = use_running_average
            return apply_automatically(self, x, params, stats, how)
        self.check_bound()
        unknown = sorted(without(stats, MARKS))
        if unknown:
            raise ValueError(
                f"{type(self).__name__} keeps no statistics, but stats holds "
                f"{unknown}: pass {{}}"
            )
        y = self.transform(x, params, **how)
        return y, as_arrays(stats)


class KernelNorm(StatelessNorm):
    """A norm with kernels for GPUs, which `implementation` chooses."""

    implementation: str | None = None


class ActivatedKernelNorm(ActivatedNorm, KernelNorm):
    """A norm with kernels for GPUs and an activation."""

    @final
    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        residual: ArrayLike | None = None,
    ) -> Array:
        return self.normalize_by_batch(
            x,
            params,
            mask=mask,
            dtype=dtype,
            activation=self.activation,
            residual=residual,
            implementation=self.implementation,
        )[0]


class ReductionNorm(KernelNorm):
    """A norm over `reduction_axes`, with parameters along `feature_axes`.

    With `zero_centered_scale` the scale is kept less 1, so that weight decay draws it
    to 1. A `residual` at the call, an array or 0, is added before the norm, and the sum
    is returned, too: `(x + residual, y)` instead of y.
    """

    optional_inputs = ("residual",)
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    zero_centered_scale: bool = False

    @final
    def axes(self, shape: Shape) -> Axes:
        return Axes.over(shape, self.reduction_axes, self.feature_axes)

    @final
    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        params = super().init_params(feature_shape, dtype)
        if self.zero_centered_scale:
            params["scale"] = jnp.zeros(feature_shape, dtype)
        return params

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        residual: ArrayLike | None = None,
    ) -> Any:
        passes_on = residual is not None
        x = add_residual(x, residual) if passes_on else x
        params = self.with_whole_scale(x, params)
        how = {"mask": mask, "dtype": dtype, "implementation": self.implementation}
        if passes_on:
            return self.pass_and_normalize_by_batch(x, params, **how)
        return self.normalize_by_batch(x, params, **how)[0]

    @final
    def with_whole_scale(self, x: Array, params: Params) -> Params:
        """`params` with the scale that `x` is multiplied by."""
        scale = params.get("scale")
        if not self.zero_centered_scale or scale is None:
            return params
        scale = jnp.asarray(scale)
        wide = promote(at_least_float32(x.dtype), scale.dtype)
        return {**params, "scale": scale.astype(wide) + 1}
