"""Docstrings as they are written here, for Sphinx: indented code, tables, stars.

`help()` shows them as they are, so they hold no reStructuredText beyond `names`.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
STARS = re.compile(r"(?<![\w*])\*+(?=\w)")


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def mark_code(lines: Iterable[str]) -> Iterator[str]:
    """Puts `::` before what is indented after a blank line, but in sections."""
    in_section = in_code = blank = False
    for line in lines:
        if line.strip():
            if not indent(line):
                in_section, in_code = bool(SECTION.match(line)), False
            elif indent(line) >= 4 and blank and not (in_section or in_code):
                in_code = True
                yield from ("::", "")
        yield line
        blank = not line.strip()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split(" | ")]


def list_table(rows: list[str]) -> Iterator[str]:
    """A Markdown table as a list-table, at the indent of its first row."""
    space = " " * indent(rows[0])
    yield from (f"{space}.. list-table::", f"{space}   :header-rows: 1", "")
    for row in (rows[0], *rows[2:]):
        for i, cell in enumerate(cells(row)):
            yield f"{space}   {'*' if i == 0 else ' '} - {cell}"
    yield ""


def convert_tables(lines: Iterable[str]) -> Iterator[str]:
    for is_row, group in groupby(lines, lambda line: line.lstrip().startswith("|")):
        found = list(group)
        yield from list_table(found) if is_row else found


def escape_stars(lines: Iterable[str]) -> Iterator[str]:
    """A star before a word, as in `(batch, *features)`, starts no emphasis."""
    for line in lines:
        is_code = re.match(r"\s*(>>>|\.\.\.)", line)
        yield line if is_code else STARS.sub(lambda m: r"\*" * len(m[0]), line)


def process(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = convert_tables(mark_code(escape_stars(lines)))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
