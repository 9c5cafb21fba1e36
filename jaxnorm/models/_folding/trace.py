"""What does a model compute from its variables alone, and who reads what?"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Jaxpr, Literal

from jaxnorm.models._paths import path_name


class Leaf(NamedTuple):
    """A variable by its collection, the path of its layer, and its name."""

    collection: str
    path: str
    name: str


def leaf_at(path: tuple) -> Leaf:
    """The leaf at a path of JAX's through all collections."""
    names = [path_name((key,)) for key in path]
    return Leaf(names[0], "/".join(names[1:-1]), names[-1])


@dataclasses.dataclass(eq=False)
class Known:
    """A value that depends on variables alone: a leaf, a constant, or `eqn` of args."""

    leaves: frozenset[Leaf]
    leaf: Leaf | None = None
    value: Any = None
    eqn: Any = None
    args: "Sequence[Known]" = ()
    index: int = 0

    def evaluate(self, leaves: Mapping[Leaf, Array], memo: dict | None = None) -> Any:
        """The value, given those of the leaves."""
        memo = {} if memo is None else memo
        if self.leaf is not None:
            return leaves[self.leaf]
        if self.eqn is None:
            return self.value
        if self not in memo:
            args = [a.evaluate(leaves, memo) for a in self.args]
            out = self.eqn.primitive.bind(*args, **self.eqn.params)
            memo[self] = out if self.eqn.primitive.multiple_results else [out]
        return memo[self][self.index]


@dataclasses.dataclass(eq=False)
class Flow:
    """A value that depends on the input.

    It is the affine image of its `parent`, by `eqn` of `args`; or the output of a
    `layer`; or anything at all. `users` are what is computed from it.
    """

    aval: Any
    parent: "Flow | None" = None
    eqn: Any = None
    args: "Sequence[Known | Flow]" = ()
    layer: "Layer | None" = None
    users: "list[Flow]" = dataclasses.field(default_factory=list)

    @property
    def leaves(self) -> frozenset[Leaf]:
        """The variables that take part in this one equation."""
        known = (a.leaves for a in self.args if isinstance(a, Known))
        return frozenset().union(*known)


Value = Known | Flow


@dataclasses.dataclass(eq=False)
class Layer:
    """A convolution or product of `data` with a kernel, and its axes of features."""

    path: str
    kernel: Leaf
    data: Flow
    data_axis: int | None
    kernel_input: int | None  # axes of the kernel as it is stored
    kernel_output: int
    output_axis: int
    groups: int
    padded: bool


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
ARITHMETIC = ("add", "sub", "mul", "div")
SAME = ("sharding_constraint", "reshard", "name")  # the value as it is
MOVES = ("reshape", "transpose", "rev", "squeeze", "broadcast_in_dim", "copy")


class Trace:
    """Follows every value of a computation, and notes who reads it."""

    def __init__(self, leaves: Mapping[Leaf, Any]):
        self.leaves = leaves
        self.layers: list[Flow] = []
        self.readers: dict[Leaf, set[Flow]] = defaultdict(set)

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]
    ) -> list[Value]:
        """The outputs of `jaxpr`."""
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        env: dict[Any, Value] = dict(zip(inputs, [*consts, *args], strict=True))

        def read(v) -> Value:
            if isinstance(v, Literal):
                return Known(frozenset(), value=v.val)
            return env[v]

        for eqn in jaxpr.eqns:
            outs = self.outputs(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def outputs(self, eqn: Any, args: list[Value]) -> Sequence[Value]:
        """The outputs of one equation."""
        if eqn.primitive.name in SAME:
            return args
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if inner is not None:
            consts = [Known(frozenset(), value=v) for v in getattr(inner, "consts", ())]
            return self.run(getattr(inner, "jaxpr", inner), consts, args)
        known = [a for a in args if isinstance(a, Known)]
        if len(known) == len(args) and not eqn.effects:
            leaves = frozenset().union(*(a.leaves for a in known))
            return [
                Known(leaves, eqn=eqn, args=known, index=i)
                for i in range(len(eqn.outvars))
            ]
        outs = [Flow(v.aval) for v in eqn.outvars]
        if _is_affine(eqn, args):
            outs[0].eqn, outs[0].args = eqn, args
            outs[0].parent = next(a for a in args if isinstance(a, Flow))
        layer = _as_layer(eqn, args, self.leaves)
        if layer is not None:
            outs[0].layer = layer
            self.layers.append(outs[0])
        self.read_by(outs[0] if outs else Flow(None), args)
        return outs

    def read_by(self, reader: Flow, args: Sequence[Value]) -> None:
        for arg in args:
            if isinstance(arg, Flow):
                arg.users.append(reader)
            else:
                for leaf in arg.leaves:
                    self.readers[leaf].add(reader)

    def step_after(self, flow: Flow) -> Flow | None:
        """The affine image of `flow`, if nothing else is computed from it."""
        only = flow.users[0] if len(flow.users) == 1 else None
        return only if only is not None and only.parent is flow else None


def _is_affine(eqn: Any, args: Sequence[Value]) -> bool:
    """Whether the equation scales, shifts, casts or moves one value, elementwise."""
    name, flows = eqn.primitive.name, [a for a in args if isinstance(a, Flow)]
    if len(flows) != 1 or len(eqn.outvars) != 1:
        return False
    before, after = flows[0].aval, eqn.outvars[0].aval
    if not _is_real(before) or not _is_real(after):
        return False
    if name in ARITHMETIC:
        divides_by_it = name == "div" and args[1] is flows[0]
        return before.shape == after.shape and not divides_by_it
    if name in ("neg", "convert_element_type"):
        return True
    return name in MOVES and name != "rev" and before.size == after.size


def _is_real(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def _as_layer(eqn: Any, args: Sequence[Value], leaves: Mapping) -> Layer | None:
    """The layer that the equation is, if its kernel is one of `leaves`, moved about.

    With `leaves` come their shapes and dtypes.
    """
    name = eqn.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return None
    side = 0 if isinstance(args[0], Known) else 1
    kernel, data = args[side], args[1 - side]
    if not isinstance(kernel, Known) or not isinstance(data, Flow):
        return None
    if [(v.collection, v.name) for v in kernel.leaves] != [("params", "kernel")]:
        return None
    if not _is_real(eqn.outvars[0].aval):
        return None
    (leaf,) = kernel.leaves
    places = _places(kernel, leaves[leaf])
    axes = (_product_axes if name == "dot_general" else _conv_axes)(eqn, side)
    if places is None or axes is None:
        return None
    kernel_output = _stored_axis(places, axes.kernel_output, leaves[leaf].shape)
    if kernel_output is None:
        return None
    kernel_input = _stored_axis(places, axes.kernel_input, leaves[leaf].shape)
    return Layer(
        path=leaf.path,
        kernel=leaf,
        data=data,
        data_axis=axes.data,
        kernel_input=kernel_input,
        kernel_output=kernel_output,
        output_axis=axes.output,
        groups=axes.groups,
        padded=axes.padded,
    )


class _Axes(NamedTuple):
    """Where the features of a layer are: in its kernel as used, input and output."""

    kernel_output: int
    kernel_input: int | None  # None where there are several
    data: int | None
    output: int
    groups: int = 1
    padded: bool = False


def _conv_axes(eqn: Any, side: int) -> _Axes | None:
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    if side != 1 or p["batch_group_count"] != 1:
        return None
    padded = any(map(any, p["padding"])) or any(n != 1 for n in p["lhs_dilation"])
    # With a stride, padding "SAME" depends on the size of the image.
    window = [eqn.invars[1].aval.shape[axis] for axis in dims.rhs_spec[2:]]
    moves = zip(window, p["window_strides"], strict=True)
    padded = padded or any(size > 1 and stride > 1 for size, stride in moves)
    return _Axes(
        kernel_output=dims.rhs_spec[0],
        kernel_input=dims.rhs_spec[1],
        data=dims.lhs_spec[1],
        output=dims.out_spec[1],
        groups=p["feature_group_count"],
        padded=padded,
    )


def _product_axes(eqn: Any, side: int) -> _Axes | None:
    contracted, batch = eqn.params["dimension_numbers"]
    own, others = contracted[side], contracted[1 - side]
    free = {*range(eqn.invars[side].aval.ndim)} - {*own}
    if any(batch) or len(free) != 1:
        return None
    last = eqn.outvars[0].aval.ndim - 1
    one = len(own) == 1
    return _Axes(
        kernel_output=free.pop(),
        kernel_input=own[0] if one else None,
        data=others[0] if one else None,
        output=last if side == 1 else 0,
    )


def _places(kernel: Known, leaf: Any) -> np.ndarray | None:
    """Where each element of `kernel` is in its leaf; None if it is not that, moved."""
    if kernel.leaf is not None:
        return np.arange(math.prod(leaf.shape)).reshape(leaf.shape)
    if kernel.eqn is None or len(kernel.args) != 1:
        return None
    places, name = _places(kernel.args[0], leaf), kernel.eqn.primitive.name
    after = kernel.eqn.outvars[0].aval
    if places is None or after.size != places.size:
        return None
    if name == "convert_element_type":
        return places if _is_real(after) else None
    if name not in MOVES:
        return None
    return np.asarray(kernel.eqn.primitive.bind(places, **kernel.eqn.params))


def _stored_axis(
    places: np.ndarray, axis: int | None, shape: tuple[int, ...]
) -> int | None:
    """The axis of a leaf of `shape` that became `axis`, from the last; None if none."""
    if axis is None:
        return None
    stored = np.empty(places.size, int)
    stored[places.ravel()] = _counted(places.shape, axis).ravel()
    stored = stored.reshape(shape)
    for own in range(-1, -len(shape) - 1, -1):
        same_size = shape[own] == places.shape[axis]
        if same_size and (stored == _counted(shape, own)).all():
            return own
    return None


def _counted(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """An array of `shape` that counts from 0 along `axis`."""
    size = shape[axis]
    counts = np.arange(size).reshape([-1] + [1] * (len(shape) - axis % len(shape) - 1))
    return np.broadcast_to(counts, shape)
