"""Optimized HLO as instructions of computations, with the bytes that each holds."""

import functools
import re
from typing import NamedTuple

ITEM = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
COMMENT = re.compile(r"/\*.*?\*/")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast"}
VIEWS = {"bitcast", "reshape", "transpose", "copy", "convert"}
SLICES = {"slice", "dynamic-slice"}


class Item(NamedTuple):
    """One array of a shape: how many elements, and its bytes in the main memory."""

    elements: int
    bytes: int


def items_of(shape: str) -> list[Item]:
    found = []
    for kind, digits, dims, layout in ITEM.findall(shape):
        elements = 1
        for n in dims.split(","):
            elements *= int(n) if n else 1
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(kind) if not digits else None
        bits = int(digits or 0) if bits is None else bits
        space = re.search(r"S\((\d+)\)", layout)
        elsewhere = space is not None and space[1] != "0"
        found.append(Item(elements, 0 if elsewhere else -(-elements * bits // 8)))
    return found


def bytes_of(shape: str) -> int:
    return sum(item.bytes for item in items_of(shape))


def elements_of(shape: str) -> int:
    return sum(item.elements for item in items_of(shape))


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    inside: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inside)

    @property
    def called(self) -> dict[str, str]:
        return dict(CALLED.findall(self.attributes))

    @property
    def branches(self) -> list[str]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return re.findall(r"[\w.\-]+", listed[1].replace("%", ""))
        return [v for k, v in self.called.items() if k.endswith("_computation")]

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]+)"', self.attributes)
        return found[1] if found else ""

    @property
    def origin(self) -> str:
        found = re.search(r'op_name="([^"]+)"', self.attributes)
        return found[1] if found else ""


def closed(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that opens `text`, and what follows it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def parts_of(shape: str) -> list[str]:
    """The elements of a tuple shape; a plain shape is its only one."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for c in closed(shape)[0]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def read_instruction(line: str) -> Instruction | None:
    line = COMMENT.sub("", line)
    start = START.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    if rest.startswith("("):
        inside, rest = closed(rest)
        shape = f"({inside})"
    else:
        shape, _, rest = rest.partition(" ")
    op, paren, rest = rest.strip().partition("(")
    inside, attributes = closed(paren + rest)
    return Instruction(start[2], shape, op, inside, attributes, bool(start[1]))


class Computation(dict[str, Instruction]):
    """Instructions by name, in their order."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @functools.cached_property
    def results(self) -> list[Instruction]:
        """What the root holds: the elements of its tuple, behind their bitcasts.

        A root of several results that is no tuple, as of a reduction of several arrays
        at once, stands for each of them.
        """
        outer = self.root
        names = [outer.name] * len(parts_of(outer.shape))
        names = outer.operands if outer.op == "tuple" else names
        return [self.behind_bitcasts(name) for name in names]

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each name, the instructions that take it, and at which position."""
        found = {name: [] for name in self}
        for user in self.values():
            for position, name in enumerate(user.operands):
                found[name].append((user, position))
        return found

    def parameter(self, position: int) -> Instruction:
        return next(
            i
            for i in self.values()
            if i.op == "parameter" and int(i.inside) == position
        )

    def behind_bitcasts(self, name: str) -> Instruction:
        found = self[name]
        while found.op == "bitcast":
            found = self[found.operands[0]]
        return found

    def updated_in_place(self, i: Instruction) -> bool:
        """Whether this is a result that is a parameter but for an updated slice."""
        return (
            i.op == "dynamic-update-slice"
            and any(i.name == result.name for result in self.results)
            and self.behind_bitcasts(i.operands[0]).op == "parameter"
        )
