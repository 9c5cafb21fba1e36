"""Which key of a checkpoint is which leaf of a model?"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxnorm._arguments import check_function, shown
from jaxnorm.models._checkpoints.conventions import FLAX, LEFT, Convention
from jaxnorm.models._checkpoints.wrappers import LAYER, Own, Parts, own_arrays, parts_of
from jaxnorm.models._paths import Tree

Renamed = Callable[[str], str | None] | Mapping[str, str] | None  # layers' paths
Kinds = Callable[[str], str | None] | Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a model, and its place in a checkpoint.

    Attributes:
        path: such as "params/Conv_0/kernel".
        layer: its layer's path, such as "Conv_0".
        name: its last part, such as "kernel"; of a wrapper's array its role, "scale".
        value: the array, or what has its shape and dtype.
        keys: of the checkpoint, in the order in which they are looked for.
        kind: of a kernel of axes in and out; None for all else.
        extras: what goes along with it, by key.
        kernel: of a wrapper's array, the kernel that it belongs to.
    """

    path: str
    layer: str
    name: str
    value: Any
    keys: tuple[str, ...]
    kind: str | None
    extras: Mapping[str, Any]
    kernel: "Leaf | None" = None


def leaves(
    variables: Tree, table: Convention, rename: Renamed, kinds: Kinds
) -> list[Leaf]:
    """All leaves of `variables`, in JAX's order of them."""
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    found = {parts_of(path): _shaped(value) for path, value in flat}
    _check_collections({path[0] if path else "" for path in found})
    _check_functions(rename=rename, kinds=kinds)
    own = own_arrays(path for path, _ in flat) if table.wrappers else {}
    places = {path: _place(path, own, table) for path in found}
    layers: dict[str, set[str]] = {}
    for _, layer, name in places.values():
        layers.setdefault(layer, set()).add(name)
    _check_paths("rename", rename, layers, _within)
    _check_paths("kinds", kinds, layers, str.__eq__)
    names = _names(places, layers, own, table)

    def leaf(path: Parts) -> Leaf:
        (collection, layer, name), value = places[path], found[path]
        is_kernel = name == "kernel" and value.ndim > 1
        place = [_source_name(layer, rename, table.separator)]
        if table.collections:
            place.insert(0, table.collections[collection])

        def key(name: str) -> str:
            return table.separator.join([v for v in place if v] + [name])

        extras = table.extras.get(name, {})
        if path in own:
            extras = {f"{v[:-1]}v": LEFT for v in names[path] if name == "u"}
        return Leaf(
            path="/".join(path),
            layer=layer,
            name=name,
            value=value,
            keys=tuple(key(v) for v in names[path]),
            kind=_kind(layer, kinds) if is_kernel else None,
            extras={key(k): v for k, v in extras.items()},
            kernel=leaf(own[path].kernel) if path in own else None,
        )

    return [leaf(path) for path in found]


def _place(
    path: Parts, own: Mapping[Parts, Own], table: Convention
) -> tuple[str, str, str]:
    """The collection of the array at a path, the path of its layer, and its name.

    A wrapper's array is of the layer in it, which is called as the wrapper is.
    """
    collection, *layer, name = path
    if path in own:
        *layer, name = *own[path].kernel[1:-1], own[path].role
    if table.wrappers:
        layer = [part for part in layer if part != LAYER]
    return collection, "/".join(layer), name


def _names(
    places: Mapping[Parts, tuple[str, str, str]],
    layers: Mapping[str, set[str]],
    own: Mapping[Parts, Own],
    table: Convention,
) -> dict[Parts, tuple[str, ...]]:
    """What the framework calls the array at each path."""
    names = {}
    for path, (_, layer, name) in places.items():
        kernelled = not layers[layer].isdisjoint(("kernel", "embedding"))
        of_layer = table.names if kernelled else table.norm_names
        names[path] = of_layer.get(name, (name,))
    for path, array in own.items():
        of_wrapper = table.wrappers[array.role]
        names[path] = of_wrapper[array.role]
        names[array.kernel] = of_wrapper["kernel"]
    return names


def _shaped(value: Any) -> Any:
    """`value`, as an array if it is a plain number."""
    return value if hasattr(value, "ndim") else np.asarray(value)


def check_checkpoint(name: str, checkpoint: Any) -> None:
    """Raises TypeError unless `checkpoint` is a mapping."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"{name} must be a mapping of arrays by their keys, got "
            f"{shown(checkpoint)}: of a module of torch pass its state_dict(), of a "
            "file what it holds"
        )


def flatten(checkpoint: Mapping[Any, Any], separator: str) -> dict[str, Any]:
    """The arrays of nested mappings, by their keys joined by `separator`."""

    def arrays(node: Mapping[Any, Any], start: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from arrays(value, f"{start}{key}{separator}")
            else:
                yield f"{start}{key}", value

    return dict(arrays(checkpoint, ""))


def nest(checkpoint: Mapping[str, Any], table: Convention) -> dict[str, Any]:
    """The arrays of `checkpoint` in mappings nested as the framework has them."""
    if table.collections is None:
        return dict(checkpoint)
    out: dict[str, Any] = {}
    for key, value in checkpoint.items():
        parts = key.split(table.separator)
        if table.modules:
            parts = [parts[0], table.separator.join(parts[1:-1]), parts[-1]]
        node = out
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    return out


def _source_name(layer: str, rename: Renamed, separator: str) -> str:
    """The checkpoint's name for the layer at a path."""
    if isinstance(rename, Mapping):
        starts = [start for start in rename if _within(start, layer)]
        if starts:
            start = max(starts, key=len)
            rest = layer[len(start) :].strip("/").replace("/", separator)
            name = _checked_name(layer, rename[start])
            return separator.join(v for v in (name, rest) if v)
    elif rename is not None:
        name = rename(layer)
        if name is not None:
            return _checked_name(layer, name)
    return layer.replace("/", separator)


def _checked_name(layer: str, name: Any) -> str:
    """The name that `rename` gives a layer; raises TypeError unless it is a string."""
    if not isinstance(name, str):
        raise TypeError(
            f"`rename` must give {layer!r} a string for a name, got {shown(name)}"
        )
    return name


def _kind(layer: str, kinds: Kinds) -> str:
    """The kind of the kernel of a layer; raises ValueError for an unknown one."""
    if kinds is None:
        return "conv"
    kind = kinds.get(layer) if isinstance(kinds, Mapping) else kinds(layer)
    kind = "conv" if kind is None else kind
    if not isinstance(kind, str) or kind not in FLAX.kernels:
        raise ValueError(
            f"the kind of the kernel of {layer!r} must be one of {list(FLAX.kernels)}, "
            f"got {shown(kind)}"
        )
    return kind


def _within(start: str, layer: str) -> bool:
    """Whether `layer` is the layer at `start` or below it."""
    return start in ("", layer) or layer.startswith(f"{start}/")


def _check_collections(names: set[str]) -> None:
    """Raises ValueError unless these are the collections of a model's variables."""
    others = sorted(names - {"params", "batch_stats"})
    if others or not names:
        raise ValueError(
            'the variables of a model must be {"params": ...} with or without '
            f'"batch_stats", got {others or "nothing"}: pass what `init` or '
            "`jaxnorm.nnx.variables` returns, without other collections"
        )


def _check_functions(**arguments: Any) -> None:
    """Raises TypeError for what is neither a function, a mapping nor None."""
    for name, argument in arguments.items():
        if not isinstance(argument, Mapping) and argument is not None:
            check_function(name, argument)


def _check_paths(
    name: str,
    argument: Any,
    layers: Mapping[str, Any],
    matches: Callable[[str, str], bool],
) -> None:
    """Raises ValueError if the argument is a mapping with paths of no layer."""
    paths = argument if isinstance(argument, Mapping) else ()
    wrong = [path for path in paths if not any(matches(path, v) for v in layers)]
    if wrong:
        raise ValueError(
            f"`{name}` holds {wrong}, but the layers of the model are "
            f"{list(layers)}: give their paths, without the collection"
        )
