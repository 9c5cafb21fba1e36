"""How does flax.serialization write the moments of inputs?

As their arrays, in dicts; the feature axis is that of what they are restored to.
"""

import dataclasses
from typing import Any

from flax import serialization

from jaxnorm._standardizer import Standardizer
from jaxnorm._tree_standardizer import TreeStandardizer


def _names(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if not f.metadata.get("static")]


def _to_state(value: Any) -> dict[str, Any]:
    names = _names(type(value))
    return {k: serialization.to_state_dict(getattr(value, k)) for k in names}


def _from_state(like: Any, state: dict[str, Any]) -> Any:
    names = _names(type(like))
    if {*state} != {*names}:
        raise ValueError(
            f"a {type(like).__name__} consists of {', '.join(names)}, got "
            f"{', '.join(state)}: restore what was saved of one"
        )
    parts = (
        serialization.from_state_dict(getattr(like, k), state[k], k) for k in names
    )
    return dataclasses.replace(like, **dict(zip(names, parts, strict=True)))


def register() -> None:
    """Makes both known to flax.serialization."""
    for kind in (Standardizer, TreeStandardizer):
        serialization.register_serialization_state(
            kind, _to_state, _from_state, override=True
        )
