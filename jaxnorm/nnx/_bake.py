"""How do wrappers of layers disappear from an NNX model?"""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from jaxnorm.nnx._graph import become, check_model, class_of, copy_of, path_of
from jaxnorm.nnx._weights import (
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
    effective_layer,
)

_WRAPPERS = (WeightNorm, SpectralNorm, WeightStandardization)


def bake(model: nnx.Module) -> Any:
    """A copy of `model` for inference, with plain layers in place of its WeightNorm,
    SpectralNorm and WeightStandardization.

    Each layer has the kernels that its wrapper calls it with, in their dtype; scales,
    `u` and `sigma` are gone. `jaxnorm.nnx.fold` may go on with the copy. Layers that
    `nnx.vmap` has stacked are baked within it, as they are called: `nnx.vmap(bake)`;
    nothing shows that they are stacked, and baked without it they are wrong.

    Args:
        model: the module, which stays as it is. It may be a wrapper itself.

    Returns:
        The copy, in buffers of its own.

    Raises:
        TypeError: for what is no model of NNX.
        ValueError: where nothing is wrapped, for a wrapper of Flax's own, and for a
            layer that the model holds without its wrapper, too.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = jaxnorm.nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)
    >>> model = nnx.Sequential(layer, nnx.relu)
    >>> baked = jaxnorm.nnx.bake(model)
    >>> print(type(baked.layers[0]).__name__)
    Linear
    >>> assert jnp.allclose(baked(jnp.ones(2)), model(jnp.ones(2)))
    """
    check_model(model)
    copy = copy_of(model)
    if not _bake(copy):
        raise ValueError(
            "the model holds no WeightNorm, SpectralNorm or WeightStandardization of "
            "jaxnorm.nnx, so that there is nothing to bake: its layers are plain ones "
            "already"
        )
    while _bake(copy):  # a layer that is a wrapper, too
        pass
    return copy


def _bake(model: nnx.Module) -> bool:
    """Puts the layers of all wrappers in their places; returns if there are any.

    A layer that is a wrapper stays one, of what the outer one made of its kernels.
    """
    found: dict[Any, Any] = {
        path: module
        for path, module in nnx.iter_modules(model)
        if _is_wrapper(path, module)
    }
    layers = [module.layer_instance for module in found.values()]
    baked = [effective_layer(module) for module in found.values()]
    for module in found.values():
        module.layer_instance = None
    elsewhere = _params(model)
    for path, layer, new in zip(found, layers, baked, strict=True):
        held = _params(layer, (*path, "layer_instance"))
        _check_alone(path, held.keys() - _params(new).keys(), elsewhere)
        elsewhere |= held
    for module, new in zip(found.values(), baked, strict=True):
        become(module, new)
    return bool(found)


def _is_wrapper(path: tuple[Any, ...], module: Any) -> bool:
    """Whether `module` is one of jaxnorm's wrappers; raises ValueError for others."""
    if not isinstance(module, (*_WRAPPERS, nnx.WeightNorm, nnx.SpectralNorm)):
        return False
    if type(module).__call__ in {kind.__call__ for kind in _WRAPPERS}:
        return True
    raise ValueError(
        f"the wrapper at {path_of(path) or '.'!r} is {class_of(module)}, whose kernels "
        "jaxnorm does not know: take the class from jaxnorm.nnx"
    )


def _params(part: nnx.Module, at: tuple[Any, ...] = ()) -> dict[int, str]:
    """The identities of the parameters of the `part` at a path, and their paths."""
    return {
        id(v): path_of((*at, *path))
        for path, v in nnx.iter_graph(part)
        if isinstance(v, nnx.Param)
    }


def _check_alone(
    path: tuple[Any, ...], kernels: Iterable[int], elsewhere: Mapping[int, str]
) -> None:
    """Raises ValueError if one of the `kernels` of a wrapper is held elsewhere, too."""
    for kernel in elsewhere.keys() & {*kernels}:
        raise ValueError(
            f"the wrapper at {path_of(path) or '.'!r} normalizes a parameter "
            f"that the model also holds at {elsewhere[kernel]!r}, and may use there as "
            "it is: give each a layer of its own"
        )
