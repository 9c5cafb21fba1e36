"""What can a value be that a model computes?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array

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


ARITHMETIC = ("add", "sub", "mul", "div")
