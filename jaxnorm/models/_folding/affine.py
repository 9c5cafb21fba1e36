"""What do equations of a trace do to each feature?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxnorm.models._folding.values import ARITHMETIC, Flow, Known, Leaf


def affine_image(
    steps: Sequence[Flow], values: Mapping[Leaf, Any], features: np.ndarray, moved: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """(a, b) of each feature, if `steps` make `a * x + b` of x; else None.

    The features are those along the axis of `features`, of what the steps make, or of
    x, from where the steps may have `moved` it.
    """
    before = _shape(steps[0].parent)
    lanes = [np.ones([1] * len(before)), np.zeros([1] * len(before))]
    lanes += [features] * moved
    for step in steps:
        lanes = _image(step, lanes, values)
        if lanes is None:
            return None
    across = (lanes[2] if moved else features).shape
    a, b = lanes[:2]
    for v in (a, b):
        if any(n not in (1, most) for n, most in zip(v.shape, across, strict=True)):
            return None
    return np.broadcast_to(a, across).ravel(), np.broadcast_to(b, across).ravel()


def _image(
    step: Flow, lanes: list[np.ndarray], values: Mapping[Leaf, Any]
) -> list[np.ndarray] | None:
    """`lanes`, a and b and maybe features, after one step; axes of size 1 broadcast."""
    name, (a, b, *features) = step.eqn.primitive.name, lanes
    if name == "neg":
        return [-a, -b, *features]
    if name == "convert_element_type":
        return lanes
    if name not in ARITHMETIC:
        moved = [v for v in (_moved(step, v) for v in lanes) if v is not None]
        return moved if len(moved) == len(lanes) else None
    (known,) = (v for v in step.args if isinstance(v, Known))
    k = _compact(known.evaluate(values), a.ndim)
    if name == "add":
        return [a, b + k, *features]
    if name == "sub" and step.args[1] is known:
        return [a, b - k, *features]
    if name == "sub":
        return [-a, k - b, *features]
    with np.errstate(all="ignore"):
        k = k if name == "mul" else 1 / k
        return [a * k, b * k, *features]


def _compact(value: Any, ndim: int) -> np.ndarray:
    """`value` in double precision, with size 1 along axes where nothing changes."""
    value = np.asarray(value, float)
    value = value.reshape([1] * (ndim - value.ndim) + [*value.shape])
    for axis in range(ndim):
        first = value.take([0], axis)
        value = first if (value == first).all() else value
    return value


def _moved(step: Flow, value: np.ndarray) -> np.ndarray | None:
    """`value`, that varies along one axis at most, with its axes where `step` has them.

    None where that axis does not stay one.
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
    for axis, size in enumerate(after):
        same_place = math.prod(after[:axis]) == math.prod(before[: wide[0]])
        if size == before[wide[0]] and same_place:
            return value.reshape([*ones[:axis], size, *ones[axis + 1 :]])
    return None


def _shape(flow: Flow | None) -> tuple[int, ...]:
    assert flow is not None
    return flow.aval.shape


def ones_along(aval: Any, axis: int) -> np.ndarray:
    """Ones that vary along `axis` only, of as many axes as an array of `aval`."""
    shape = [1] * aval.ndim
    shape[axis] = aval.shape[axis]
    return np.ones(shape)
