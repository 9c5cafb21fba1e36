"""The sources of the site: every page in its tree, every name with an entry."""

import importlib
import inspect
import re
from pathlib import Path

import public_names
import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and not path.name.startswith("_")
]
DIRECTIVE = re.compile(r"^\.\. (currentmodule|autoclass|autofunction):: (\S+)$", re.M)
METHODS = {
    value.__name__: inspect.getmodule(value)
    for value in public_names.public("jaxnorm").values()
    if inspect.isfunction(value) and public_names.is_of_a_method(value)
}


def is_generated(page: str) -> bool:
    """Whether the build writes it: a page of a method, or of an experiment."""
    folder, _, name = page.partition("/")
    return (folder == "norms" and name in METHODS) or folder == "evidence"


def tree() -> set[str]:
    """The pages that the tables of contents name."""
    named = {"index"}
    for page in PAGES:
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S
        ):
            entries = [e for e in block.split() if not e.startswith(":")]
            paths = [(page.parent / e).resolve() for e in entries if not e.isdigit()]
            named |= {path.relative_to(DOCS).as_posix() for path in paths}
    return named


def entries() -> set[str]:
    """The names that pages of the API describe."""
    found = set()
    for page in sorted((DOCS / "api").glob("*.md")):
        module = ""
        for kind, name in DIRECTIVE.findall(page.read_text()):
            if kind == "currentmodule":
                module = name
            else:
                found.add(f"{module}.{name}")
    return found


def test_every_page_is_in_the_tree():
    named = tree()
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES}
    assert {p for p in pages if not is_generated(p)} - named == set()
    assert {p for p in named if not is_generated(p)} - pages == set()


@pytest.mark.parametrize("module", public_names.MODULES)
def test_every_public_name_has_an_entry(module):
    described = entries()
    public = public_names.public(module).items()
    others = [k for k, v in public if not public_names.is_of_a_method(v)]
    assert [name for name in others if f"{module}.{name}" not in described] == []


def test_every_entry_is_a_public_name():
    for name in entries():
        module, _, short = name.rpartition(".")
        assert short in public_names.public(module), name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_its_page_needs(name):
    head, formula, lines, *_ = (METHODS[name].__doc__ or "").strip().split("\n\n")
    assert re.fullmatch(r".+ \(.+, https://\S+\)\.", head.replace("\n", " "))
    assert all(re.match(r"    \S", line) for line in formula.splitlines())
    keys = re.findall(r"^(\w.*?): ", lines, re.M)
    assert keys == ["Statistics over", "Take it for", "Not for"]
    assert all(text.endswith(".") for text in re.split(r"\n(?=\w)", lines))


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix()
)
def test_names_and_tests_in_pages_are_there(page):
    text = page.read_text()
    for name in re.findall(r"\{py:obj\}`(?:[^`<]*<)?([\w.]+)>?`", text):
        module, _, short = name.rpartition(".")
        assert hasattr(importlib.import_module(module), short), name
    for path, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert f"def {test}(" in (DOCS.parent / path).read_text(), f"{path}::{test}"
