"""Flax NNX: what the constructors of all classes have in common."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from flax import nnx

from jaxnorm._arguments import shown
from jaxnorm._modules import check

P = ParamSpec("P")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that checks the kinds of its arguments before it calls `init`."""
    names = list(inspect.signature(init).parameters)

    @functools.wraps(init)
    def construct(*args: P.args, **kwargs: P.kwargs) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        check(given, nnx.Module)
        _check_rngs(given, names)
        init(*args, **kwargs)

    return construct


class ConstructorSignature:
    """The signature of a class, where `help` and notebooks ask for one.

    They would get `*args, **kwargs`, which is that of the metaclass of NNX.
    """

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("an instance has the signature of its __call__")
        full = inspect.signature(owner.__init__)
        return full.replace(parameters=list(full.parameters.values())[1:])


def _check_rngs(given: Mapping[str, Any], names: list[str]) -> None:
    rngs = given.get("rngs")
    made = [given.get(k, True) for k in ("use_scale", "use_bias") if k in names]
    needless = "norm" in names or (made and not any(made))
    missing = rngs is None and "rngs" in given and not needless
    if missing or not isinstance(rngs, nnx.Rngs | None):
        raise TypeError(f"rngs must be an nnx.Rngs(seed), got {shown(rngs)}")
