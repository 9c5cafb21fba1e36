"""The table of all public names, written before Sphinx reads pages."""

from pathlib import Path

import public_names
from norm_pages import write
from public_names import docstring, first_sentence
from results import markdown
from sphinx.application import Sphinx

PATH = Path(__file__).parents[1] / "api" / "_names.md"


def table(module: str) -> str:
    body = [
        [f"{{py:obj}}`{name} <{module}.{name}>`", first_sentence(docstring(value))]
        for name, value in public_names.public(module).items()
    ]
    body = [[cell.replace("|", r"\|") for cell in row] for row in body]
    return markdown(("Name", "What it is"), body)


def write_tables(app: Sphinx) -> None:
    parts = [
        f"## {m}\n\n{text}\n\n{table(m)}\n" for m, text in public_names.MODULES.items()
    ]
    write(PATH, "\n".join(parts))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_tables)
    return {"parallel_read_safe": True}
