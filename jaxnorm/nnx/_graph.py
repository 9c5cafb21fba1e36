"""Which modules and variables is an NNX model made of?"""

from typing import Any

from flax import nnx

from jaxnorm._arguments import shown
from jaxnorm.models._paths import copied
from jaxnorm.nnx._norm import Norm


def activation_of(module: Any) -> str | None:
    settings = module.norm if isinstance(module, Norm) else module
    return getattr(settings, "activation", None)


def class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {shown(model)}: the tools of "
            "jaxnorm itself take the variables of Linen models, such as "
            "jaxnorm.models.fold(variables, pairs)"
        )


def copy_of(model: Any) -> Any:
    """`model` in modules and buffers of its own."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, copied(state))


def become(module: Any, new: Any) -> None:
    """Makes `module` be `new` for all that hold it, in attributes or containers."""
    object.__setattr__(module, "__class__", type(new))
    vars(module).clear()
    vars(module).update(vars(new))


KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def path_of(path: tuple) -> str:
    return "/".join(map(str, path))


def flattened(tree: Any) -> dict[tuple, Any]:
    return nnx.traversals.flatten_mapping(tree)
