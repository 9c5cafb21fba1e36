"""Math as MathML, written at build time: pages need no script, font or network."""

from collections.abc import Callable
from typing import Any

from docutils.nodes import Element, SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def writer(display: str) -> Callable[[Any, Element], None]:
    def write(self: Any, node: Element) -> None:
        self.body.append(convert(node.astext(), display=display))
        raise SkipNode

    return write


def setup(app: Sphinx) -> dict[str, bool]:
    inline, block = (writer("inline"), None), (writer("block"), None)
    app.add_html_math_renderer("mathml", inline, block)
    return {"parallel_read_safe": True}
