"""Flax Linen: wrappers that call a layer with its kernels normalized."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from jaxnorm._modules import (
    has_spectrum,
    scale_shape,
    spectral_normed,
    weight_normed,
    weight_standardized,
)
from jaxnorm.linen._checked import Checked


class WeightNorm(Checked, nn.WeightNorm):
    """Flax's WeightNorm, which leaves the kernels of the layer as they are.

    Flax's stores them normalized when it initializes. Layers with statistics of their
    own, such as batch norm, may be wrapped too. Only what is in `params` is normalized,
    also with `variable_filter=None`.
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer makes of the arguments, its kernels normalized."""
        transform = functools.partial(_rescaled, self, weight_normed)
        return _call_layer(self, transform, args, kwargs)


class WeightStandardization(Checked, nn.Module):
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
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer makes of the arguments, its kernels standardized."""

        def transform(name: str, kernel: Array) -> Array:
            if kernel.ndim < 2:
                return kernel
            return _rescaled(self, weight_standardized, name, kernel)

        return _call_layer(self, transform, args, kwargs)


class SpectralNorm(Checked, nn.SpectralNorm):
    """Flax's SpectralNorm, which leaves the kernels of the layer as they are.

    Flax's stores them normalized when it initializes, and whenever all collections are
    mutable. Once `u` has settled, no kernel has a norm above 1, however small it was
    (Flax makes 40 of 1e-6, by its `epsilon`), and none of 0 sets `u` to 0 for ever.
    """

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Returns what the layer makes of the arguments, its kernels normalized.

        With `update_stats`, the estimates of the singular values are kept for the next
        call; their collection must be mutable.
        """

        def transform(name: str, kernel: Array) -> Array:
            if not has_spectrum(self, kernel):
                return kernel
            variable = functools.partial(self.variable, self.collection_name)
            u = variable(f"{name}/u", lambda: self._first_u(kernel.shape[-1]))
            sigma = variable(f"{name}/sigma", lambda: jnp.ones((), self.param_dtype))
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
    module: Any,
    transform: Callable[[str, Array], Array],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls the layer of `module` on parameters that `transform` maps by their names.

    What the layer stores are the parameters before this map.
    """

    def name(path: tuple[Any, ...]) -> str:
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
