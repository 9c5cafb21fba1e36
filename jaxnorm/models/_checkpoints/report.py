"""What became of each array of a checkpoint?"""

import dataclasses
from typing import Any, NamedTuple

from jaxnorm.models._shown import Shown


class Mapped(NamedTuple):
    """A leaf that was read, the key it was read from, and how it was changed."""

    path: str
    key: str
    change: str


@dataclasses.dataclass(frozen=True)
class Report(Shown):
    """What became of each array in `from_checkpoint`; prints as a table.

    Attributes:
        mapped: the leaves that were read.
        dropped: keys that the model has no use for, such as "num_batches_tracked".
        ignored: keys that were not used because `ignore` or `keep` said so.
        kept: leaves that are the template's because `keep` said so.
    """

    mapped: tuple[Mapped, ...]
    dropped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for row in self.mapped:
            table.add_row(*map(Text, row))
        others = ("dropped", "ignored", "kept")
        lines = [f"{name}: {key}" for name in others for key in getattr(self, name)]
        return Group(table, *map(Text, lines))
