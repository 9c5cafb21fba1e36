"""Which layers of a model keep running statistics, and at which paths?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Where = Callable[[str], bool]  # whether the layer at a path is meant
Tree = Any  # nested mappings of arrays, such as Flax's batch_stats


def everywhere(path: str) -> bool:
    """Means every layer."""
    return True


def is_layer(node: Any) -> bool:
    """Whether `node` holds the running statistics of one layer: "mean" or "var"."""
    if not isinstance(node, Mapping):
        return False
    return any(k in node and not isinstance(node[k], Mapping) for k in ("mean", "var"))


def layers(batch_stats: Tree) -> dict[str, dict[str, Any]]:
    """The running statistics of each layer, by its path, such as "Block_0/BatchNorm_1".

    The path of statistics on their own, as a pure function takes them, is "".
    """
    found = jax.tree_util.tree_flatten_with_path(batch_stats, is_leaf=is_layer)[0]
    return {path_name(path): dict(node) for path, node in found if is_layer(node)}


def chosen(batch_stats: Tree, where: Where) -> dict[str, dict[str, Any]]:
    """Those of the `layers` that `where` means; raises ValueError if there are none."""
    found = layers(batch_stats)
    meant = {path: stats for path, stats in found.items() if where(path)}
    if not meant:
        raise ValueError(
            "`where` means none of the layers with running statistics, which are "
            f"{list(found)}: return True for the paths of some of them"
        )
    return meant


def with_layers(batch_stats: Tree, new: Mapping[str, Mapping[str, Any]]) -> Tree:
    """`batch_stats` with the layers at the paths of `new` in place of their own."""

    def replaced(path, node):
        return new.get(path_name(path), node) if is_layer(node) else node

    return jax.tree_util.tree_map_with_path(replaced, batch_stats, is_leaf=is_layer)


def map_layers(
    f: Callable[..., Mapping[str, Any]],
    batch_stats: Tree,
    *others: Tree,
    where: Where = everywhere,
) -> Tree:
    """`f(stats, *stats_of_others)` for each layer that `where` means; others stay.

    Raises ValueError where the trees do not hold the same layers.
    """
    found, *rest = (layers(tree) for tree in (batch_stats, *others))
    for other in rest:
        check_same(found, other)
    meant = chosen(batch_stats, where)
    new = {p: f(stats, *(r[p] for r in rest)) for p, stats in meant.items()}
    return with_layers(batch_stats, new)


def check_same(a: Iterable[str], b: Iterable[str]) -> None:
    """Raises ValueError unless `a` and `b` are the paths of the same layers."""
    only_a, only_b = sorted({*a} - {*b}), sorted({*b} - {*a})
    if only_a or only_b:
        raise ValueError(
            "the trees must hold statistics of the same layers, but only the first "
            f"has {only_a} and only the other has {only_b}: take both from one model"
        )


def check_shapes(path: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises ValueError unless the layers hold the same names, of the same shapes."""
    shapes = [{k: jnp.shape(v) for k, v in layer.items()} for layer in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the statistics of {path!r} must be of the same shapes, got {shapes[0]} "
            f"and {shapes[1]}: take both from one model"
        )


def path_name(path: tuple[Any, ...]) -> str:
    """A path of JAX's as one string, "Block_0/BatchNorm_1"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
