"""Markdown files: their tables, read and written, and files that are made anew."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def rows(path: Path) -> list[list[str]]:
    """The cells of all tables in a file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    cells = ([str(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def write(path: Path, text: str) -> None:
    """Leaves a file that holds `text` as it is: Sphinx does not read it anew."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
