"""Which values are a norm's scale times something, plus its bias?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxnorm.models._folding.kernels import is_real, place_after
from jaxnorm.models._folding.values import Known, Value, Variable


class Unknown(Exception):
    """Why a value is not understood."""


class Scaled(NamedTuple):
    """What is `(scale + offset) * anything + biases * bias`, with the features along
    one axis.

    Attributes:
        axis: of the features.
        offset: what is added to the scale; None where there is nothing but the bias.
        biases: how many times the bias is in it: 0, 1 or -1.
    """

    axis: int
    offset: float | None
    biases: int


Form = Scaled | None  # None for what depends on neither


class Forms:
    """The form of each value of a computation, for one norm's scale and bias."""

    def __init__(self, scale: Variable, bias: Variable):
        self.start = {scale: Scaled(0, 0.0, 0), bias: Scaled(0, None, 1)}
        self.found: dict[Value, Form] = {}

    def form(self, value: Value) -> Form:
        """The form of a value; raises Unknown if there is none."""
        if value not in self.found:
            self.found[value] = self._form(value)
        return self.found[value]

    def _form(self, value: Value) -> Form:
        if isinstance(value, Known):
            if value.variables.isdisjoint(self.start):
                return None
            if value.variable is not None:
                return self.start[value.variable]
        forms = [self.form(arg) for arg in value.args]
        if not any(forms):
            return None
        return _with_offset(value, forms) or image(value.eqn, forms)


def _with_offset(value: Value, forms: Sequence[Form]) -> Form:
    """The form of the scale plus one number; None for anything else."""
    if not isinstance(value, Known) or value.eqn.primitive.name != "add":
        return None
    pairs = [*zip(value.args, forms, strict=True)]
    for (scale, form), (added, none) in (pairs, pairs[::-1]):
        if form and not none and not added.variables and _is_moved(scale):
            numbers = np.unique(np.asarray(added.evaluate({}), float))
            if form.offset == 0 and numbers.size == 1:
                return form._replace(offset=float(numbers[0]))
    return None


def _is_moved(value: Known) -> bool:
    """Whether a value is that of a variable, moved about."""
    if value.eqn is None:
        return value.variable is not None
    moved = value.eqn.primitive.name in (*_MOVES, "convert_element_type", "copy")
    return moved and _is_moved(value.args[0])


def image(eqn: Any, forms: Sequence[Form]) -> Form:
    """The form of what an equation makes of values of these; raises Unknown."""
    name, outs = eqn.primitive.name, [v.aval for v in eqn.outvars]
    found = [(v.aval, f) for v, f in zip(eqn.invars, forms, strict=True) if f]
    if len(outs) != 1 or not is_real(outs[0]) or name not in {*_ALIKE, *_MOVES}:
        raise Unknown(f"{name!r} reads it, which is no layer with a kernel")
    if name in _MOVES:
        (before, form) = found[0]
        return form._replace(axis=_moved(eqn, before, outs[0], form.axis))
    if any(_features(v, f.axis) != _features(outs[0], f.axis) for v, f in found):
        raise Unknown(f"{name!r} broadcasts its features")
    return _ALIKE[name](*forms)


def _features(aval: Any, axis: int) -> tuple[int, int]:
    """The number of axes of an array, and its size along one of them."""
    return aval.ndim, aval.shape[axis]


def _same(form: Form) -> Form:
    return form


def _negative(form: Form) -> Form:
    return form and form._replace(biases=-form.biases)


def _sum(a: Form, b: Form) -> Form:
    if a is None or b is None:
        raise Unknown("something is added that is not scaled")
    biases = a.biases + b.biases
    offsets = {v.offset for v in (a, b)} - {None}
    if a.axis != b.axis or abs(biases) > 1 or len(offsets) > 1:
        raise Unknown("its scale and bias are not added along one axis")
    return Scaled(a.axis, offsets.pop() if offsets else None, biases)


def _difference(a: Form, b: Form) -> Form:
    return _sum(a, _negative(b))


def _product(a: Form, b: Form) -> Form:
    form = a or b
    if form is None or (a and b) or form.biases:
        raise Unknown("what is scaled, or its bias, is multiplied by something")
    return form


def _quotient(a: Form, b: Form) -> Form:
    if b is not None:
        raise Unknown("something is divided by it")
    return _product(a, b)


_ALIKE = {
    "add": _sum,
    "add_any": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
    "convert_element_type": _same,
    "copy": _same,
}
_MOVES = ("transpose", "broadcast_in_dim", "reshape", "squeeze")


def _moved(eqn: Any, before: Any, after: Any, axis: int) -> int:
    """Where an equation moves an axis to; raises Unknown if it does not stay one."""
    if eqn.primitive.name == "transpose":
        return eqn.params["permutation"].index(axis)
    if eqn.primitive.name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"][axis]
    else:
        place = place_after(before.shape, after.shape, axis)
    if place is not None and after.shape[place] == before.shape[axis]:
        return place
    raise Unknown(
        f"its features are split or spread by {eqn.primitive.name!r}, from shape "
        f"{before.shape} to {after.shape}"
    )
