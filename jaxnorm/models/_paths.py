"""Which layers of a model are norms or keep running statistics, and at which paths?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxnorm import _running as running
from jaxnorm._arguments import shown

Where = Callable[[str], bool]  # whether to take the layer at a path
Tree = Any  # nested mappings of arrays, such as Flax's batch_stats

# What the methods of jaxnorm call their parameters. A norm of one's own with others has
# no part in it: what a model's norms are does not depend on which classes there are.
PARAM_NAMES = frozenset(
    {
        "alpha",
        "bias",
        "control",
        "control_mean",
        "control_product",
        "extra_epsilon",
        "mean_scale",
        "mean_weight",
        "scale",
        "sigma",
        "slope",
        "threshold",
        "var_weight",
    }
)


def everywhere(path: str) -> bool:
    """True, for a layer at any path."""
    return True


def check_tree(tree: Any, name: str) -> None:
    """Raises TypeError unless `tree`, the argument `name`, is a mapping of arrays.

    They may be nested, in whatever JAX can flatten, and known by shape and dtype only.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"{name} must be nested mappings of arrays, as a Linen model has them, got "
            f"{shown(tree)}: of an NNX model take jaxnorm.nnx.variables(model)"
        )
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not _is_array(value):
            raise TypeError(
                f"{name} must hold arrays and nothing else, got {shown(value)} at "
                f"{path_name(path)!r}: of an NNX model take "
                "jaxnorm.nnx.variables(model)"
            )


def check_variables(variables: Any, name: str = "variables") -> None:
    """Raises TypeError unless `variables` hold trees of parameters and statistics."""
    check_tree(variables, name)
    for collection in ("params", "batch_stats"):
        check_tree(variables.get(collection, {}), f"{name}[{collection!r}]")


def check_layers(tree: Any, name: str) -> None:
    """As `check_tree`, also for a list or tuple of trees, such as one of each layer."""
    check_tree(dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree, name)


def _is_array(value: Any) -> bool:
    """Whether `value` is an array of numbers, a number, or has the shape of one."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return isinstance(value, bool | int | float | complex)
    return not (isinstance(value, np.ndarray) and value.dtype.kind in "OSUMm")


def is_layer(node: Any) -> bool:
    """Whether `node` holds the running statistics of one layer: "mean" or "var"."""
    if not isinstance(node, Mapping) or any(
        isinstance(v, Mapping) for v in node.values()
    ):
        return False
    return "mean" in node or "var" in node


def layers(batch_stats: Tree) -> dict[str, dict[str, Any]]:
    """The running statistics of each layer, by its path, such as "Block_0/BatchNorm_1".

    The path of statistics on their own, as a pure function takes them, is "". Raises
    TypeError for what is no tree of arrays.
    """
    check_layers(batch_stats, "batch_stats")
    found = jax.tree_util.tree_flatten_with_path(batch_stats, is_leaf=is_layer)[0]
    return {path_name(path): dict(node) for path, node in found if is_layer(node)}


def select_layers(batch_stats: Tree, where: Where) -> dict[str, dict[str, Any]]:
    """The statistics of each layer that `where` selects, by its path.

    Raises ValueError if there is none.
    """
    return select(layers(batch_stats), where, "layers with running statistics")


def select(found: Mapping[str, Any], where: Where, what: str) -> dict[str, Any]:
    """The items of `found` whose paths `where` selects.

    Raises ValueError if there is none; the message calls them `what`.
    """
    if not callable(where):
        raise TypeError(
            "where must be a function of a layer's path that returns True or False, "
            f"such as {next(iter(found), 'norm')!r}.__eq__, got {shown(where)}"
        )
    if not found:
        raise ValueError(
            f"there are no {what}: pass the variables of a model that has some, from "
            "`init` of a Linen model, or jaxnorm.nnx.variables(model)"
        )
    some = {path: value for path, value in found.items() if where(path)}
    if not some:
        raise ValueError(
            f"`where` means none of the {what}, which are {list(found)}: return True "
            "for the paths of some of them"
        )
    return some


def with_layers(batch_stats: Tree, new: Mapping[str, Mapping[str, Any]]) -> Tree:
    """`batch_stats` with `new` statistics for the layers at these paths.

    All arrays are copied, except traced ones.
    """

    def replaced(path: tuple[Any, ...], node: Any) -> Any:
        return new.get(path_name(path), node) if is_layer(node) else node

    return copied(
        jax.tree_util.tree_map_with_path(replaced, batch_stats, is_leaf=is_layer)
    )


def copied(tree: Tree) -> Tree:
    """A copy of `tree`, whose arrays may be donated while `tree` is in use."""
    return jax.tree.map(
        lambda v: running.copy_of(v) if isinstance(v, Array) else v, tree
    )


def map_layers(
    f: Callable[..., Mapping[str, Any]],
    batch_stats: Tree,
    *others: Tree,
    where: Where = everywhere,
) -> Tree:
    """`batch_stats` with `f(path, stats, *stats_of_others)` for each layer that `where`
    selects.

    Raises ValueError where the trees do not hold the same layers.
    """
    found, *rest = (layers(tree) for tree in (batch_stats, *others))
    for other in rest:
        check_same(found, other)
    selected = select_layers(batch_stats, where)
    new = {p: f(p, stats, *(r[p] for r in rest)) for p, stats in selected.items()}
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


def join_path(path: str, name: Any) -> str:
    """The path of what the node at `path` holds under `name`."""
    return f"{path}/{name}" if path else str(name)


def keys_at(trees: Iterable[Tree], path: str) -> tuple[Any, ...] | None:
    """The keys that lead to the node at `path` in the first tree that has it."""

    def search(node: Tree, at: str) -> tuple[Any, ...] | None:
        if at == path:
            return ()
        for k, inner in node.items() if isinstance(node, Mapping) else ():
            here = join_path(at, k)
            if path == here or path.startswith(f"{here}/"):
                keys = search(inner, here)
                if keys is not None:
                    return (k, *keys)
        return None

    return next((k for k in (search(t, "") for t in trees) if k is not None), None)


def set_at(
    tree: Tree, keys: tuple[Any, ...], node: Mapping[str, Any]
) -> dict[Any, Any]:
    """`tree` with the arrays of `node` at `keys`; what is nested there stays."""
    here = node_at(tree, keys).items()
    nested = {k: v for k, v in here if isinstance(v, Mapping)}
    return put_at(tree, keys, nested | dict(node))


def node_at(tree: Tree, keys: tuple[Any, ...]) -> Tree:
    """The node of `tree` at `keys`; an empty one if there is none."""
    for key in keys:
        tree = tree.get(key, {})
    return tree


def put_at(tree: Tree, keys: tuple[Any, ...], node: Tree) -> dict[Any, Any]:
    """`tree` with `node` at `keys` in the place of all there; an empty one leaves
    nothing."""
    if not keys:
        return dict(node)
    new = dict(tree)
    inner = put_at(new.pop(keys[0], {}), keys[1:], node)
    return new | ({keys[0]: inner} if inner else {})


def with_node(tree: Tree, path: str, node: Mapping[str, Any]) -> Tree:
    """`tree` with `node` at `path`, if it has that; an empty one leaves nothing."""
    keys = keys_at([tree], path)
    return tree if keys is None else set_at(tree, keys, node)


def nodes_of(tree: Tree, path: str = "") -> dict[str, Mapping[str, Any]]:
    """Each mapping within `tree`, by its path."""
    found = {path: tree} if path else {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            found |= nodes_of(node, join_path(path, name))
    return found


def norm_params(params: Tree) -> dict[str, dict[str, Any]]:
    """The parameters of each norm of a model, by its path.

    A norm is a node that holds nothing but arrays under some of `PARAM_NAMES`. So a
    module of a lone bias counts, too.
    """
    found: dict[str, dict[str, Any]] = {}
    map_params(lambda path, node: found.update({path: dict(node)}), params)
    return found


def select_norms(
    variables: Mapping[str, Tree], where: Where
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and statistics of each norm that `where` selects, by its path.

    A lone bias without statistics is not taken for a norm. Raises ValueError if `where`
    selects none, and TypeError for what are no trees of arrays.
    """
    check_variables(variables)
    params = norm_params(variables.get("params", {}))
    stats = layers(variables.get("batch_stats", {}))
    found = {
        path: (params.get(path, {}), stats.get(path, {}))
        for path in {**params, **stats}
        if path in stats or {*params[path]} != {"bias"}
    }
    return select(found, where, "norms")


def map_params(
    f: Callable[[str, Any], Any],
    params: Tree,
    others: Callable[[Any], Any] | None = None,
) -> Tree:
    """`f(path, parameters)` for each norm, and `others(array)` for all else.

    Raises TypeError for what is no tree of arrays.
    """
    check_layers(params, "params")

    def one(path: tuple[Any, ...], node: Any) -> Any:
        if _is_norm(node):
            return f(path_name(path), node)
        return others(node) if others else node

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_norm)


def _is_norm(node: Any) -> bool:
    """Whether `node` holds the parameters of one norm."""
    return (
        isinstance(node, Mapping)
        and len(node) > 0
        and PARAM_NAMES.issuperset(node)
        and not any(isinstance(v, Mapping) for v in node.values())
    )
