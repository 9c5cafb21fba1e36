"""How is a model called where only shapes are known?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxnorm._arguments import check_function


def check_apply(apply: Any, tool: str, of_nnx: str) -> None:
    """Raises TypeError unless `apply` is a function, which a model is not.

    `of_nnx` is what to call in place of `tool` for a model of NNX.
    """
    if any(c.__module__.startswith("flax.nnx") for c in type(apply).__mro__):
        raise TypeError(
            f"apply must be a function of the variables, got {type(apply).__name__}, "
            f"an NNX model: {of_nnx}"
        )
    if hasattr(apply, "apply"):
        raise TypeError(
            "apply must be a function of the variables, got a model of "
            f"{type(apply).__name__}: pass its method, {tool}(model.apply, ...)"
        )
    check_function("apply", apply)


def by_arrays(
    apply: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[[Any, Sequence[Any]], Any], list[Any]]:
    """`apply` as a function of variables and arrays, and the arrays of its arguments.

    What is no array, such as `train=False`, is passed on as it is.
    """
    values, tree = jax.tree.flatten((args, dict(kwargs)))

    def call(variables: Any, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        args, kwargs = tree.unflatten(next(rest) if _is_array(v) else v for v in values)
        return apply(variables, *args, **kwargs)

    return call, [v for v in values if _is_array(v)]


def _is_array(value: Any) -> bool:
    """Whether `value` is an array, or says the shape and dtype of one."""
    return hasattr(value, "shape") and hasattr(value, "dtype")
