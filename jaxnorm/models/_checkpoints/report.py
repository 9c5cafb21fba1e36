"""What became of each array of a checkpoint?"""

import dataclasses
from typing import NamedTuple


class Mapped(NamedTuple):
    """A leaf that was read, the key it was read from, and how it was changed."""

    path: str
    key: str
    change: str


@dataclasses.dataclass(frozen=True)
class Report:
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

    def __str__(self) -> str:
        paths, keys = (
            max((len(row[i]) for row in self.mapped), default=0) for i in range(2)
        )
        lines = [f"{p:{paths}}  {k:{keys}}  {c}".rstrip() for p, k, c in self.mapped]
        for name in ("dropped", "ignored", "kept"):
            lines += [f"{name}: {v}" for v in getattr(self, name)]
        return "\n".join(lines)
