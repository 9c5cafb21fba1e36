"""Which values are a norm's scale times something, plus its bias?"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxnorm.models._folding.kernels import is_real
from jaxnorm.models._folding.values import Known, Value, Variable


class Unknown(Exception):
    """Why a value is not understood."""


class Scaled(NamedTuple):
    """What is `scale * anything + biases * bias`, with the features along one axis.

    Attributes:
        axis: of the features.
        has_scale: whether there is anything but the bias.
        biases: how many times the bias is in it: 0, 1 or -1.
    """

    axis: int
    has_scale: bool
    biases: int


Form = Scaled | None  # None for what depends on neither


class Forms:
    """The form of each value of a computation, for one norm's scale and bias."""

    def __init__(self, scale: Variable, bias: Variable):
        self.start = {scale: Scaled(0, True, 0), bias: Scaled(0, False, 1)}
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
        return image(value.eqn, forms)


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
    if a.axis != b.axis or abs(biases) > 1:
        raise Unknown("its scale and bias are not added along one axis")
    return Scaled(a.axis, a.has_scale or b.has_scale, biases)


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
    size, ahead = before.shape[axis], math.prod(before.shape[:axis])
    if eqn.primitive.name == "broadcast_in_dim":
        places = [eqn.params["broadcast_dimensions"][axis]]
    else:
        places = [i for i in range(after.ndim) if math.prod(after.shape[:i]) == ahead]
    for place in places:
        if after.shape[place] == size:
            return place
    raise Unknown(
        f"its features are split or spread by {eqn.primitive.name!r}, from shape "
        f"{before.shape} to {after.shape}"
    )
