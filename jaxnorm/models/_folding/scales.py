"""How do scale and bias of a norm disappear into the layers that read its output?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxnorm.models._call import check_apply
from jaxnorm.models._folding.fold import check_dicts
from jaxnorm.models._folding.formula import adds_bias
from jaxnorm.models._folding.layer import scale_input
from jaxnorm.models._folding.scaled import Forms, Unknown
from jaxnorm.models._folding.trace import Trace, traced
from jaxnorm.models._folding.values import Flow, Variable
from jaxnorm.models._leaves import array_of
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_variables,
    copied,
    everywhere,
    layers,
    nodes_of,
    norm_params,
    select,
    with_node,
)


def fold_scales(
    apply: Callable[..., Any],
    variables: Mapping[str, Tree],
    *args: Any,
    where: Where = everywhere,
    **kwargs: Any,
) -> dict[str, Tree]:
    """The variables of the model with the scales and biases of norms in the layers
    after them, for inference.

        kernel = kernel * scale           # along the input features
        bias = bias + bias_of_norm @ kernel

    This is for norms that compute their statistics anew, such as `LayerNorm` and
    `RMSNorm`, where all that reads the normalized array are products with kernels, such
    as the projections of attention and the first layers of an MLP. The norms stay, and
    have no parameters: the result fits the same model with `use_scale=False,
    use_bias=False` in these norms, and, if they had a bias, `use_bias=True` in the
    layers. A norm without parameters returns the dtype of its input, unless it is given
    one. Layers that `nn.scan` has stacked are folded one by one, as they are called:
    `jax.vmap(lambda variables: fold_scales(block.apply, variables, x))`.

    Args:
        apply: the model in evaluation, `apply(variables, *args, **kwargs)`. It is
            traced, and what counts is what it computes.
        variables: {"params"} of a model, others are kept.
        args, kwargs: what else it takes. Of arrays only shapes and dtypes count, so
            that `jax.ShapeDtypeStruct` will do.
        where: whether to fold the norm at a path; by default all that have a scale and
            no running statistics.

    Returns:
        New variables, in buffers of their own, in the dtypes that they had.

    Raises:
        ValueError: where `where` means no norm; naming each norm that cannot be folded,
            and why: something else reads what it returns, such as a residual, a layer's
            kernel is read elsewhere, too, such as a tied embedding, features are split,
            or a layer does not add its bias to its output.
        TypeError: for an `apply` that is no function, and variables that are no arrays.

    >>> import jax.numpy as jnp, jaxnorm
    >>> def apply(variables, x):
    ...     params = variables["params"]
    ...     x = jaxnorm.rms_norm(x, **params["norm"])
    ...     return x @ params["query"]["kernel"], x @ params["key"]["kernel"]
    >>> layer, scale = {"kernel": jnp.ones((2, 1))}, jnp.array([3.0, 4.0])
    >>> params = {"query": layer, "key": layer, "norm": {"scale": scale}}
    >>> folded = jaxnorm.models.fold_scales(apply, {"params": params}, jnp.ones((5, 2)))
    >>> print(list(folded["params"]), folded["params"]["query"]["kernel"].ravel())
    ['key', 'query'] [3. 4.]
    """
    check_apply(apply, "fold_scales", "jaxnorm.nnx.fold_scales(model, ...) folds it")
    check_variables(variables)
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})
    norms = {
        path: node
        for path, node in norm_params(params).items()
        if path and "scale" in node and path not in layers(stats)
    }
    chosen = select(norms, where, "norms with a scale and without running statistics")
    trace = traced(apply, variables, args, kwargs)
    for path, found in _readers(trace, chosen).items():
        norm = norms[path]
        check_dicts(path, params)
        for reader in found:
            layer = nodes_of(params)[reader.path]
            scale = array_of("scale", norm["scale"]) + reader.offset
            new = scale_input(layer, scale, norm.get("bias"), axis=reader.axis)
            params = with_node(params, reader.path, new)
        params = with_node(params, path, {})
    return copied({**variables, "params": params})


class _Reader(NamedTuple):
    """A layer that reads a norm, by its path, and the input axis of its kernel.

    The norm multiplies by its scale plus `offset`.
    """

    path: str
    axis: int
    offset: float


def _readers(trace: Trace, norms: Mapping[str, Any]) -> dict[str, list[_Reader]]:
    """The layers that read each norm; one ValueError names what cannot be folded."""
    found, problems = {}, []
    with jax.ensure_compile_time_eval():  # also while something else is traced
        for path, norm in norms.items():
            try:
                found[path] = _readers_of(trace, path, norm)
            except Unknown as why:
                problems.append(f"{path}: {why}")
    if problems:
        raise ValueError(
            "\n    ".join(["the scales of these norms cannot be folded:", *problems])
            + "\nleave them out, with `where`"
        )
    return found


def _readers_of(trace: Trace, path: str, norm: Mapping[str, Any]) -> list[_Reader]:
    """The layers that read the norm at a path; raises Unknown for anything else."""
    others = sorted({*norm} - {"scale", "bias"})
    if others:
        raise Unknown(f"it has the parameters {others}, too")
    scale, bias = (Variable("params", path, name) for name in ("scale", "bias"))
    shape = trace.variables[scale].shape
    if len(shape) != 1:
        raise Unknown(f"its scale, of shape {shape}, is not one of features alone")
    forms, flows = Forms(scale, bias), []
    for flow in trace.flows:
        if flow.eqn is None and any(forms.form(arg) for arg in flow.args):
            raise Unknown("the model returns it, or what is made of it")
        if flow.layer is not None and forms.form(flow.layer.data):
            flows.append(flow)
            forms.found[flow] = None
        else:
            forms.form(flow)
    if not flows:
        raise Unknown("no layer reads it")
    readers = {_reader(trace, flow, forms, "bias" in norm, flows) for flow in flows}
    if len({reader.path for reader in readers}) < len(readers):
        raise Unknown("a layer reads it along several axes, or with several offsets")
    return sorted(readers)


def _reader(
    trace: Trace, flow: Flow, forms: Forms, has_bias: bool, flows: list[Flow]
) -> _Reader:
    """The layer that gives `flow`, if it can take in scale and bias; raises Unknown."""
    layer = flow.layer
    assert layer is not None
    form, name = forms.form(layer.data), f"the layer at {layer.path!r}"
    assert form is not None
    if flow.eqn.primitive.name != "dot_general":
        raise Unknown(f"{name} is a convolution")
    if layer.kernel_input is None or layer.data_axis != form.axis:
        raise Unknown(f"{name} sums over more than the features, or along another axis")
    if form.offset is None or form.biases != has_bias:
        raise Unknown(f"{name} reads it without its scale or its bias")
    if not trace.readers[layer.kernel] <= {*flows}:
        raise Unknown(f"the kernel of {name} is read elsewhere, too")
    if has_bias and not adds_bias(trace, flow):
        raise Unknown(f"{name} does not add its bias to its output, as it is")
    return _Reader(layer.path, layer.kernel_input, form.offset)
