"""The README and the pages: short, linked, and true to what they report."""

import re
from pathlib import Path

import pytest
from markdown_files import rows
from test_site import DOCS, is_generated
from test_site import PAGES as SITE

import jaxnorm

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in TOP), *SITE]
WORK = ("forward", "forward and gradient", "train step")
WEIGHTS = ["weight_standardize", "weight_norm", "spectral_norm"]
# The rows of the README's table, in the results of times and of passes.
COST = {
    "Batch norm": ("batch norm", "BN, train"),
    "Batch norm, evaluation": ("batch norm, evaluation", "BN, inference"),
    "Layer norm": ("layer norm", "LN, train"),
    "RMS norm": ("RMS norm", "RMS, train"),
    "Group norm": ("group norm", "GN, train"),
    "Instance norm": ("instance norm", None),
    "ResNet, a training step": ("ResNet", "ResNet bottleneck, train"),
}


def text(page: Path) -> str:
    """The page without its examples."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text(page), re.M)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_each_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS):
            name = target.relative_to(DOCS).with_suffix("").as_posix()
            if is_generated(name):
                continue
        assert target.exists(), f"{link} is not there"
        assert not heading or heading in headings(target), f"{link} has no such heading"


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_transform_has_a_row(name):
    assert callable(getattr(jaxnorm, name))
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()


def test_contributing_names_every_file():
    package = ROOT / "jaxnorm"
    named = {
        name
        for cells in rows(ROOT / "CONTRIBUTING.md")
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", cells[0])
    }
    assert [name for name in named if not (package / name).exists()] == []
    files = [p.relative_to(package).as_posix() for p in package.rglob("*.py")]
    folders = tuple(name for name in named if name.endswith("/"))
    unnamed = {
        name
        for name in files
        if not name.endswith("__init__.py")
        and name not in named
        and not name.startswith(folders)
    }
    assert unnamed == set()


def test_the_cost_in_the_readme_is_that_of_the_results():
    results = ROOT / "benchmarks" / "results"
    times, passes = {}, {}
    head, *summary = rows(results / "against_peers.md")
    peers = [head.index("flax.linen"), head.index("torch")]
    for cells in summary:
        if len(cells) == len(head) and cells[1] in WORK:
            found = [re.match(r"\*\*([\d.]+)\*\*", cells[i]) for i in peers]
            times.setdefault(cells[0], []).append([m and m[1] for m in found])
    for cells in rows(results / "memory_passes_h100.md"):
        passes.setdefault(cells[0], [cell.split(" ")[0] for cell in cells[3:5]])
    readme = {cells[0]: cells[1:] for cells in rows(ROOT / "README.md")}
    for name, (timed, counted) in COST.items():
        by_peer = [", ".join(values) for values in zip(*times[timed], strict=True)]
        expected = [*by_peer, *(passes[counted] if counted else ["-", "-"])]
        assert readme[name] == expected, name
