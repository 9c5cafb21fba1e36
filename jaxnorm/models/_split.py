"""Which variables are those of norms, and which are all the others?"""

from collections.abc import Mapping
from typing import Any

from jaxnorm.models._paths import (
    Tree,
    Where,
    check_tree,
    copied,
    everywhere,
    join_path,
    select_norms,
)


def split(
    variables: Mapping[str, Tree], where: Where = everywhere
) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """The variables of the norms that `where` selects, and all other variables (FedBN).

    A client that keeps the first and shares the second trains on data of its own
    distribution. `join` puts them together.

    Args:
        variables: {"params", "batch_stats"} of a model, as nested dicts.
        where: whether to take the norm at a path, such as "Block_0/BatchNorm_1".

    Returns:
        Two trees of the same collections, each without what is in the other, of copies
        of the arrays.

    Raises:
        ValueError: if `where` selects no norm.
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
    paths = {*select_norms(variables, where)}
    for name, tree in variables.items():
        check_tree(tree, f"variables[{name!r}]")
    trees = copied(dict(variables))
    if "" in paths:
        return trees, {name: {} for name in trees}
    parts = {name: _parted(tree, paths, "") for name, tree in trees.items()}
    norms, others = ({name: part[i] for name, part in parts.items()} for i in range(2))
    return norms, others


def join(norms: Mapping[str, Tree], others: Mapping[str, Tree]) -> dict[str, Tree]:
    """The variables of a model from the two trees that `split` made of them.

    Its arrays are copies. Raises ValueError where both have an array at the same path,
    and TypeError for what are no trees of arrays.
    """
    check_tree(norms, "norms")
    check_tree(others, "others")
    return copied(_joined(norms, others, ""))


def _parted(
    tree: Tree, paths: set[str], path: str
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The nodes at `paths` of `tree`, which is at `path`, and the rest of it."""
    norms, others = {}, {}
    for k, node in tree.items():
        here = join_path(path, k)
        if here in paths:
            norms[k] = node
        elif isinstance(node, Mapping) and node:
            inner, outer = _parted(node, paths, here)
            norms |= {k: inner} if inner else {}
            others |= {k: outer} if outer else {}
        else:
            others[k] = node
    return norms, others


def _joined(a: Tree, b: Tree, path: str) -> dict[Any, Any]:
    """All nodes of `a` and `b`, which are at `path`."""
    out = dict(a)
    for k, node in b.items():
        here = join_path(path, k)
        if k in a and not (isinstance(a[k], Mapping) and isinstance(node, Mapping)):
            raise ValueError(f"both trees hold {here!r}: join the two of one split")
        out[k] = _joined(a[k], node, here) if k in a else node
    return out
