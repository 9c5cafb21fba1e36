"""What can a value be that a model computes?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import Array

from jaxnorm.models._paths import path_name


class Variable(NamedTuple):
    """A variable by its collection, the path of its layer, and its name."""

    collection: str
    path: str
    name: str


def variable_at(path: tuple[Any, ...]) -> Variable:
    """The variable at a path of JAX's through all collections."""
    names = [path_name((key,)) for key in path]
    return Variable(names[0], "/".join(names[1:-1]), names[-1])


@dataclasses.dataclass(eq=False)
class Known:
    """A value that depends on variables alone: one of them, a constant, or what `eqn`
    makes of `args`."""

    variables: frozenset[Variable]
    variable: Variable | None = None
    value: Any = None
    eqn: Any = None
    args: "Sequence[Known]" = ()
    index: int = 0

    def evaluate(
        self,
        values: Mapping[Variable, Array],
        memo: "dict[Known, Sequence[Any]] | None" = None,
    ) -> Any:
        """The value where the variables have these `values`."""
        memo = {} if memo is None else memo
        if self.variable is not None:
            return values[self.variable]
        if self.eqn is None:
            return self.value
        if self not in memo:
            args = [a.evaluate(values, memo) for a in self.args]
            out = self.eqn.primitive.bind(*args, **self.eqn.params)
            memo[self] = out if self.eqn.primitive.multiple_results else [out]
        return memo[self][self.index]


@dataclasses.dataclass(eq=False)
class Flow:
    """A value that depends on the input.

    It is what `eqn` makes of `args`: the affine image of its `parent`, the output of a
    `layer`, or anything at all. `users` are what is computed from it.
    """

    aval: Any
    parent: "Flow | None" = None
    eqn: Any = None
    args: "Sequence[Known | Flow]" = ()
    layer: "LayerCall | None" = None
    users: "list[Flow]" = dataclasses.field(default_factory=list)

    @property
    def variables(self) -> frozenset[Variable]:
        """The variables that take part in this one equation."""
        known = (a.variables for a in self.args if isinstance(a, Known))
        return frozenset().union(*known)


Value = Known | Flow


@dataclasses.dataclass(eq=False)
class LayerCall:
    """A convolution or product of `data` with a kernel, and where the features are.

    Axes are None where there are several, or where the kernel is stored otherwise.
    """

    path: str
    kernel: Variable
    data: Flow
    data_axis: int | None
    kernel_input: int | None  # axes of the kernel as it is stored
    kernel_output: int | None
    output_axis: int | None
    groups: int
    padded: bool


ARITHMETIC = ("add", "sub", "mul", "div")
