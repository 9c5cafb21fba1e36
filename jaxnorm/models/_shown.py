"""How is a report shown: as text, and in a notebook?"""

import abc
import io
from typing import Any

WIDTH = 10_000  # of what is no terminal: lines are as long as they must be


class Shown(abc.ABC):
    """What shows the same rich table everywhere, in colours where there are some."""

    @abc.abstractmethod
    def __rich__(self) -> Any:
        """The table."""

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _repr_mimebundle_(self, include: Any = (), exclude: Any = (), **_: Any) -> Any:
        from rich.jupyter import JupyterMixin

        mixin: Any = JupyterMixin
        return mixin._repr_mimebundle_(self, include, exclude)
