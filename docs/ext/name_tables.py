"""The table of all public names, written before Sphinx reads pages."""

from pathlib import Path

import markdown_files
import public_names
from public_names import docstring, first_sentence
from sphinx.application import Sphinx

PATH = Path(__file__).parents[1] / "api" / "_names.md"


def table(module: str) -> str:
    body = [
        [f"{{py:obj}}`{name} <{module}.{name}>`", first_sentence(docstring(value))]
        for name, value in public_names.public(module).items()
    ]
    return markdown_files.table(("Name", "What it is"), body)


def write_tables(app: Sphinx) -> None:
    parts = [
        f"## {m}\n\n{text}\n\n{table(m)}\n" for m, text in public_names.MODULES.items()
    ]
    markdown_files.write(PATH, "\n".join(parts))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_tables)
    return {"parallel_read_safe": True}
