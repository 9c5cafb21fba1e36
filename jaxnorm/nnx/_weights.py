"""Flax NNX: wrappers of layers whose kernels are normalized."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import Array
from jax.typing import DTypeLike

from jaxnorm._modules import (
    has_spectrum,
    scale_shape,
    spectral_normed,
    weight_normed,
    weight_standardized,
)
from jaxnorm.nnx._constructor import ConstructorSignature, checked

Path = tuple[Any, ...]  # of a variable, as nnx.to_flat_state gives it
Param = nnx.Param[Any]


class WeightNorm(nnx.WeightNorm):
    """Flax's WeightNorm, which leaves the kernels of the layer as they are.

    Each scale is an nnx.Param in `scales`, under the path of its kernel, of
    `param_dtype`. (Flax 0.12.8 has float32 arrays there, which nothing trains.) What
    `variable_filter` selects among the nnx.Param of the layer is normalized.
    `promote_dtype` is accepted and has no effect, as in Flax.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = nnx.initializers.ones,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: Filter = nnx.PathContains("kernel"),  # noqa: B008
        promote_dtype: PromoteDtypeFn = flax_promote_dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            layer_instance,
            feature_axes=feature_axes,
            use_scale=False,
            scale_init=scale_init,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            variable_filter=variable_filter,
            promote_dtype=promote_dtype,
            rngs=rngs,
        )
        self.use_scale = use_scale
        self.scales = _scales(self, rngs)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer makes of the arguments, its kernels normalized."""
        return effective_layer(self)(x, *args, **kwargs)

    def _transform(self, path: Path, param: Param) -> Array | None:
        return _rescaled(self, weight_normed, path, param)


class WeightStandardization(nnx.Module):
    """Calls a layer with its kernels standardized (`jaxnorm.weight_standardize`).

    The kernels are stored as they are. Each has a trainable gain, an nnx.Param in
    `scales`, as in WeightNorm, whose arguments these are.

    Args:
        layer_instance: the layer, or any module.
        feature_axes: those with a mean and a variance for each index; None gives each
            kernel one.
        use_scale: have a gain.
        scale_init: initializer of the gain.
        epsilon: added to the variance.
        dtype: of the kernels that the layer is called with; by default that of the
            stored ones and the gain together.
        param_dtype: of the gain.
        variable_filter: which nnx.Param of the layer to standardize. Those of one axis
            never are.
        scaled: divide by the square root of the fan-in, too (Brock et al., 2021).
        rngs: key for the initializer.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: nnx.Initializer = nnx.initializers.ones,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Filter = nnx.PathContains("kernel"),  # noqa: B008
        scaled: bool = False,
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(
            nnx.All(_has_fan_in, variable_filter)
        )
        self.scaled = scaled
        self.scales = _scales(self, rngs)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer makes of the arguments, its kernels standardized."""
        return effective_layer(self)(x, *args, **kwargs)

    def _transform(self, path: Path, param: Param) -> Array | None:
        return _rescaled(self, weight_standardized, path, param)


class SpectralNorm(nnx.SpectralNorm):
    """Flax's SpectralNorm, which leaves the kernels of the layer as they are.

    Once `u` has settled, no kernel has a norm above 1, however small it was (Flax makes
    40 of 1e-6, by its `epsilon`), and none of 0 sets `u` to 0 for ever.
    """

    __signature__ = ConstructorSignature()

    @checked
    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            layer_instance,
            n_steps=n_steps,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            error_on_non_matrix=error_on_non_matrix,
            update_stats=update_stats,
            rngs=rngs,
        )

    def __call__(self, x: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Returns what the layer makes of `x`, and of arguments that Flax's does not
        take, its kernels normalized.

        With `update_stats`, the estimates of the singular values are kept for the next
        call; by default it is true after `model.train()` and false after
        `model.eval()`.
        """
        if update_stats is None:
            update_stats = not self.use_running_average

        transform = functools.partial(self._transform, update_stats=update_stats)
        return effective_layer(self, transform)(x, **kwargs)

    def _transform(
        self, path: Path, param: Param, update_stats: bool = False
    ) -> Array | None:
        kernel = param.get_value()
        if not has_spectrum(self, kernel):
            return None
        u, sigma = (
            _of_kernel(self.batch_stats, (*path, name)) for name in ("u", "sigma")
        )
        kernel, new_u, new_sigma = spectral_normed(self, kernel, u[...], sigma[...])
        if update_stats:
            u[...], sigma[...] = new_u, new_sigma
        return kernel

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the default of `not update_stats`; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def effective_layer(
    module: Any, transform: Callable[[Path, Param], Array | None] | None = None
) -> Any:
    """The layer of `module` with the kernels that it computes with.

    `transform` gives the value, or None for what stays, by path and parameter; it is
    that of `module` by default. The layer is one beside the stored one: it shares all
    variables but those given a value, so that statistics, caches and random keys are
    updated as ever, and nothing that is stored is written to. So it also works where
    writing is not allowed, such as in a gradient by the input, taken by jax.grad of a
    closure.
    """
    value_of = transform or module._transform
    graphdef, state = nnx.split(module.layer_instance)
    effective = []
    for path, v in nnx.to_flat_state(state):
        value = value_of(path, v) if isinstance(v, nnx.Param) else None
        effective.append((path, v if value is None else v.replace(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(effective))


def _has_fan_in(path: Path, param: Param) -> bool:
    return param.ndim >= 2


def _rescaled(
    module: Any,
    function: Callable[[Any, Array, Array | None], Array],
    path: Path,
    param: Param,
) -> Array | None:
    """`function` of the kernel and its scale, if `module` normalizes it."""
    if not module.variable_filter(path, param):
        return None
    scale = _of_kernel(module.scales, path)[...] if module.use_scale else None
    return function(module, param.get_value(), scale)


def _scales(module: Any, rngs: nnx.Rngs) -> Any:
    """A scale for each kernel that `module` normalizes, by path, or None."""
    if not module.use_scale:
        return None
    return nnx.data(
        {
            path: nnx.Param(
                module.scale_init(
                    rngs.params(), scale_shape(module, v), module.param_dtype
                )
            )
            for path, v in nnx.to_flat_state(
                nnx.state(module.layer_instance, nnx.Param)
            )
            if module.variable_filter(path, v)
        }
    )


def _of_kernel(
    variables: Mapping[Path, nnx.Variable[Any]], path: Path
) -> nnx.Variable[Any]:
    if path not in variables:
        raise ValueError(
            f"nothing is kept for the parameter {'/'.join(map(str, path))} of the "
            f"layer, but for {list(variables)}: add and rename parameters before the "
            "layer is wrapped"
        )
    return variables[path]
