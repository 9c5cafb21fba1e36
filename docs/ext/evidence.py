"""Writes the pages of the evidence from the experiments and what they have found.

A page is made of the docstring of the experiment, which is Markdown, and of its
results: the verdict, the rule, the figure and the tables. Experiments are neither
imported nor run. The pages are written before Sphinx reads its sources.
"""

import ast
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import markdown_files
from markdown_files import table

ROOT = Path(__file__).parents[2]
PACKAGE, PAGES = ROOT / "experiments", ROOT / "docs" / "evidence"


def names() -> list[str]:
    """The experiments that have results, in their order."""
    every = runpy.run_path(str(PACKAGE / "__init__.py"))["NAMES"]
    return [n for n in every if (PACKAGE / "results" / f"{n}.json").exists()]


def docstring(path: Path) -> tuple[str, str]:
    """The first line of a file's docstring, and the rest."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    title, _, rest = text.partition("\n")
    return title.removesuffix("."), rest.strip()


def results(name: str) -> dict[str, Any]:
    return json.loads((PACKAGE / "results" / f"{name}.json").read_text())


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def comparisons(found: Mapping[str, Any]) -> str:
    """A row for each comparison: what it says, what the runs show, and its verdict."""
    head = ["Comparison", "Left", "Right", "Difference", "95 % interval", "Verdict"]
    return table(head, map(comparison, found.values()))


def comparison(judged: Mapping[str, Any]) -> list[str]:
    right = judged["right"] if judged["comparison"]["right"] else None
    sides = (judged["left"], right, judged["difference"])
    interval = f"{number(judged['low'])} to {number(judged['high'])}"
    says = judged["comparison"]["says"]
    return [says, *map(number, sides), interval, judged["verdict"]]


def how_run(found: Mapping[str, Any]) -> str:
    """Seeds, time, machine and versions of the results."""
    seeds = {judged["seeds"] for judged in found["rule"].values()}
    packages = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    return (
        f"The results are of {max(seeds)} runs of each arm, took "
        f"{found['seconds'] / 60:.1f} minutes on {found['machine']}, with {packages}."
    )


def page(name: str) -> str:
    """The page of one experiment, in MyST Markdown."""
    title, text = docstring(PACKAGE / "claims" / f"{name}.py")
    found = results(name)
    shown = "\n\n".join(
        f"{entry['title']}:\n\n{table(entry['head'], entry['rows'])}"
        for entry in found["tables"]
    )
    return f"""# {title}

**{found["verdict"].capitalize()}.** {found["sentence"]}

![{title}]({name}.svg)

## The experiment

{text}

## The rule

The claim is held if all of these are, each by the 95 % interval of the difference, left
less right. The rule was written before the run.

{comparisons(found["rule"])}

Beside the rule, deciding nothing:

{comparisons(found["beside"])}

## Numbers

Means over the runs, ± half the distance of the highest from the lowest.

{shown}

## Repeat it

    python -m experiments {name}

{how_run(found)} Every run is in
`experiments/results/{name}.json`, the program in `experiments/claims/{name}.py`.
"""


def index() -> str:
    """The table of all claims, and what is common to them."""
    title, text = docstring(PACKAGE / "__init__.py")
    rows = []
    for name in names():
        found = results(name)
        claim, _ = docstring(PACKAGE / "claims" / f"{name}.py")
        link = f"[{claim}]({name}.md)"
        rows.append([link, found["verdict"], found["sentence"]])
    toctree = "\n".join(names())
    return f"""# Evidence

{title}.

{table(["Claim", "Here", "What was seen"], rows)}

{text}

```{{toctree}}
:hidden:

{toctree}
```
"""


def write(folder: Path = PAGES) -> None:
    """Writes all pages; those that would stay as they are are not touched."""
    pages = {name: page(name) for name in names()} | {"index": index()}
    for name, text in pages.items():
        markdown_files.write(folder / f"{name}.md", text)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", lambda app: write())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
