"""Which norm only scales and shifts the output, or the input, of one layer?"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxnorm.models._call import check_apply
from jaxnorm.models._folding.affine import ones_along
from jaxnorm.models._folding.formula import (
    adds_bias,
    bias_of,
    norm_applied,
    shifts,
)
from jaxnorm.models._folding.pair import Pair
from jaxnorm.models._folding.trace import Trace, traced
from jaxnorm.models._folding.values import Flow
from jaxnorm.models._paths import Tree, check_variables


def find_pairs(
    apply: Callable[..., Any], variables: Mapping[str, Tree], *args: Any, **kwargs: Any
) -> list[Pair]:
    """The pairs of a layer and a norm that `fold` can fold, found by tracing a model.

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
    fix = "jaxnorm.nnx.fold(model, ...) finds its pairs and folds them"
    check_apply(apply, "find_pairs", fix)
    check_variables(variables)
    trace = traced(apply, variables, args, kwargs)
    with jax.ensure_compile_time_eval():  # also while something else is traced
        return _pairs(trace)


def _pairs(trace: Trace) -> list[Pair]:
    """Each layer with the norm after it, or else with the one before it, if any."""
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
    if layer.kernel_output is None or layer.output_axis is None:
        return None
    bias = bias_of(trace, flow)
    feature_ones = ones_along(flow.aval, layer.output_axis)
    while at is not None:
        steps.append(at)
        applied = norm_applied(trace, steps, bias, feature_ones, moved=True)
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
    if layer.data_axis is None or not in_place or not adds_bias(trace, flow):
        return None
    feature_ones = ones_along(layer.data.aval, layer.data_axis)
    reader, at = flow, layer.data
    while at.parent is not None and at.users == [reader]:
        steps.insert(0, at)
        applied = norm_applied(trace, steps, None, feature_ones)
        if applied is not None and not (layer.padded and shifts(trace, applied[0])):
            how = {"groups": layer.groups, "padded": layer.padded}
            return Pair(layer.path, *applied, True, layer.kernel_input, **how)
        reader, at = at, at.parent
    return None
