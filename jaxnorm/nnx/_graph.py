"""Which modules and variables is an NNX model made of?"""

from typing import Any

from flax import nnx

from jaxnorm._arguments import shown
from jaxnorm.models._paths import copied
from jaxnorm.nnx._norm import Norm


def activation_of(module: Any) -> str | None:
    """The activation that a norm applies, if it has one."""
    settings = module.norm if isinstance(module, Norm) else module
    return getattr(settings, "activation", None)


def class_of(module: Any) -> str:
    """The class of a module with the name of its own module, for a message."""
    return f"{type(module).__module__}.{type(module).__name__}"


def check_model(model: Any) -> None:
    """Raises TypeError unless `model` is an NNX module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {shown(model)}: the tools of "
            "jaxnorm itself take the variables of Linen models, such as "
            "jaxnorm.models.fold(variables, pairs)"
        )


def copy_of(model: Any) -> Any:
    """A copy of `model`, in modules and buffers of its own."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, copied(state))


def become(module: Any, new: Any) -> None:
    """Turns `module` into `new` for everything that refers to it."""
    object.__setattr__(module, "__class__", type(new))
    vars(module).clear()
    vars(module).update(vars(new))


KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}  # by their collections


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a module or variable as one string, "layers/1"."""
    return "/".join(map(str, keys))


def flattened(tree: Any) -> dict[tuple[Any, ...], Any]:
    """The arrays of nested mappings, by their keys."""
    return nnx.traversals.flatten_mapping(tree)
