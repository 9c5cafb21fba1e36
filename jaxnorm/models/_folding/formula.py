"""Of which norm do some equations compute the formula, and with which epsilon?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxnorm.models._folding.affine import Form, affine_image, ones_along
from jaxnorm.models._folding.trace import Trace
from jaxnorm.models._folding.values import ARITHMETIC, Flow, Known, Variable


def norm_applied(
    trace: Trace,
    steps: Sequence[Flow],
    bias: Variable | None,
    feature_ones: np.ndarray,
    moved: bool = False,
) -> tuple[str, float] | None:
    """The norm that `steps` apply to a value plus `bias`, and its epsilon, if they do.

    For `feature_ones` and `moved` see `affine_image`.
    """
    norm = _norm(trace, steps, bias)
    if norm is None:
        return None
    epsilon = _epsilon(trace, steps, norm, bias, feature_ones, moved)
    return None if epsilon is None else (norm, epsilon)


def bias_of(trace: Trace, flow: Flow) -> Variable | None:
    """The bias of the layer that gives `flow`, if it has one."""
    assert flow.layer is not None
    bias = Variable("params", flow.layer.path, "bias")
    return bias if bias in trace.variables else None


def _norm_variables(trace: Trace, norm: str) -> dict[str, Variable]:
    """The variables that evaluation by running statistics takes, by their names."""
    names = {"scale": "params", "bias": "params"}
    names |= {"mean": "batch_stats", "var": "batch_stats"}
    variables = {name: Variable(kind, norm, name) for name, kind in names.items()}
    return {
        name: variable
        for name, variable in variables.items()
        if variable in trace.variables
    }


def shifts(trace: Trace, norm: str) -> bool:
    """Whether the norm has a bias or a mean, and so maps 0 to something else."""
    return not {"bias", "mean"}.isdisjoint(_norm_variables(trace, norm))


def _norm(trace: Trace, steps: Sequence[Flow], bias: Variable | None) -> str | None:
    """The norm whose variables, with the layer's bias, are those that `steps` read, and
    that no other part of the computation reads."""
    taken = {variable for step in steps for variable in step.variables}
    expected = set() if bias is None else {bias}
    paths = {variable.path for variable in taken - expected}
    if len(paths) != 1:
        return None
    (norm,) = paths
    if not norm:
        return None  # the variables are those of one norm, without a layer
    known = {*_norm_variables(trace, norm).values()}
    if Variable("batch_stats", norm, "var") not in known or taken != expected | known:
        return None
    if not all(trace.readers[variable] <= {*steps} for variable in taken):
        return None
    within = [v for v in trace.variables if f"{v.path}/".startswith(f"{norm}/")]
    others = {*within} - known
    return None if any(trace.readers[variable] for variable in others) else norm


def adds_bias(trace: Trace, flow: Flow) -> bool:
    """Whether the layer adds its bias to its output, if it has one.

    That of several output axes is added as it is, to the last ones.
    """
    bias, step = bias_of(trace, flow), trace.step_after(flow)
    if bias is None:
        return True
    if step is None or trace.readers[bias] != {step} or step.variables != {bias}:
        return False
    assert flow.layer is not None
    values = _drawn(trace, [bias], np.random.default_rng(0))
    if flow.layer.output_axis is None:
        return _is_added(step, np.asarray(values[bias]), values)
    feature_ones = ones_along(flow.aval, flow.layer.output_axis)
    form = affine_image([step], values, feature_ones, moved=True)
    return form is not None and _close(form, (1, values[bias]), 1, 1e-4)


def _is_added(step: Flow, value: np.ndarray, values: Mapping[Variable, Any]) -> bool:
    """Whether the step adds `value` to the last axes of its parent, a product whose
    kernel is the second factor."""
    parent = step.parent
    if step.eqn.primitive.name != "add" or parent is None:
        return False
    (known,) = (v for v in step.args if isinstance(v, Known))
    added = np.broadcast_to(known.evaluate(values), step.aval.shape)
    last = step.aval.shape[step.aval.ndim - value.ndim :]
    same = last == value.shape and bool((added == value).all())
    return same and isinstance(parent.args[1], Known)


def _epsilon(
    trace: Trace,
    steps: Sequence[Flow],
    norm: str,
    bias: Variable | None,
    feature_ones: np.ndarray,
    moved: bool,
) -> float | None:
    """The epsilon with which `steps` are the norm, of a value with `bias`, or None.

    Where the variance is 0, the epsilon is what there is to see. With it the formula
    has to hold for variances around it, and for others.
    """
    named, rng = _norm_variables(trace, norm), np.random.default_rng(0)
    variables = [*named.values(), *([] if bias is None else [bias])]
    avals = [v.aval for step in steps for v in (*step.eqn.invars, *step.eqn.outvars)]
    rounds = any(jnp.finfo(v.dtype).bits < 32 for v in avals)
    if rounds and any(_by_a_constant(step) for step in steps):
        return None  # which could be as near to 1 as half precision can tell
    tolerance = 0.05 if rounds else 1e-4

    def trial(unit: float, low: float, high: float) -> tuple[Form | None, Any, Any]:
        values, var = _drawn(trace, variables, rng), named["var"]
        drawn = unit * rng.uniform(low, high, values[var].shape)
        values[var] = jnp.asarray(drawn, values[var].dtype)
        exact = {
            name: np.asarray(values[variable], float)
            for name, variable in named.items()
        }
        added = 0 if bias is None else np.asarray(values[bias], float)
        return affine_image(steps, values, feature_ones, moved), exact, added

    form, exact, _ = trial(0, 0, 0)
    if form is None:
        return None
    with np.errstate(all="ignore"):
        median = np.median((exact.get("scale", 1) / form[0]) ** 2)
    epsilon = float(f"{median:.6g}")  # as it was written, without what was rounded off
    if not math.isfinite(epsilon):
        return None
    for trying in ((epsilon or 1, 0.5, 2), (1, 0.1, 10)):
        form, exact, added = trial(*trying)
        a = exact.get("scale", 1) / np.sqrt(exact["var"] + epsilon)
        shift, mean = exact.get("bias", 0), exact.get("mean", 0)
        size = abs(a * added) + abs(a * mean) + abs(shift)
        if not _close(form, (a, a * (added - mean) + shift), size, tolerance):
            return None
    return epsilon


def _by_a_constant(step: Flow) -> bool:
    """Whether the step is arithmetic with what is no variable."""
    return step.eqn.primitive.name in ARITHMETIC and not step.variables


def _close(
    form: Form | None, expected: tuple[Any, Any], size: Any, tolerance: float
) -> bool:
    """Whether `form` is the (a, b) expected, where terms of `size` add up to b."""
    if form is None or form[0].shape != np.broadcast_shapes(*map(np.shape, expected)):
        return False
    off_a, off_b = (abs(x - y) for x, y in zip(form, expected, strict=True))
    return bool((off_a <= tolerance * abs(expected[0])).all()) and bool(
        (off_b <= tolerance * size).all()
    )


def _drawn(
    trace: Trace, variables: Sequence[Variable], rng: np.random.Generator
) -> dict[Variable, Array]:
    """Random values for `variables`, far enough from 0 to divide by."""
    return {
        variable: jnp.asarray(
            rng.uniform(0.5, 2, trace.variables[variable].shape)
            * rng.choice([-1, 1], trace.variables[variable].shape),
            trace.variables[variable].dtype,
        )
        for variable in variables
    }
