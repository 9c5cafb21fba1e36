"""Flax Linen: modules whose arguments are checked when they are made."""

import dataclasses

from flax import linen as nn

from jaxnorm._modules import (
    check,
)


class Checked:
    """A module that raises for an argument of a wrong kind when it is made."""

    def __post_init__(self):
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        check(given, nn.Module)
        parts = given.get("variable_filter")
        if isinstance(parts, str):
            raise TypeError(
                f"variable_filter must be a set of parts of names, got {parts!r}, a "
                f"set of letters: pass {{{parts!r}}}"
            )
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
