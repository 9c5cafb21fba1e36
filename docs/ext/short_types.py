"""Types as the source says them: `ArrayLike`, not the eight types that it is."""

from types import NoneType
from typing import Any

from jax.typing import ArrayLike, DTypeLike
from sphinx.application import Sphinx
from sphinx.config import Config

NAMES = {"ArrayLike": ArrayLike, "DTypeLike": DTypeLike}
MEMBERS = {name: set(union.__args__) for name, union in NAMES.items()}


class Formatter:
    """A class, as Sphinx keeps no functions among its settings."""

    def __call__(self, annotation: Any, config: Config) -> str | None:
        """`annotation` with the names of unions in it; None where there is none."""
        members = set(getattr(annotation, "__args__", ()))
        for name, union in MEMBERS.items():
            if union <= members:
                rest = [
                    "None" if m is NoneType else m.__name__ for m in members - union
                ]
                return " | ".join(f"``{part}``" for part in [name, *sorted(rest)])
        return None


def set_formatter(app: Sphinx, config: Config) -> None:
    config.typehints_formatter = Formatter()


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", set_formatter)
    return {"parallel_read_safe": True}
