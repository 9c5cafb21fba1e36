"""What does a model compute from its variables alone, and what reads which of them?"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from jaxnorm._primitives._operation import formula_of
from jaxnorm.models._call import by_arrays
from jaxnorm.models._folding.kernels import MOVES, is_real, layer_of
from jaxnorm.models._folding.values import (
    ARITHMETIC,
    Flow,
    Known,
    Value,
    Variable,
    variable_at,
)
from jaxnorm.models._leaves import is_box

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
SAME = ("sharding_constraint", "reshard", "name")  # the value as it is


class Trace:
    """Follows every value of a computation, and notes who reads it."""

    def __init__(self, variables: Mapping[Variable, Any]):
        self.variables = variables
        self.layers: list[Flow] = []
        self.flows: list[Flow] = []  # one for each equation, and one for the outputs
        self.readers: dict[Variable, set[Flow]] = defaultdict(set)

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]
    ) -> list[Value]:
        """The outputs of `jaxpr`."""
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        env: dict[Any, Value] = dict(zip(inputs, [*consts, *args], strict=True))

        def read(v: Any) -> Value:
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
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, "")) or formula_of(eqn)
        if inner is not None:
            consts = [Known(frozenset(), value=v) for v in getattr(inner, "consts", ())]
            return self.run(getattr(inner, "jaxpr", inner), consts, args)
        known = [a for a in args if isinstance(a, Known)]
        if len(known) == len(args) and not eqn.effects:
            variables = frozenset().union(*(a.variables for a in known))
            return [
                Known(variables, eqn=eqn, args=known, index=i)
                for i in range(len(eqn.outvars))
            ]
        outs = [Flow(v.aval, eqn=eqn, args=args) for v in eqn.outvars]
        if _is_affine(eqn, args):
            outs[0].parent = next(a for a in args if isinstance(a, Flow))
        layer = layer_of(eqn, args, self.variables)
        if layer is not None:
            outs[0].layer = layer
            self.layers.append(outs[0])
        self.read_by(outs[0] if outs else Flow(None, eqn=eqn, args=args), args)
        return outs

    def read_by(self, reader: Flow, args: Sequence[Value]) -> None:
        """Notes that `reader` is computed from `args`."""
        self.flows.append(reader)
        for arg in args:
            if isinstance(arg, Flow):
                arg.users.append(reader)
            else:
                for variable in arg.variables:
                    self.readers[variable].add(reader)

    def step_after(self, flow: Flow) -> Flow | None:
        """The affine image of `flow`, if nothing else is computed from it."""
        only = flow.users[0] if len(flow.users) == 1 else None
        return only if only is not None and only.parent is flow else None


def traced(
    apply: Callable[..., Any],
    variables: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Trace:
    """The trace of a call of a model, of whose arrays only the shapes count."""
    call, arrays = by_arrays(apply, args, kwargs)
    closed = jax.make_jaxpr(call)(variables, arrays)
    flat = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_box)[0]
    found, invars = [variable_at(path) for path, _ in flat], closed.jaxpr.invars
    trace = Trace({v: u.aval for v, u in zip(found, invars, strict=False)})
    inputs: list[Value] = [Known(frozenset([v]), variable=v) for v in found]
    inputs += [Flow(u.aval) for u in invars[len(found) :]]
    consts = [Known(frozenset(), value=v) for v in closed.consts]
    with jax.ensure_compile_time_eval():  # also while something else is traced
        outputs = trace.run(closed.jaxpr, consts, inputs)
    trace.read_by(Flow(None, args=outputs), outputs)
    return trace


def _is_affine(eqn: Any, args: Sequence[Value]) -> bool:
    """Whether the equation scales, shifts, casts or moves one value, elementwise."""
    name, flows = eqn.primitive.name, [a for a in args if isinstance(a, Flow)]
    if len(flows) != 1 or len(eqn.outvars) != 1:
        return False
    before, after = flows[0].aval, eqn.outvars[0].aval
    if not is_real(before) or not is_real(after):
        return False
    if name in ARITHMETIC:
        divides_by_it = name == "div" and args[1] is flows[0]
        return before.shape == after.shape and not divides_by_it
    if name in ("neg", "convert_element_type"):
        return True
    return name in MOVES and name != "rev" and before.size == after.size
