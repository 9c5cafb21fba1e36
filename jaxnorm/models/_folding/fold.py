"""How does a batch norm disappear into the layer beside it, for inference?"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.typing import ArrayLike

from jaxnorm._arguments import as_epsilon, optional
from jaxnorm.models._folding.layer import LayerParams, fold_input, fold_output
from jaxnorm.models._folding.norm import affine_form
from jaxnorm.models._folding.pair import Pair, as_pairs
from jaxnorm.models._paths import (
    Tree,
    check_variables,
    copied,
    keys_at,
    layers,
    nodes_of,
    path_name,
    with_node,
)


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
    nodes = nodes_of(params)
    norms = {path: v for path, v in layers(stats).items() if path}
    pairs = as_pairs(pairs)
    _check_pairs(pairs, nodes, norms)
    for pair in pairs:
        check_dicts(pair.norm, params, stats)
    for pair in pairs:
        node, norm = nodes[pair.layer], nodes.get(pair.norm, {})
        layer = _folded(pair, node, norm, norms[pair.norm], epsilon)
        params = with_node(params, pair.layer, layer)
        params, stats = (with_node(tree, pair.norm, {}) for tree in (params, stats))
    left = {**variables, "params": params, "batch_stats": stats}
    return copied(
        {name: tree for name, tree in left.items() if tree or not variables[name]}
    )


def _folded(
    pair: Pair,
    layer: LayerParams,
    params: Mapping[str, ArrayLike],
    stats: Mapping[str, ArrayLike],
    epsilon: float | None,
) -> dict[str, ArrayLike]:
    """The layer of `pair` that also does the work of its norm; errors name both."""
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


def _check_pairs(
    pairs: list[Pair], nodes: Mapping[str, Any], norms: Mapping[str, Any]
) -> None:
    """Raises ValueError unless each path is that of one layer or norm, in one pair."""
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


def check_dicts(path: str, *trees: Tree) -> None:
    """Raises ValueError where the node at `path` is within a list or tuple."""
    for tree in trees:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        has = any(path_name(at).startswith(f"{path}/") for at, _ in leaves)
        if has and keys_at([tree], path) is None:
            raise ValueError(
                f"the norm at {path!r} is within a list or tuple, which cannot lose "
                "it: fold trees of dicts"
            )
