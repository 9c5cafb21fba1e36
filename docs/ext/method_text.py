"""What a method says of itself: its module's docstring, settings and variables."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import public_names
from norms import NORMS

import jaxnorm

FEATURES = 6
SOURCE = re.compile(r"(?P<title>.+?) \((?P<authors>.+?), (?P<url>https://\S+)\)\.")


@dataclasses.dataclass
class Method:
    """A method or a weight transform: its function, and its class where it has one."""

    function: Callable[..., Any]
    settings: type[jaxnorm.Norm] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @cached_property
    def _paragraphs(self) -> list[str]:
        doc = inspect.cleandoc(sys.modules[self.function.__module__].__doc__ or "")
        return doc.split("\n\n")

    @cached_property
    def _source(self) -> dict[str, str]:
        found = SOURCE.match(" ".join(self._paragraphs[0].split()))
        assert found, f"{self.name}: no `Title (Authors, year, https://...).`"
        return found.groupdict()

    @property
    def title(self) -> str:
        return self._source["title"]

    @property
    def paper(self) -> str:
        return f"[{self._source['authors']}]({self._source['url']})"

    @property
    def formulas(self) -> list[str]:
        return [line.strip() for line in self._paragraphs[1].splitlines()]

    @property
    def more(self) -> str:
        """What the docstring says beyond the lines that every method has."""
        return "\n\n".join(self._paragraphs[3:])

    def says(self, key: str) -> str:
        """What stands after `key`, such as "Take it for", in one line."""
        text = re.sub(r"\n    ", " ", self._paragraphs[2])
        found = re.search(rf"^{key}: (.+)$", text, re.M)
        assert found, f"{self.name}: no line `{key}: ...`"
        return found[1]

    @property
    def summary(self) -> str:
        value = self.settings or self.function
        return public_names.first_sentence(public_names.docstring(value))

    @property
    def keeps_statistics(self) -> bool:
        return bool(self.settings and self.settings.has_stats)

    @property
    def row(self) -> Any:
        """The first of the method's rows in the table of everything under test."""
        return next(r for r in NORMS.values() if type(r.norm) is self.settings)

    def arrays(self) -> dict[str, dict[str, Any]]:
        """The arrays in params and in batch_stats."""
        if not self.settings:
            return {}
        norm = self.row.norm
        params, stats = norm.init_params((FEATURES,)), norm.init_stats((FEATURES,))
        return {"params": params, "batch_stats": stats}

    def example(self) -> str:
        """The settings of `row`, as code."""
        fields = dataclasses.fields(self.row.norm)
        given = {f.name: getattr(self.row.norm, f.name) for f in fields}
        changed = [
            f"{f.name}={given[f.name]!r}" for f in fields if given[f.name] != f.default
        ]
        return f"{type(self.row.norm).__name__}({', '.join(changed)})"

    def fields(self) -> list[tuple[str, str, str]]:
        """Each setting: name, default and meaning."""
        if not self.settings:
            return []
        doc = inspect.getdoc(self.settings) or ""
        text = re.sub(r"\n {8,}", " ", doc.split("Attributes:\n")[1])
        meanings = dict(re.findall(r"^    (\w+): (.+)$", text, re.M))
        fields = dataclasses.fields(self.settings)
        return [(f.name, repr(f.default), meanings[f.name]) for f in fields]


def methods() -> list[Method]:
    public = public_names.public("jaxnorm")
    classes = [v for v in public.values() if inspect.isclass(v)]
    found = [cls for cls in classes if public_names.is_of_a_method(cls)]
    return [Method(public[c.__module__.rpartition(".")[2]], c) for c in found]


def weight_transforms() -> list[Method]:
    functions = public_names.public("jaxnorm").values()
    return [Method(f) for f in functions if "._weights." in f.__module__]
