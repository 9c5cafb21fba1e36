"""The kernels of a program in HLO, and what each reads and writes."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from hlo import (
    COMMENT,
    FREE,
    FREE_CALLS,
    HEAD,
    SLICES,
    VIEWS,
    Computation,
    Instruction,
    bytes_of,
    elements_of,
    parts_of,
    read_instruction,
)


class Kernel(NamedTuple):
    """What one kernel moves through memory, in bytes, each time it runs.

    `origin` is the operation of the program that it, or its last part, came from.
    `product` says that it holds a matrix product or a convolution, `uncertain` that it
    is in one of several branches or in a loop that runs an unknown number of times.
    """

    name: str
    op: str
    origin: str
    read: int
    written: int
    product: bool
    times: int = 1
    uncertain: bool = False

    @property
    def bytes(self) -> int:
        return self.times * (self.read + self.written)


class Program:
    """Optimized HLO, as computations that call each other."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            head = HEAD.match(COMMENT.sub("", line))
            if head:
                current = self.computations[head[2]] = Computation()
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                instruction = read_instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction
        if not self.entry:
            raise ValueError(
                "no ENTRY computation: this is not the text of an HLO module"
            )

    def kernels(self, name: str) -> Iterator[Kernel]:
        """The kernels that run when this computation does."""
        computation = self.computations[name]
        for i in computation.values():
            if i.op == "while":
                yield from self._loop(i)
            elif i.op == "conditional":
                yield from self._worst_branch(i)
            elif i.op in ("call", "async-start"):
                inner = i.called.get("to_apply") or i.called["calls"]
                yield from self.kernels(inner)
            elif self._runs(i):
                yield self._kernel(computation, i)

    def _runs(self, i: Instruction) -> bool:
        free = i.op in FREE or i.op.endswith(("-done", "-update"))
        return not free and i.target not in FREE_CALLS

    def _loop(self, i: Instruction) -> Iterator[Kernel]:
        times = self._trips(i)
        for part, runs in (("condition", (times or 0) + 1), ("body", times or 1)):
            for k in self.kernels(i.called[part]):
                yield k._replace(
                    times=k.times * runs, uncertain=k.uncertain or times is None
                )

    def _trips(self, i: Instruction) -> int | None:
        """How often a loop runs, if XLA notes it or its condition is `i < constant`.

        A `lax.scan` counts from 0 by 1, so that the constant is the number.
        """
        noted = re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"', i.attributes)
        if noted:
            return int(noted[1])
        inside = list(self._flat(i.called["condition"]))
        compares = [j for j in inside if j.op == "compare"]
        limits = [
            j.inside
            for j in inside
            if j.op == "constant" and re.match(r"[su]\d+\[\]", j.shape)
        ]
        if len(compares) != 1 or len(limits) != 1:
            return None
        below = "direction=LT" in compares[0].attributes
        return int(limits[0]) if below else None

    def _flat(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation and of those that it calls."""
        for i in self.computations[name].values():
            yield i
            for inner in i.called.values():
                yield from self._flat(inner)

    def _worst_branch(self, i: Instruction) -> list[Kernel]:
        branches = [list(self.kernels(name)) for name in i.branches]
        worst = max(branches, key=lambda ks: sum(k.bytes for k in ks))
        return [k._replace(uncertain=True) for k in worst]

    def _kernel(self, computation: Computation, i: Instruction) -> Kernel:
        return Kernel(
            i.name,
            i.target or i.op,
            i.origin or self._inner_origin(i),
            self._read(computation, i),
            self._written(computation, i),
            self._is_product(i),
        )

    def _inner_origin(self, i: Instruction) -> str:
        inner = i.called.get("calls")
        return self.computations[inner].root.origin if inner else ""

    def _is_product(self, i: Instruction) -> bool:
        if i.target.startswith(("__cublas", "__cudnn")):
            return True
        inner = self._flat(i.called["calls"]) if i.op == "fusion" else [i]
        return any(j.op in ("dot", "convolution") for j in inner)

    def _read(self, computation: Computation, i: Instruction) -> int:
        parts: dict[str, float] = {}
        for position, name in enumerate(i.operands):
            part = self._part_read(computation, i, position)
            parts[name] = min(1.0, parts.get(name, 0.0) + part)
        sizes = {name: bytes_of(computation[name].shape) for name in parts}
        return sum(round(part * sizes[name]) for name, part in parts.items())

    def _part_read(
        self, computation: Computation, i: Instruction, position: int
    ) -> float:
        """Which part of an operand this instruction, run by itself, reads."""
        op = i.op.removesuffix("-start")
        if op == "dynamic-update-slice" and position == 0:
            return 0.0
        if op == "fusion":
            return self._part_used(self.computations[i.called["calls"]], position)
        if op in SLICES and position == 0:
            whole = elements_of(computation[i.operands[0]].shape)
            return elements_of(result_of(i)) / whole if whole else 0.0
        return 1.0

    def _part_used(self, computation: Computation, position: int) -> float:
        """Which part of a parameter a fused computation reads."""

        def used(name: str) -> float:
            if name == computation.root.name:
                return 1.0
            return sum(used_by(*use) for use in computation.users[name])

        def used_by(i: Instruction, at: int) -> float:
            if i.op in VIEWS:
                return used(i.name)
            if i.op in SLICES and at == 0:
                # Of which another slice may be taken.
                part = self._part_read(computation, i, at)
                return part * min(1.0, used(i.name))
            if i.op == "dynamic-update-slice" and not computation.updated_in_place(i):
                return 1.0
            return self._part_read(computation, i, at)

        return used(computation.parameter(position).name)

    def _written(self, computation: Computation, i: Instruction) -> int:
        if i.op == "dynamic-update-slice":
            return bytes_of(computation[i.operands[1]].shape)
        shape = result_of(i)
        if i.op != "fusion":
            return bytes_of(shape)
        fused = self.computations[i.called["calls"]]
        total = 0
        for part, result in zip(parts_of(shape), fused.results, strict=True):
            size = bytes_of(part)
            if fused.updated_in_place(result):
                update = elements_of(fused[result.operands[1]].shape)
                size = round(size * update / elements_of(part))
            total += size
        return total


def result_of(i: Instruction) -> str:
    """The shape of the result, which an asynchronous start has beside other things."""
    if not i.op.endswith("-start"):
        return i.shape
    parts = parts_of(i.shape)
    return parts[1] if parts[0].startswith("(") else parts[0]
