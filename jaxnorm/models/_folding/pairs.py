"""Which norm does nothing but scale and shift what one layer gives or takes?"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._arguments import check_function
from jaxnorm.models._folding.affine import affine_image, ones_along
from jaxnorm.models._folding.fold import Pair
from jaxnorm.models._folding.trace import (
    ARITHMETIC,
    Flow,
    Known,
    Leaf,
    Trace,
    Value,
    leaf_at,
)
from jaxnorm.models._leaves import is_box
from jaxnorm.models._paths import Tree, check_variables


def find_pairs(
    apply: Callable[..., Any], variables: Mapping[str, Tree], *args: Any, **kwargs: Any
) -> list[Pair]:
    """The pairs of layer and norm that `fold` can fold, found in a trace of the model.

    What counts is what the model computes, not the order in which its layers are
    declared or named. A pair is a layer with a "kernel" and a norm such that

    - the norm takes nothing but the output of the layer, with nothing between them (or
      the layer nothing but the output of the norm), and nothing else reads what is
      between them, or any of the variables of both;
    - the norm, tried on random variables, is `(x - mean) / sqrt(var + epsilon)`, then
      times scale and plus bias, along the features of the kernel;
    - folding is exact: no zeros are padded to what a norm gives, unless it is 0 there.
      (A convolution with a stride may pad images of another size, so it counts, too.)

    Whatever is not understood is no pair: what happens within `scan`, `cond`, `vmap`ped
    kernels and `shard_map`, layers used twice, masks, kernels of several output axes,
    complex numbers. `jit`, `remat` and custom derivatives are seen through. A layer
    between two norms is paired with the one after it. What follows the formula of a
    norm, a residual that is added and an activation, is no part of it: the model that
    takes the folded variables still has to do it (see `fold`).

    Args:
        apply: the model in evaluation, `apply(variables, *args, **kwargs)`.
        variables: {"params", "batch_stats"}; of arrays only shapes and dtypes count, so
            that `jax.ShapeDtypeStruct` will do.
        args, kwargs: what else it takes. Of arrays only shapes and dtypes count here,
            too; all else, such as `train=False`, is passed on as it is.

    Returns:
        The pairs in the order of the computation, with the epsilon of each.

    Raises:
        TypeError: for an `apply` that is no function, and variables that are no arrays.
            What `apply` raises comes through.

    >>> import jax, jax.numpy as jnp, jaxnorm
    >>> def apply(variables, x):
    ...     x = x @ variables["params"]["Dense_0"]["kernel"]
    ...     stats = variables["batch_stats"]["BatchNorm_0"]
    ...     x, _ = jaxnorm.batch_norm(x, stats, use_running_average=True)
    ...     return jax.nn.relu(x)
    >>> variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3))}},
    ...              "batch_stats": {"BatchNorm_0": jaxnorm.init_stats(3)}}
    >>> for pair in jaxnorm.models.find_pairs(apply, variables, jnp.ones((4, 2))):
    ...     print(pair.layer, pair.norm, pair.epsilon)
    Dense_0 BatchNorm_0 1e-05
    """
    _check_apply(apply)
    check_variables(variables)
    flat = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_box)[0]
    given, tree = jax.tree.flatten((args, kwargs))

    def call(variables: Any, arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        leaves = [next(rest) if _is_array(v) else v for v in given]
        args, kwargs = tree.unflatten(leaves)
        return apply(variables, *args, **kwargs)

    closed = jax.make_jaxpr(call)(variables, [v for v in given if _is_array(v)])
    leaves = [leaf_at(path) for path, _ in flat]
    inputs = closed.jaxpr.invars
    trace = Trace({leaf: v.aval for leaf, v in zip(leaves, inputs, strict=False)})
    values: list[Value] = [Known(frozenset([leaf]), leaf=leaf) for leaf in leaves]
    values += [Flow(v.aval) for v in inputs[len(leaves) :]]
    consts = [Known(frozenset(), value=v) for v in closed.consts]
    with jax.ensure_compile_time_eval():  # also while something else is traced
        trace.read_by(Flow(None), trace.run(closed.jaxpr, consts, values))
        return _pairs(trace)


def _check_apply(apply: Any) -> None:
    """Raises unless `apply` is a function, and not a model that has one."""
    if any(c.__module__.startswith("flax.nnx") for c in type(apply).__mro__):
        raise TypeError(
            f"apply must be a function of the variables, got {type(apply).__name__}, "
            "an NNX model: jaxnorm.nnx.fold(model, ...) finds its pairs and folds them"
        )
    if hasattr(apply, "apply"):
        raise TypeError(
            "apply must be a function of the variables, got a model of "
            f"{type(apply).__name__}: pass its method, find_pairs(model.apply, ...)"
        )
    check_function("apply", apply)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _pairs(trace: Trace) -> list[Pair]:
    """For each layer the norm after it, or else the one before it."""
    found = {flow: _output_pair(trace, flow) for flow in trace.layers}
    taken = {pair.norm for pair in found.values() if pair is not None}
    for flow in [flow for flow, pair in found.items() if pair is None]:
        pair = _input_pair(trace, flow)
        if pair is not None and pair.norm not in taken:
            found[flow] = pair
    return [pair for pair in found.values() if pair is not None]


def _output_pair(trace: Trace, flow: Flow) -> Pair | None:
    """The pair of the layer that gives `flow` and the norm that takes it."""
    layer, steps, at = flow.layer, [], trace.step_after(flow)
    if layer is None or trace.readers[layer.kernel] != {flow}:
        return None
    bias = _bias(trace, flow)
    features = ones_along(flow.aval, layer.output_axis)
    while at is not None:
        steps.append(at)
        applied = _applied(trace, steps, bias, features, moved=True)
        if applied is not None:
            return Pair(layer.path, *applied, axis=layer.kernel_output)
        at = trace.step_after(at)
    return None


def _input_pair(trace: Trace, flow: Flow) -> Pair | None:
    """The pair of the layer that gives `flow` and the norm whose output it takes."""
    layer, steps = flow.layer, []
    if layer is None or trace.readers[layer.kernel] != {flow}:
        return None
    in_place = {layer.kernel_input, layer.kernel_output} == {-1, -2}
    if layer.data_axis is None or not in_place or not _adds_bias(trace, flow):
        return None
    features = ones_along(layer.data.aval, layer.data_axis)
    reader, at = flow, layer.data
    while at.parent is not None and at.users == [reader]:
        steps.insert(0, at)
        applied = _applied(trace, steps, None, features)
        if applied is not None and not (layer.padded and _shifts(trace, applied[0])):
            how = {"groups": layer.groups, "padded": layer.padded}
            return Pair(layer.path, *applied, True, layer.kernel_input, **how)
        reader, at = at, at.parent
    return None


def _applied(
    trace: Trace,
    steps: Sequence[Flow],
    bias: Leaf | None,
    features: np.ndarray,
    moved: bool = False,
) -> tuple[str, float] | None:
    """The norm that `steps` apply to a value plus `bias`, and its epsilon, if they do.

    For `features` and `moved` see `affine_image`.
    """
    norm = _norm(trace, steps, bias)
    if norm is None:
        return None
    epsilon = _epsilon(trace, steps, norm, bias, features, moved)
    return None if epsilon is None else (norm, epsilon)


# ---- Whose variables ---------------------------------------------------------------


def _bias(trace: Trace, flow: Flow) -> Leaf | None:
    """The bias of the layer that gives `flow`, if it has one."""
    assert flow.layer is not None
    bias = Leaf("params", flow.layer.path, "bias")
    return bias if bias in trace.leaves else None


def _own(trace: Trace, norm: str) -> dict[str, Leaf]:
    """The variables that evaluation by running statistics takes, by their names."""
    names = {"scale": "params", "bias": "params"}
    names |= {"mean": "batch_stats", "var": "batch_stats"}
    leaves = {name: Leaf(kind, norm, name) for name, kind in names.items()}
    return {name: leaf for name, leaf in leaves.items() if leaf in trace.leaves}


def _shifts(trace: Trace, norm: str) -> bool:
    return not {"bias", "mean"}.isdisjoint(_own(trace, norm))


def _norm(trace: Trace, steps: Sequence[Flow], bias: Leaf | None) -> str | None:
    """The norm whose variables, and the layer's bias, are those of `steps`, and of no
    other part of the computation."""
    taken = {leaf for step in steps for leaf in step.leaves}
    expected = set() if bias is None else {bias}
    paths = {leaf.path for leaf in taken - expected}
    if len(paths) != 1:
        return None
    (norm,) = paths
    if not norm:
        return None  # the variables are those of one norm, without a layer
    own = _own(trace, norm)
    if "var" not in own or taken != expected | {*own.values()}:
        return None
    if not all(trace.readers[leaf] <= {*steps} for leaf in taken):
        return None
    within = [v for v in trace.leaves if f"{v.path}/".startswith(f"{norm}/")]
    others = {*within} - {*own.values()}
    return None if any(trace.readers[leaf] for leaf in others) else norm


def _adds_bias(trace: Trace, flow: Flow) -> bool:
    """Whether the layer adds its bias to its output, if it has one."""
    bias, step = _bias(trace, flow), trace.step_after(flow)
    if bias is None:
        return True
    if step is None or trace.readers[bias] != {step} or step.leaves != {bias}:
        return False
    assert flow.layer is not None
    values = _drawn(trace, [bias], np.random.default_rng(0))
    features = ones_along(flow.aval, flow.layer.output_axis)
    form = affine_image([step], values, features, moved=True)
    return form is not None and _close(form, (1, values[bias]), 1, 1e-4)


# ---- What they do ------------------------------------------------------------------


def _epsilon(
    trace: Trace,
    steps: Sequence[Flow],
    norm: str,
    bias: Leaf | None,
    features: np.ndarray,
    moved: bool,
) -> float | None:
    """The epsilon with which `steps` are the norm, of a value with `bias`, or None.

    Where the variance is 0, the epsilon is what there is to see. With it the formula
    has to hold for variances around it, and for others.
    """
    own, rng = _own(trace, norm), np.random.default_rng(0)
    leaves = [*own.values(), *([] if bias is None else [bias])]
    avals = [v.aval for step in steps for v in (*step.eqn.invars, *step.eqn.outvars)]
    rounds = any(jnp.finfo(v.dtype).bits < 32 for v in avals)
    if rounds and any(_by_a_constant(step) for step in steps):
        return None  # which could be as near to 1 as half precision can tell
    tolerance = 0.05 if rounds else 1e-4

    def trial(unit: float, low: float, high: float):
        values = _drawn(trace, leaves, rng)
        var = unit * rng.uniform(low, high, values[own["var"]].shape)
        values[own["var"]] = jnp.asarray(var, values[own["var"]].dtype)
        exact = {name: np.asarray(values[leaf], float) for name, leaf in own.items()}
        added = 0 if bias is None else np.asarray(values[bias], float)
        return affine_image(steps, values, features, moved), exact, added

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
    return step.eqn.primitive.name in ARITHMETIC and not step.leaves


def _close(form: Any, expected: tuple, size: Any, tolerance: float) -> bool:
    """Whether `form` is the (a, b) expected, where terms of `size` add up to b."""
    if form is None or form[0].shape != np.broadcast_shapes(*map(np.shape, expected)):
        return False
    off_a, off_b = (abs(x - y) for x, y in zip(form, expected, strict=True))
    return bool((off_a <= tolerance * abs(expected[0])).all()) and bool(
        (off_b <= tolerance * size).all()
    )


def _drawn(trace: Trace, leaves: Sequence[Leaf], rng: np.random.Generator) -> dict:
    """Random values for `leaves`, far enough from 0 to divide by."""
    return {
        leaf: jnp.asarray(
            rng.uniform(0.5, 2, trace.leaves[leaf].shape)
            * rng.choice([-1, 1], trace.leaves[leaf].shape),
            trace.leaves[leaf].dtype,
        )
        for leaf in leaves
    }
