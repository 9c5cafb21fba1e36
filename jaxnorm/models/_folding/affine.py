"""What do equations of a trace do to each feature?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxnorm.models._folding.kernels import place_after
from jaxnorm.models._folding.values import ARITHMETIC, Flow, Known, Variable

Form = tuple[np.ndarray, np.ndarray]  # a and b of each feature


def affine_image(
    steps: Sequence[Flow],
    values: Mapping[Variable, Any],
    feature_ones: np.ndarray,
    moved: bool,
) -> Form | None:
    """(a, b) of each feature, if `steps` make `a * x + b` of x; else None.

    `feature_ones` vary along the axis of the features alone. They are of the shape of
    what the steps make; or of x, if the steps may have `moved` the axis.
    """
    before = _shape(steps[0].parent)
    lanes = [np.ones([1] * len(before)), np.zeros([1] * len(before))]
    lanes += [feature_ones] * moved
    for step in steps:
        lanes = _image(step, lanes, values)
        if lanes is None:
            return None
    across = (lanes[2] if moved else feature_ones).shape
    a, b = lanes[:2]
    for v in (a, b):
        if any(n not in (1, most) for n, most in zip(v.shape, across, strict=True)):
            return None
    return np.broadcast_to(a, across).ravel(), np.broadcast_to(b, across).ravel()


def _image(
    step: Flow, lanes: list[np.ndarray], values: Mapping[Variable, Any]
) -> list[np.ndarray] | None:
    """a, b and maybe `feature_ones` after one step; axes of size 1 broadcast."""
    name, (a, b, *rest) = step.eqn.primitive.name, lanes
    if name == "neg":
        return [-a, -b, *rest]
    if name == "convert_element_type":
        return lanes
    if name not in ARITHMETIC:
        moved = [v for v in (_moved(step, v) for v in lanes) if v is not None]
        return moved if len(moved) == len(lanes) else None
    (known,) = (v for v in step.args if isinstance(v, Known))
    k = _compact(known.evaluate(values), a.ndim)
    if name == "add":
        return [a, b + k, *rest]
    if name == "sub" and step.args[1] is known:
        return [a, b - k, *rest]
    if name == "sub":
        return [-a, k - b, *rest]
    with np.errstate(all="ignore"):
        k = k if name == "mul" else 1 / k
        return [a * k, b * k, *rest]


def _compact(value: Any, ndim: int) -> np.ndarray:
    """`value` in double precision, with size 1 along axes where nothing changes."""
    value = np.asarray(value, float)
    value = value.reshape([1] * (ndim - value.ndim) + [*value.shape])
    for axis in range(ndim):
        first = value.take([0], axis)
        value = first if (value == first).all() else value
    return value


def _moved(step: Flow, value: np.ndarray) -> np.ndarray | None:
    """`value` after a step that moves axes.

    None if it varies along several of them, or along one that does not stay one.
    """
    name, before, after = step.eqn.primitive.name, _shape(step.parent), _shape(step)
    if name == "transpose":
        return value.transpose(step.eqn.params["permutation"])
    wide = [axis for axis, size in enumerate(value.shape) if size > 1]
    if len(wide) > 1:
        return None
    ones = [1] * len(after)
    if not wide:
        return value.reshape(ones)
    place = place_after(before, after, wide[0])
    if place is None:
        return None
    return value.reshape([*ones[:place], after[place], *ones[place + 1 :]])


def _shape(flow: Flow | None) -> tuple[int, ...]:
    """The shape of the array that is a value."""
    assert flow is not None
    return flow.aval.shape


def ones_along(aval: Any, axis: int) -> np.ndarray:
    """Ones that vary along `axis` only, of as many axes as an array of `aval`."""
    shape = [1] * aval.ndim
    shape[axis] = aval.shape[axis]
    return np.ones(shape)
