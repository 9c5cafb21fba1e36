"""Every public name, and the page docs/api.md that lists them.

From the root of the repository, after a change to a name or a docstring:

    python tests/api_page.py
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import jaxnorm

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MODULES = {
    "jaxnorm": "Norms for any model, as pure functions and as settings.",
    "jaxnorm.linen": "Modules of Flax Linen: [modules.md](modules.md).",
    "jaxnorm.nnx": "Modules of Flax NNX, and what is done with whole NNX models.",
    "jaxnorm.models": "What is done with whole models: [models.md](models.md).",
}
HEAD = """# All public names

Each with the first sentence of its docstring; `help(jaxnorm.BatchNorm)` shows the rest.
Written by `python tests/api_page.py`.
"""


def public(module: str) -> dict[str, Any]:
    """The public names of a module, and what they are."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def docstring(value: Any) -> str:
    """The docstring of `value` itself: a class may inherit another."""
    return inspect.cleandoc(vars(value).get("__doc__") or value.__doc__ or "")


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.match(r".+?\.(?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph


def kind(value: Any) -> str:
    """The section of the page that lists `value`."""
    if inspect.isclass(value):
        is_method = issubclass(value, jaxnorm.Norm) and not inspect.isabstract(value)
        return "Settings" if is_method else "Building blocks and inputs"
    of_methods = re.match(r"jaxnorm\._(methods|weights)\.", value.__module__)
    return "Functions" if of_methods else "Building blocks and inputs"


def table(names: dict[str, Any]) -> str:
    sentences = {k: first_sentence(docstring(v)) for k, v in names.items()}
    cells = {k: v.replace("|", r"\|") for k, v in sentences.items()}
    rows = [f"| `{k}` | {v} |" for k, v in cells.items()]
    return "\n".join(["| Name | What it is |", "|---|---|", *rows])


def page() -> str:
    parts = [HEAD.rstrip()]
    for module, text in MODULES.items():
        names = public(module)
        parts += [f"## {module}", text]
        if module != "jaxnorm":
            parts.append(table(names))
            continue
        for title in ("Settings", "Functions", "Building blocks and inputs"):
            chosen = {k: v for k, v in names.items() if kind(v) == title}
            parts += [f"### {title}", table(chosen)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
