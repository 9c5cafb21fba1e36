"""What a program's kernels read and write, compiled for an H100 or a TPU v5e.

Neither need be present: XLA compiles for a described device. It needs the compiler of
that device, which is in jax's plugin (`pip install -e '.[passes-h100]'` or
`'.[passes-v5e]'`), but never starts the plugin: set `jax_platforms` to `cpu` before
anything runs, or jax will look for the device.

How bytes are counted, from the optimized HLO:

- A kernel reads each of its operands once and writes each of its results once.
- Where a kernel reads an operand only through slices, directly or behind bitcasts,
  reshapes, transposes, copies and conversions, it reads what the slices hold.
- An update of a slice in place reads and writes that slice, not the whole array.
- A loop counts as often as it runs, and a condition as its most expensive branch.
- On a TPU what stays in on-chip memory counts nothing, and moves between that and the
  main memory count on the side of the main memory.

What this leaves out: which reads the caches serve; the granularity of memory (a slice
with rows of less than 32 bytes moves more than it holds); padding to tiles on a TPU; an
operand that one kernel reads more than once; what products and convolutions read again
for each of their blocks. Autotuning, which needs the device, is off.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

_OPTIONS = {
    "h100": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "v5e": {},
}
TARGETS = tuple(_OPTIONS)


@functools.cache
def described_device(target: str) -> Any:
    """A device to compile for, which need not exist; `target` is one of TARGETS."""
    if target == "h100":
        spec = Path(__file__).with_name("h100.textproto").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x1", target_config=spec
        )
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no look for one in a cloud
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target}:2x2"
        )
    return topology.devices[0]


def compile_for(
    target: str, f: Callable, *args: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`jax.jit(f)` compiled for one device, for `args` of arrays or their shapes."""
    sharding = jax.sharding.SingleDeviceSharding(described_device(target))

    def placed(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)

    lowered = jax.jit(f, donate_argnums=donate).lower(*jax.tree.map(placed, args))
    return lowered.compile(compiler_options=_OPTIONS[target])


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


def kernels(compiled: jax.stages.Compiled | str) -> list[Kernel]:
    """The kernels of a compiled program, or of its optimized HLO, in their order."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    program = _Program(str(text))
    return list(program.kernels(program.entry))


_ITEM = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
}
_FREE_CALLS = {"AllocateBuffer", "ConcatBitcast"}
_VIEWS = {"bitcast", "reshape", "transpose", "copy", "convert"}
_SLICES = {"slice", "dynamic-slice"}


class _Item(NamedTuple):
    """One array of a shape: how many elements, and its bytes in the main memory."""

    elements: int
    bytes: int


def _items(shape: str) -> list[_Item]:
    found = []
    for kind, digits, dims, layout in _ITEM.findall(shape):
        elements = 1
        for n in dims.split(","):
            elements *= int(n) if n else 1
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(kind) if not digits else None
        bits = int(digits or 0) if bits is None else bits
        space = re.search(r"S\((\d+)\)", layout)
        elsewhere = space is not None and space[1] != "0"
        found.append(_Item(elements, 0 if elsewhere else -(-elements * bits // 8)))
    return found


def _bytes(shape: str) -> int:
    return sum(item.bytes for item in _items(shape))


def _elements(shape: str) -> int:
    return sum(item.elements for item in _items(shape))


class _Instruction(NamedTuple):
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
        return dict(_CALLED.findall(self.attributes))

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


def _closed(text: str) -> tuple[str, str]:
    """What is inside the parenthesis that opens `text`, and what follows it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _parts(shape: str) -> list[str]:
    """The elements of a tuple shape; a plain shape is its only one."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for c in _closed(shape)[0]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _instruction(line: str) -> _Instruction | None:
    line = _COMMENT.sub("", line)
    start = _START.match(line)
    if start is None:
        return None
    rest = line[start.end() :]
    if rest.startswith("("):
        inside, rest = _closed(rest)
        shape = f"({inside})"
    else:
        shape, _, rest = rest.partition(" ")
    op, paren, rest = rest.strip().partition("(")
    inside, attributes = _closed(paren + rest)
    return _Instruction(start[2], shape, op, inside, attributes, bool(start[1]))


class _Computation(dict[str, _Instruction]):
    """Instructions by name, in their order."""

    @functools.cached_property
    def root(self) -> _Instruction:
        return next(i for i in self.values() if i.root)

    @functools.cached_property
    def results(self) -> list[_Instruction]:
        """What the root holds: the elements of its tuple, behind their bitcasts."""
        outer = self.root
        names = outer.operands if outer.op == "tuple" else [outer.name]
        return [self.behind_bitcasts(name) for name in names]

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[_Instruction, int]]]:
        """For each name, the instructions that take it, and at which position."""
        found = {name: [] for name in self}
        for user in self.values():
            for position, name in enumerate(user.operands):
                found[name].append((user, position))
        return found

    def parameter(self, position: int) -> _Instruction:
        return next(
            i
            for i in self.values()
            if i.op == "parameter" and int(i.inside) == position
        )

    def behind_bitcasts(self, name: str) -> _Instruction:
        found = self[name]
        while found.op == "bitcast":
            found = self[found.operands[0]]
        return found

    def updated_in_place(self, i: _Instruction) -> bool:
        """Whether this is a result that is a parameter but for an updated slice."""
        return (
            i.op == "dynamic-update-slice"
            and any(i.name == result.name for result in self.results)
            and self.behind_bitcasts(i.operands[0]).op == "parameter"
        )


class _Program:
    """Optimized HLO, as computations that call each other."""

    def __init__(self, text: str):
        self.computations: dict[str, _Computation] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            head = _HEAD.match(_COMMENT.sub("", line))
            if head:
                current = self.computations[head[2]] = _Computation()
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None:
                instruction = _instruction(line)
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

    def _runs(self, i: _Instruction) -> bool:
        free = i.op in _FREE or i.op.endswith(("-done", "-update"))
        return not free and i.target not in _FREE_CALLS

    def _loop(self, i: _Instruction) -> Iterator[Kernel]:
        times = self._trips(i)
        for part, runs in (("condition", (times or 0) + 1), ("body", times or 1)):
            for k in self.kernels(i.called[part]):
                yield k._replace(
                    times=k.times * runs, uncertain=k.uncertain or times is None
                )

    def _trips(self, i: _Instruction) -> int | None:
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

    def _flat(self, name: str) -> Iterator[_Instruction]:
        """The instructions of a computation and of those that it calls."""
        for i in self.computations[name].values():
            yield i
            for inner in i.called.values():
                yield from self._flat(inner)

    def _worst_branch(self, i: _Instruction) -> list[Kernel]:
        branches = [list(self.kernels(name)) for name in i.branches]
        worst = max(branches, key=lambda ks: sum(k.bytes for k in ks))
        return [k._replace(uncertain=True) for k in worst]

    def _kernel(self, computation: _Computation, i: _Instruction) -> Kernel:
        return Kernel(
            i.name,
            i.target or i.op,
            i.origin or self._inner_origin(i),
            self._read(computation, i),
            self._written(computation, i),
            self._is_product(i),
        )

    def _inner_origin(self, i: _Instruction) -> str:
        inner = i.called.get("calls")
        return self.computations[inner].root.origin if inner else ""

    def _is_product(self, i: _Instruction) -> bool:
        if i.target.startswith(("__cublas", "__cudnn")):
            return True
        inner = self._flat(i.called["calls"]) if i.op == "fusion" else [i]
        return any(j.op in ("dot", "convolution") for j in inner)

    def _read(self, computation: _Computation, i: _Instruction) -> int:
        parts: dict[str, float] = {}
        for position, name in enumerate(i.operands):
            part = self._part_read(computation, i, position)
            parts[name] = min(1.0, parts.get(name, 0.0) + part)
        sizes = {name: _bytes(computation[name].shape) for name in parts}
        return sum(round(part * sizes[name]) for name, part in parts.items())

    def _part_read(
        self, computation: _Computation, i: _Instruction, position: int
    ) -> float:
        """Which part of an operand this instruction, run by itself, reads."""
        op = i.op.removesuffix("-start")
        if op == "dynamic-update-slice" and position == 0:
            return 0.0
        if op == "fusion":
            return self._part_used(self.computations[i.called["calls"]], position)
        if op in _SLICES and position == 0:
            whole = _elements(computation[i.operands[0]].shape)
            return _elements(_result(i)) / whole if whole else 0.0
        return 1.0

    def _part_used(self, computation: _Computation, position: int) -> float:
        """Which part of a parameter a fused computation reads."""

        def used(name: str) -> float:
            if name == computation.root.name:
                return 1.0
            return sum(used_by(*use) for use in computation.users[name])

        def used_by(i: _Instruction, at: int) -> float:
            if i.op in _VIEWS:
                return used(i.name)
            if i.op == "dynamic-update-slice" and not computation.updated_in_place(i):
                return 1.0
            return self._part_read(computation, i, at)

        return used(computation.parameter(position).name)

    def _written(self, computation: _Computation, i: _Instruction) -> int:
        if i.op == "dynamic-update-slice":
            return _bytes(computation[i.operands[1]].shape)
        shape = _result(i)
        if i.op != "fusion":
            return _bytes(shape)
        fused = self.computations[i.called["calls"]]
        total = 0
        for part, result in zip(_parts(shape), fused.results, strict=True):
            size = _bytes(part)
            if fused.updated_in_place(result):
                update = _elements(fused[result.operands[1]].shape)
                size = round(size * update / _elements(part))
            total += size
        return total


def _result(i: _Instruction) -> str:
    """The shape of the result, which an asynchronous start has beside other things."""
    if not i.op.endswith("-start"):
        return i.shape
    parts = _parts(i.shape)
    return parts[1] if parts[0].startswith("(") else parts[0]
