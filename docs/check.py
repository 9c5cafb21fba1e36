"""Checks the built site: no asset of another host, and an entry for each public name.

After `sphinx-build -W -b html docs docs/_build`, from the root of the repository:

    python docs/check.py
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from sphinx.util.inventory import InventoryFile

HERE = Path(__file__).parent
SITE = HERE / "_build"
sys.path.insert(0, str(HERE.parent / "tests"))
import public_names  # noqa: E402

ASSETS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
ASSET_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "modulepreload",
    "preconnect",
    "manifest",
}
REMOTE = re.compile(r"^\s*(https?:)?//", re.I)
STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.I)


class Assets(HTMLParser):
    """Collects what a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        loads = [values.get(name, "") for name in ASSETS.get(tag, ())]
        if tag == "link" and ASSET_LINKS & set(values.get("rel", "").split()):
            loads.append(values.get("href", ""))
        self.found += [value for value in loads if REMOTE.match(value)]
        self.found += STYLE.findall(values.get("style", ""))


def remote_assets() -> Iterator[str]:
    for path in sorted(SITE.rglob("*")):
        if path.suffix not in (".html", ".css", ".svg"):
            continue
        text = path.read_text(errors="replace")
        parser = Assets()
        if path.suffix != ".css":
            parser.feed(text)
        in_styles = STYLE.findall("".join(re.findall(r"<style.*?</style>", text, re.S)))
        found = parser.found + (
            STYLE.findall(text) if path.suffix == ".css" else in_styles
        )
        yield from (f"{path.relative_to(SITE)} loads {asset}" for asset in found)


def missing_names() -> Iterator[str]:
    inventory = InventoryFile.loads((SITE / "objects.inv").read_bytes(), uri="")
    entries = {name for kind in inventory.data.values() for name in kind}
    for module in public_names.MODULES:
        for name in public_names.public(module):
            if f"{module}.{name}" not in entries:
                yield f"{module}.{name} has no entry"


if __name__ == "__main__":
    problems = [*remote_assets(), *missing_names()]
    pages = len([*SITE.rglob("*.html")])
    print(*problems, f"{len(problems)} problems in {pages} pages", sep="\n")
    sys.exit(bool(problems) or not pages)
