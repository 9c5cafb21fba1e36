"""Which variables are those of norms, and which are all the others?"""

from collections.abc import Mapping
from typing import Any

from jaxnorm.models._paths import (
    Tree,
    Where,
    check_tree,
    chosen_norms,
    copied,
    everywhere,
    join_path,
)


def split(
    variables: Mapping[str, Tree], where: Where = everywhere
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """The variables of the norms that `where` means, and all others (FedBN).

    A client that keeps the first and shares the second trains on data of its own
    distribution. `join` puts them together.

    Args:
        variables: {"params", "batch_stats"} of a model, as nested dicts.
        where: whether the norm at a path, such as "Block_0/BatchNorm_1", is meant.

    Returns:
        Two trees of the same collections, each without what is in the other, of copies
        of the arrays.

    Raises:
        ValueError: if `where` means no norm.
        TypeError: for what are no trees of arrays.

    Source: Li et al., 2021 (https://arxiv.org/abs/2102.07623).

    >>> import jax.numpy as jnp, jaxnorm
    >>> variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 2))},
    ...                         "BatchNorm_0": {"scale": jnp.ones(2)}},
    ...              "batch_stats": {"BatchNorm_0": jaxnorm.init_stats(2)}}
    >>> norms, others = jaxnorm.models.split(variables)
    >>> print(list(norms["params"]), list(norms["batch_stats"]), list(others["params"]))
    ['BatchNorm_0'] ['BatchNorm_0'] ['Dense_0']
    """
    meant = {*chosen_norms(variables, where)}
    for name, tree in variables.items():
        check_tree(tree, f"variables[{name!r}]")
    trees = copied(dict(variables))
    if "" in meant:
        return trees, {name: {} for name in trees}
    parts = [_part(tree, meant, "") for tree in trees.values()]
    norms, others = ({}, {})
    for name, (mine, rest) in zip(trees, parts, strict=True):
        norms[name], others[name] = mine, rest
    return norms, others


def join(norms: Mapping[str, Tree], others: Mapping[str, Tree]) -> dict[str, Tree]:
    """The variables of a model of which `split` made these two trees.

    Its arrays are copies. Raises ValueError where both have an array at the same path,
    and TypeError for what are no trees of arrays.
    """
    check_tree(norms, "norms")
    check_tree(others, "others")
    return copied(_joined(norms, others, ""))


def _part(tree: Tree, meant: set[str], path: str) -> tuple[dict, dict]:
    """The nodes of `tree` at the paths that are meant, and the rest of it."""
    mine, rest = {}, {}
    for k, node in tree.items():
        here = join_path(path, k)
        if here in meant:
            mine[k] = node
        elif isinstance(node, Mapping) and node:
            inner, outer = _part(node, meant, here)
            mine |= {k: inner} if inner else {}
            rest |= {k: outer} if outer else {}
        else:
            rest[k] = node
    return mine, rest


def _joined(a: Tree, b: Tree, path: str) -> dict[str, Any]:
    out = dict(a)
    for k, node in b.items():
        here = join_path(path, k)
        if k in a and not (isinstance(a[k], Mapping) and isinstance(node, Mapping)):
            raise ValueError(f"both trees hold {here!r}: join the two of one split")
        out[k] = _joined(a[k], node, here) if k in a else node
    return out
