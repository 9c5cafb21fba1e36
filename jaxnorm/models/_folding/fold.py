"""How does a batch norm disappear into the layer beside it, for inference?"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm._arguments import (
    as_bool,
    as_epsilon,
    as_integer,
    check_known,
    optional,
    shown,
)
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm.models._leaves import array_of, boxed_like, unboxed
from jaxnorm.models._paths import (
    Tree,
    check_tree,
    check_variables,
    copied,
    join_path,
    keys_at,
    layers,
    path_name,
    set_at,
)

Layer = Mapping[str, ArrayLike]  # {"kernel"} or {"kernel", "bias"}


class Pair(NamedTuple):
    """A layer and the norm beside it, by their paths, such as "Block_0/Conv_1".

    `find_pairs` fills in all of it; on its own, `(layer, norm)` says enough where the
    norm takes the output of one of Flax's layers.

    Args:
        layer: path of the layer, whose parameters are "kernel" and maybe "bias".
        norm: path of the norm, whose statistics are "var" and maybe "mean".
        epsilon: what the norm adds to the variance.
        norm_first: the layer takes the output of the norm, not the norm the layer's.
        axis: of the kernel, for the features of the norm; by default -1 for outputs and
            -2 for inputs, as in Flax. With `transpose_kernel=True` it is the other one.
        groups: `feature_group_count` of the layer; counts where the norm is first.
        padded: whether the layer reads zeros beside its input, see `fold_input`.
    """

    layer: str
    norm: str
    epsilon: float | None = None
    norm_first: bool = False
    axis: int | None = None
    groups: int = 1
    padded: bool | None = None


def affine_form(
    params: Mapping[str, ArrayLike | None],
    stats: Mapping[str, ArrayLike],
    *,
    epsilon: float,
) -> tuple[Array, Array]:
    """What a batch norm is in evaluation: `a * x + b` for each feature.

        a = scale / sqrt(var + epsilon)
        b = bias - mean * a

    This is so for every norm that evaluates as `BatchNorm` does, by running statistics.
    `EvalNorm` does not, and cannot be told from them by its variables; `find_pairs`
    can tell.

    Args:
        params: {"scale", "bias"}, of which either may be missing or None: 1 and 0. A
            "control" counts for nothing.
        stats: {"mean", "var"}, or {"var"} alone, as of `PowerNorm`: the mean is 0.
        epsilon: that of the layer. Variables do not hold it, and the defaults of
            layers differ, so that there is none here.

    Returns:
        a and b, in at least float32.

    Raises:
        ValueError, TypeError: for parameters of other methods, missing statistics,
            shapes that differ, and an epsilon that is negative or no number.

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
    >>> a, b = models.affine_form({"scale": jnp.array([6.0])}, stats, epsilon=0.0)
    >>> print(a, b)
    [3.] [-3.]
    """
    check_tree(params, "params")
    check_tree(stats, "stats")
    unknown = sorted({*params} - {"scale", "bias", "control"})
    if unknown:
        raise ValueError(
            f"a norm with the parameters {unknown} is not affine in its input: only "
            "norms of scale and bias can be folded"
        )
    if stats.get("var") is None:
        raise ValueError(
            f"a norm to fold keeps a running variance, 'var', got {sorted(stats)}"
        )
    check_known("epsilon", as_epsilon("epsilon", epsilon))
    named = {k: {**params, **stats}.get(k) for k in ("scale", "bias", "mean", "var")}
    held = {k: array_of(k, v) for k, v in named.items() if v is not None}
    shapes = {k: v.shape for k, v in held.items()}
    if len({*shapes.values()}) > 1:
        raise ValueError(
            f"the parameters and statistics of a norm are of one shape, got {shapes}: "
            "take both from one layer, and one row of a table of domains or steps"
        )
    wide = at_least_float32(promote(*(v.dtype for v in held.values())))
    held = {k: v.astype(wide) for k, v in held.items()}
    a = held.get("scale", 1) / jnp.sqrt(held["var"] + epsilon)
    b = held.get("bias", 0) - held.get("mean", 0) * a
    return a, b


def fold_output(
    layer: Layer, a: ArrayLike, b: ArrayLike, *, axis: int = -1
) -> dict[str, ArrayLike]:
    """The layer whose output is `a * y + b`, where that of `layer` is `y`.

        kernel = kernel * a         # along the output features
        bias = bias * a + b         # where there is none, it is 0

    Exact for every Dense, Conv and ConvTranspose, dilated, grouped and depthwise ones
    included.

    Args:
        layer: {"kernel", "bias"}, or {"kernel"}.
        a, b: of shape (output features,), from `affine_form`.
        axis: of the kernel, for the output features: -1 in Flax, but -2 for a
            ConvTranspose with `transpose_kernel=True`.

    Returns:
        {"kernel", "bias"} in the dtypes of the layer, rounded once from at least
        float32; a new bias has the dtype of the kernel. What else the layer holds is
        copied, and boxes of Flax's, such as `nn.Partitioned`, stay around what they
        held.

    Raises:
        ValueError, TypeError: for shapes that do not fit, and a layer without a kernel,
            or with one of integers.

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> layer = {"kernel": jnp.ones((2, 1))}
    >>> print(models.fold_output(layer, jnp.array([3.0]), jnp.array([-3.0]))["bias"])
    [-3.]
    """
    kernel, a, b = _arrays(layer, a, b)
    shape = [1] * kernel.ndim
    shape[_axis(kernel, axis)] = a.size
    _check_features(kernel, a.size, axis)
    return _layer(layer, kernel * a.reshape(shape), _bias(layer, a) * a + b)


def fold_input(
    layer: Layer,
    a: ArrayLike,
    b: ArrayLike,
    *,
    axis: int = -2,
    groups: int = 1,
    padded: bool | None = None,
) -> dict[str, ArrayLike]:
    """The layer that makes of `x` what `layer` makes of `a * x + b`.

        kernel_of_b = sum(kernel * b)    # over space and input features
        kernel = kernel * a              # along the input features
        bias = bias + kernel_of_b        # where there is none, it is 0

    Zeros that a convolution reads beside its input stand beside `a * x + b`; folded,
    they would stand beside `x`, which is the same only where `b` is 0.

    Args:
        layer: {"kernel", "bias"}, or {"kernel"}.
        a, b: of shape (input features,), from `affine_form`.
        axis: of the kernel, for the input features: -2 in Flax, but -1 for a
            ConvTranspose with `transpose_kernel=True`. The other is the outputs'.
        groups: `feature_group_count` of the layer.
        padded: whether the layer reads zeros beside its input: False for a Dense, and
            for a Conv with the padding "VALID" or 0; True for every ConvTranspose. By
            default False for kernels of two axes, and True for others.

    Returns:
        As `fold_output` does.

    Raises:
        ValueError, TypeError: as `fold_output` does, and where `padded` and `b` is not
            known to be 0 (as a traced one is not).

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> layer = {"kernel": jnp.ones((2, 1))}
    >>> a, b = jnp.array([3.0, 1.0]), jnp.array([1.0, -5.0])
    >>> print(models.fold_input(layer, a, b)["bias"])
    [-4.]
    """
    kernel, a, b = _arrays(layer, a, b)
    if as_integer("groups", groups) < 1:
        raise ValueError(
            f"groups must be 1 or more, got {groups}: the feature_group_count of the "
            "layer"
        )
    optional(as_bool)("padded", padded)
    if {_axis(kernel, axis)} - {kernel.ndim - 1, kernel.ndim - 2}:
        raise ValueError(
            f"input features are on axis -2 or -1 of a kernel, got axis={axis} for one "
            f"of shape {kernel.shape}"
        )
    _check_features(kernel, a.size, axis, groups)
    if padded if padded is not None else kernel.ndim > 2:
        _check_zero(b)
    by_group = _by_group(kernel, axis, groups)
    shape = (*[1] * (kernel.ndim - 2), -1, groups, 1)
    a, b = (v.reshape(groups, -1).T.reshape(shape) for v in (a, b))
    added = (by_group * b).sum(tuple(range(kernel.ndim - 1))).reshape(-1)
    folded = (by_group * a).reshape((*by_group.shape[:-2], added.size))
    return _layer(layer, jnp.moveaxis(folded, -2, axis), _bias(layer, added) + added)


def fold(
    variables: Mapping[str, Tree],
    pairs: Mapping[str, str] | Iterable[Sequence[Any]],
    *,
    epsilon: float | None = None,
) -> dict[str, Tree]:
    """The variables of the model without the norms of `pairs`, for inference.

    Each layer gets the kernel and bias that do the work of its norm, too
    (`fold_output`, `fold_input`); one that had no bias gets one. So the result fits the
    same model without these norms and with `use_bias=True` in these layers. What
    follows the formula of a norm stays with the model: where it was
    `BatchNorm(activation="relu")(x, residual=r)`, it is `relu(x + r)`, and what a mask
    excludes is 0.

    Args:
        variables: {"params", "batch_stats"} of a model, others are kept.
        pairs: from `find_pairs`, or (layer path, norm path), or a `Pair` each; or a
            mapping of layer paths to norm paths.
        epsilon: what the norms add to the variance, for pairs that do not say it.

    Returns:
        New variables, in buffers of their own, in which the norms are gone. A
        collection of which nothing is left is gone, too, as it is in the variables of a
        model without norms.

    Raises:
        ValueError, TypeError: for no pairs, a path that the variables have not, a layer
            or norm in two pairs, a missing epsilon, shapes that do not fit, and a norm
            before a padded layer (see `fold_input`).

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 1))}},
    ...              "batch_stats": {"BatchNorm_0": jaxnorm.init_stats(1)}}
    >>> models.fold(variables, {"Dense_0": "BatchNorm_0"}, epsilon=0.0)["params"]
    {'Dense_0': {'bias': Array([0.], dtype=float32), 'kernel': Array([[1.],
           [1.]], dtype=float32)}}
    """
    check_variables(variables)
    params, stats = variables.get("params", {}), variables.get("batch_stats", {})
    optional(as_epsilon)("epsilon", epsilon)
    nodes = _nodes(params)
    norms = {path: own for path, own in layers(stats).items() if path}
    chosen = as_pairs(pairs)
    _check_pairs(chosen, nodes, norms)
    for pair in chosen:
        _check_dicts(pair.norm, params, stats)
    for pair in chosen:
        node, norm = nodes[pair.layer], nodes.get(pair.norm, {})
        layer = _folded(pair, node, norm, norms[pair.norm], epsilon)
        params = _with(params, pair.layer, layer)
        params, stats = (_with(tree, pair.norm, {}) for tree in (params, stats))
    left = {**variables, "params": params, "batch_stats": stats}
    return copied(
        {name: tree for name, tree in left.items() if tree or not variables[name]}
    )


def as_pairs(pairs: Mapping[str, str] | Iterable[Sequence[Any]]) -> list[Pair]:
    """What `fold` takes as `pairs`, as a list of `Pair`; else raises TypeError."""
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes | Pair):
        raise TypeError(
            f"pairs must be a list of pairs or a mapping, got {shown(pairs)}: "
            '[("Conv_0", "BatchNorm_0")], or what find_pairs returns'
        )
    named = pairs.items() if isinstance(pairs, Mapping) else pairs
    return [_as_pair(pair) for pair in named]


def _as_pair(pair: Any) -> Pair:
    """A `Pair` of what `pair` holds."""
    listed = isinstance(pair, Sequence) and not isinstance(pair, str | bytes)
    if listed and 2 <= len(pair) <= len(Pair._fields):
        made = Pair(*cast(Iterable[Any], pair))
        paths = isinstance(made.layer, str) and isinstance(made.norm, str)
        if paths and isinstance(made.norm_first, bool):
            return made
    raise TypeError(
        "each of pairs must be the path of a layer and that of its norm, and maybe "
        f"what a Pair says more, got {pair!r}"
    )


def _folded(
    pair: Pair,
    layer: Layer,
    params: Mapping[str, ArrayLike],
    stats: Mapping[str, ArrayLike],
    epsilon: float | None,
) -> dict[str, ArrayLike]:
    """The layer of `pair`, with its norm in it; errors name both."""
    epsilon = epsilon if pair.epsilon is None else pair.epsilon
    try:
        if epsilon is None:
            raise ValueError(
                "variables do not hold the epsilon of a norm: pass epsilon=, that of "
                "the model's layers, or take the pairs from find_pairs"
            )
        a, b = affine_form(params, stats, epsilon=epsilon)
        if not pair.norm_first:
            axis = -1 if pair.axis is None else pair.axis
            return fold_output(layer, a, b, axis=axis)
        axis = -2 if pair.axis is None else pair.axis
        groups, padded = pair.groups, pair.padded
        return fold_input(layer, a, b, axis=axis, groups=groups, padded=padded)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"cannot fold {pair.norm!r} into {pair.layer!r}: {error}") from error


def _arrays(layer: Layer, a: ArrayLike, b: ArrayLike) -> tuple[Array, Array, Array]:
    """Kernel, a and b in the dtype to compute in; raises unless a and b fit."""
    check_tree(layer, "layer")
    if "kernel" not in layer:
        raise ValueError(
            f"a layer to fold a norm into holds a 'kernel', got {sorted(layer)}: pass "
            "the parameters of one Dense, Conv or ConvTranspose"
        )
    named = {"kernel": layer["kernel"], "a": a, "b": b}
    kernel, a, b = (array_of(name, v) for name, v in named.items())
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(
            f"a norm cannot be folded into a kernel of {kernel.dtype}: fold it into "
            "the floating point one, and quantize that then"
        )
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            "a norm to fold has one mean and variance per feature, on one axis, but "
            f"here a and b are of shapes {a.shape} and {b.shape}"
        )
    wide = promote(at_least_float32(kernel.dtype), a.dtype, b.dtype)
    return kernel.astype(wide), a.astype(wide), b.astype(wide)


def _axis(kernel: Array, axis: int) -> int:
    """`axis` counted from the first; raises unless `kernel` has it."""
    axis = as_integer("axis", axis)
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(f"a kernel of shape {kernel.shape} has no axis {axis}")
    return axis % kernel.ndim


def _check_features(kernel: Array, features: int, axis: int, groups: int = 1) -> None:
    size = kernel.shape[axis]
    if size * groups == features:
        return
    fix = "fold it into the layer beside it, and pass axis= for a transposed kernel"
    if features % size == 0 and features > size:
        fix += f", or groups={features // size} for a norm before a grouped convolution"
    raise ValueError(
        f"the norm has {features} features, but axis {axis} of a kernel of shape "
        f"{kernel.shape} with groups={groups} is for {size * groups}: {fix}"
    )


def _check_zero(b: Array) -> None:
    """Raises unless `b` is known to be 0."""
    if not isinstance(b, Tracer) and not b.any():
        return
    raise ValueError(
        "the zeros that pad the input of this layer stand beside the normalized input, "
        "and would not once the norm is folded, as its b = bias - mean * a is not "
        "known to be 0: pass padded=False if the layer pads nothing (a Conv with "
        "padding 'VALID'), or leave this pair out"
    )


def _by_group(kernel: Array, axis: int, groups: int) -> Array:
    """The kernel as (*space, inputs of a group, groups, outputs of a group)."""
    kernel = jnp.moveaxis(kernel, axis, -2)
    if kernel.shape[-1] % groups:
        raise ValueError(
            f"groups={groups} does not divide the {kernel.shape[-1]} output features: "
            "it is the feature_group_count of the layer"
        )
    return kernel.reshape((*kernel.shape[:-1], groups, -1))


def _bias(layer: Layer, like: Array) -> Array:
    """The bias of `layer`, or 0, in the dtype and shape of `like`."""
    bias = array_of("bias", layer.get("bias", jnp.zeros_like(like)))
    if bias.shape != like.shape:
        raise ValueError(
            f"the layer has {like.size} output features, but a bias of shape "
            f"{bias.shape}: take both from one model"
        )
    return bias.astype(like.dtype)


def _layer(layer: Layer, kernel: Array, bias: Array) -> dict[str, ArrayLike]:
    """`layer` with these, in its own dtypes and boxes."""
    new = {k: v for k, v in layer.items() if k not in ("kernel", "bias")}
    for k, v in {"kernel": kernel, "bias": bias}.items():
        old = layer.get(k, unboxed(layer["kernel"]))
        dtype = jnp.result_type(unboxed(old))
        if jnp.iscomplexobj(v) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"the {k} of the layer is {dtype}, and would be complex with a norm of "
                "complex numbers in it: leave this pair out"
            )
        new[k] = boxed_like(old, v.astype(dtype))
    return copied(new)


def _check_pairs(
    pairs: list[Pair], nodes: Mapping[str, Any], norms: Mapping[str, Any]
) -> None:
    """Raises unless each path is there, once."""
    kernels = [path for path, node in nodes.items() if "kernel" in node]
    if not pairs:
        raise ValueError(
            "pairs must name a layer and a norm, got none: where find_pairs finds "
            "none, no norm can be folded"
        )
    for pair in pairs:
        if pair.layer not in kernels:
            raise ValueError(
                f"no layer at {pair.layer!r} has a kernel: those that do are {kernels}"
            )
        if pair.norm not in norms:
            raise ValueError(
                f"no norm at {pair.norm!r} has running statistics: those that do are "
                f"{list(norms)}"
            )
    for path, times in Counter(p for pair in pairs for p in pair[:2]).items():
        if times > 1:
            raise ValueError(
                f"{path!r} is in {times} pairs, but a norm goes into one layer, and a "
                "layer takes in one norm at a time: fold one pair of them"
            )


def _check_dicts(path: str, *trees: Tree) -> None:
    """Raises where the node at `path` is within a list or tuple."""
    for tree in trees:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        has = any(path_name(at).startswith(f"{path}/") for at, _ in leaves)
        if has and keys_at([tree], path) is None:
            raise ValueError(
                f"the norm at {path!r} is within a list or tuple, which cannot lose "
                "it: fold trees of dicts"
            )


def _nodes(tree: Tree, path: str = "") -> dict[str, Mapping[str, Any]]:
    """Each mapping within `tree`, by its path."""
    found = {path: tree} if path else {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            found |= _nodes(node, join_path(path, name))
    return found


def _with(tree: Tree, path: str, node: Layer) -> Tree:
    """`tree` with `node` at `path`, if it has that; an empty one leaves nothing."""
    keys = keys_at([tree], path)
    return tree if keys is None else set_at(tree, keys, node)
