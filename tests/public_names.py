"""Every public name of jaxnorm, and what its docstring says first."""

import importlib
import inspect
import re
from typing import Any

import jaxnorm

MODULES = {
    "jaxnorm": "Norms for any model, as pure functions and as settings.",
    "jaxnorm.linen": "Modules of Flax Linen.",
    "jaxnorm.nnx": "Modules of Flax NNX, and what is done with whole NNX models.",
    "jaxnorm.models": "What is done with whole models.",
}


def public(module: str) -> dict[str, Any]:
    """The public names of a module, and what they are."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def docstring(value: Any) -> str:
    """The docstring of `value` itself: a class may inherit another."""
    return inspect.cleandoc(vars(value).get("__doc__") or value.__doc__ or "")


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.match(r".+?\.(?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph


def is_of_a_method(value: Any) -> bool:
    """Whether `value` is a method's class or function, or transforms weights."""
    if inspect.isclass(value):
        return issubclass(value, jaxnorm.Norm) and not inspect.isabstract(value)
    return bool(re.match(r"jaxnorm\._(methods|weights)\.", value.__module__))
