"""A whole NNX model: its variables as plain trees, and what is done with them."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm.activation import followed, without_masked
from jaxnorm.convert import check_norm, converted
from jaxnorm.dtypes import promote
from jaxnorm.folding.fold import Pair, as_pairs
from jaxnorm.layers import Where, check_tree, everywhere, meant
from jaxnorm.leaves import as_array, copied
from jaxnorm.moments import as_mask
from jaxnorm.nnx.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Norm
from jaxnorm.nnx.norms import RMSNorm
from jaxnorm.running import MARKS


def variables(model: nnx.Module) -> dict[str, Any]:
    """Copies of the arrays of `model`: {"params": ..., "batch_stats": ...}.

    Plain dicts, as the tools for trained models take them, and what `update` writes
    back. The parameters are the nnx.Param, the statistics the nnx.BatchStat; paths are
    those of the model's attributes. Raises TypeError for what is no model.

    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> print(list(jaxnorm.layers(jaxnorm.nnx.variables(model)["batch_stats"])))
    ['layers/1']
    """
    _check_model(model)
    return {
        name: copied(nnx.to_pure_dict(nnx.state(model, kind)))
        for name, kind in _KINDS.items()
    }


def update(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Writes copies of `variables`, such as those of `jaxnorm.freeze`, into `model`.

    Args:
        model: the module, changed in place.
        variables: {"params", "batch_stats"}, or one of them, with an array for each
            variable of the model. The statistics may hold more, such as the marks of
            a frozen layer: they become nnx.BatchStat of their layer, and those that
            they lack are taken from it.

    Raises:
        ValueError, TypeError: for paths that the model has not, values that are no
            arrays or of other shapes, and marks of layers that are not jaxnorm's; the
            model is then as it was.

    >>> from flax import nnx
    >>> import jaxnorm, jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> stats = jaxnorm.nnx.variables(model)["batch_stats"]
    >>> jaxnorm.nnx.update(model, {"batch_stats": jaxnorm.freeze(stats)})
    """
    _check_model(model)
    check_tree(variables, "variables")
    modules = _by_names(nnx.iter_modules(model))
    writes, additions = [], []
    for name, tree in variables.items():
        if name not in _KINDS:
            raise ValueError(f"a model has the variables {list(_KINDS)}, got {name!r}")
        check_tree(tree, name)
        held = _by_names(nnx.to_flat_state(nnx.state(model, _KINDS[name])))
        new = _by_names(nnx.traversals.flatten_mapping(tree).items())
        for path, value in new.items():
            if path in held:
                writes.append((held[path], _fitting(name, path, value, held[path])))
            elif path[-1] in MARKS and path[:-1] in modules:
                module = modules[path[:-1]]
                _check_reads_marks(path[:-1], module)
                like = "var" if hasattr(module, "var") else "mean"
                array = _of_shape(name, path, value, getattr(module, like))
                additions.append((module, path[-1], jnp.array(array)))
            else:
                raise ValueError(f"the model has no {name} at {_named(path)!r}")
        for path in held:
            if path not in new and path[-1] not in MARKS:
                raise ValueError(
                    f"{name} lacks {_named(path)!r}, which the model has: start from "
                    "variables(model)"
                )
        removals = [p for p in held if p not in new]
        additions += [(modules[p[:-1]], p[-1], None) for p in removals]
    for variable, value in writes:
        variable[...] = value
    for module, name, value in additions:
        if value is None:
            delattr(module, name)
        else:
            setattr(module, name, nnx.BatchStat(value))


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    *,
    where: Where = everywhere,
    **options: Any,
) -> None:
    """Sets running statistics to the moments of a whole data set (`recalibrate`).

    The layers that `where` means train while `call` runs; all else, such as dropout,
    stays in the mode that the model is in.

    Args:
        model: the module, whose statistics are changed in place, at the end.
        batches: any iterable of anything `call` takes.
        call: `call(model, batch)` runs the model on a batch.
        where: whether the layer at a path is meant; others keep their statistics.
        options: as in `jaxnorm.recalibrate`, which says what is raised.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.relu)
    >>> jaxnorm.nnx.recalibrate(model, [jnp.array([[1.0], [2.0], [3.0]])])
    >>> print(model.layers[0].mean[...])
    [2.]
    """
    graphdef, state = nnx.split(model)

    def apply(arrays: Mapping[str, Any], batch: Any) -> Any:
        twin = nnx.merge(graphdef, arrays["state"])
        update(twin, {name: arrays[name] for name in _KINDS})
        for path, module in nnx.iter_modules(twin):
            if isinstance(module, (Norm, BatchNorm)) and where(_named(path)):
                module.use_running_average = False
        call(twin, batch)
        return variables(twin)["batch_stats"]

    arrays = variables(model) | {"state": state}
    stats = jaxnorm.recalibrate(apply, arrays, batches, where=where, **options)
    update(model, {"batch_stats": stats})


def convert(
    model: nnx.Module,
    norm: jaxnorm.Norm,
    where: Where = everywhere,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Any:
    """A copy of `model` with `Norm(norm)` for norms, and their variables (`convert`).

    Flax's own norms are replaced as well: `convert(model, jaxnorm.BatchNorm())` is a
    model of Flax's with jaxnorm's batch norm. What a norm does beyond its settings
    stays: its dtypes, the metadata of its variables, such as their sharding, and an
    activation that `norm` leaves open. What uses the model, such as an optimizer, has
    to be made for the copy.

    Args:
        model: the module, which stays as it is.
        norm: the settings of the new norms: all of them, such as epsilon and axis.
        where: whether the norm at a path, such as "layers/1", is meant. One that is
            held in several places has one path.
        use_scale, use_bias: whether the new norms have these, if `norm` does at all.

    Returns:
        The copy, in buffers of its own; a `Norm` where the model is a norm itself.

    Raises:
        ValueError, TypeError: as `jaxnorm.convert` does, for an activation that `norm`
            cannot have, and for classes of norms that compute something of their own.

    >>> from flax import nnx
    >>> import jaxnorm, jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> new = jaxnorm.nnx.convert(model, jaxnorm.GroupNorm(num_groups=2))
    >>> print(type(new.layers[1].norm).__name__, type(model.layers[1]).__name__)
    GroupNorm BatchNorm
    """
    _check_model(model)
    check_norm(norm, use_scale, use_bias)
    new = _copy(model)
    norms = {
        _named(path): module
        for path, module in nnx.iter_modules(new)
        if isinstance(module, _NORMS)
    }
    for path, module in meant(norms, where, "norms of the model").items():
        _become(module, _converted(path, module, norm, use_scale, use_bias))
    return new


def _converted(
    path: str, module: Any, norm: jaxnorm.Norm, use_scale: bool, use_bias: bool
) -> Norm:
    """A module for `norm` in the place of `module`, which is at `path`."""
    path = path or "."  # the model itself
    norm = _with_activation(path, module, norm)
    held = _norm_variables(module)
    size = getattr(module, "num_features", None)
    new = converted(
        path,
        norm,
        *({k: v[...] for k, v in tree.items()} for tree in held.values()),
        use_scale=use_scale,
        use_bias=use_bias,
        shape=None if size is None else (size,),
    )
_NORMS = (
    Norm,
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def _by_names(items: Iterable[tuple[tuple, Any]]) -> dict[tuple[str, ...], Any]:
    """`items` by their paths in strings, as those of checkpoints are."""
    return {tuple(map(str, path)): value for path, value in items}


def _check_reads_marks(path: tuple, module: nnx.Module) -> None:
    if not isinstance(module, (Norm, BatchNorm)):
        raise ValueError(
            f"the layer at {_named(path)!r} is {type(module).__module__}."
            f"{type(module).__name__}, which does not read marks such as those of a "
            "frozen layer: leave it out with `where`, or replace it by jaxnorm's own "
            "with jaxnorm.nnx.convert(model, jaxnorm.BatchNorm())"
        )


def _of_shape(name: str, path: tuple, value: Any, held: nnx.Variable) -> Array:
    """`value` as an array; raises unless it is of the shape of `held`."""
    array = as_array(value, f"{name} at {_named(path)!r}")
    if array.shape != held.shape:
        raise ValueError(
            f"{name} at {_named(path)!r} are of shape {array.shape}, but those of the "
            f"model are {held.shape}"
        )
    return array


def _fitting(name: str, path: tuple, value: Any, held: nnx.Variable) -> Array:
    """A copy of `value` to write into `held`."""
    array = _of_shape(name, path, value, held)
    if jnp.iscomplexobj(array) and not jnp.issubdtype(held.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} at {_named(path)!r} are complex, but those of the model are "
            f"{held.dtype}"
        )
    return jnp.array(array, held.dtype)


def _named(path: tuple) -> str:
    return "/".join(map(str, path))


class Identity(nnx.Module):
    """Returns its input, where there was a norm before `fold`."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Returns `x`; other arguments count for nothing."""
        return x


def fold(
    model: nnx.Module,
    *args: Any,
    pairs: Mapping[str, str] | Iterable[Sequence[Any]] | None = None,
    epsilon: float | None = None,
) -> Any:
    """A copy of `model` for inference, with norms folded into the layers beside them.

    An `Identity` is in the place of each of these norms, and the layers have a bias.

    Args:
        model: the module, which stays as it is.
        args: what it is called with, or `jax.ShapeDtypeStruct`s; for `find_pairs`.
        pairs: as in `jaxnorm.fold`; by default those that `jaxnorm.find_pairs` finds.
        epsilon: as in `jaxnorm.fold`.

    Raises:
        ValueError: as `jaxnorm.fold` does, also where there are no pairs, and for a
            layer that has no attribute "bias".

    >>> import jax, jaxnorm.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs),
    ...                        jaxnorm.nnx.BatchNorm(3, rngs=rngs), nnx.relu)
    >>> folded = jaxnorm.nnx.fold(model, jax.ShapeDtypeStruct((1, 2), float))
    >>> print(type(folded.layers[1]).__name__, folded.layers[0].bias.shape)
    Identity (3,)
    """
    copy = nnx.clone(model)
    copy.eval()
    held = variables(copy)
    if pairs is None:
        pairs = jaxnorm.find_pairs(_functional(copy), held, *args)
    pairs = as_pairs(pairs)
    folded = jaxnorm.fold(held, pairs, epsilon=epsilon)
    flat = [nnx.traversals.flatten_mapping(tree) for tree in held.values()]
    paths = {_named(path[:-1]): path[:-1] for tree in flat for path in tree}
    for pair in pairs:
        path = paths[pair.layer]
        new = functools.reduce(operator.getitem, path, folded["params"])["bias"]
        _set_bias(pair.layer, _at(copy, path), new)
    gone = {id(_at(copy, paths[pair.norm])): Identity() for pair in pairs}
    copy = _replaced(copy, gone)
    update(copy, folded)
    return copy


def _functional(model: nnx.Module) -> Callable[..., Any]:
    """`apply(variables, *args)`: what `model` makes of `args` with these variables."""
    graph, state = nnx.split(model)

    def apply(variables, *args):
        flat = {k: nnx.traversals.flatten_mapping(variables[k]) for k in _KINDS}
        new = {path: value for tree in flat.values() for path, value in tree.items()}
        called = [
            (path, v.replace(new[path]) if path in new else v)
            for path, v in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(called))(*args)

    return apply


_CONTAINERS = (list, dict, nnx.List, nnx.Dict)


def _at(node: Any, path: Iterable[Any]) -> Any:
    """What `node` holds at `path`."""
    for name in path:
        node = node[name] if isinstance(node, _CONTAINERS) else getattr(node, name)
    return node


def _replaced(node: Any, new: dict[int, Any]) -> Any:
    """`node` with the modules whose id is in `new` replaced, wherever they are.

    In place, but for tuples. `new` comes to hold all that has been seen.
    """
    if id(node) in new:
        return new[id(node)]
    if isinstance(node, tuple):
        return type(node)(_replaced(v, new) for v in node)
    if not isinstance(node, (nnx.Module, list, dict)):
        return node
    new[id(node)] = node  # before what it holds, which may hold it
    for name, child in _held(node):
        after = _replaced(child, new)
        if after is child:
            continue
        if isinstance(node, _CONTAINERS):
            node[name] = after
        else:
            setattr(node, name, nnx.data(after) if type(after) is tuple else after)
    return node


def _held(node: Any) -> list[tuple[Any, Any]]:
    """What a module or container holds, by names or numbers."""
    if isinstance(node, (list, nnx.List)):
        return list(enumerate(node))
    return list((node if isinstance(node, dict) else vars(node)).items())


def _set_bias(path: str, layer: Any, bias: Array) -> None:
    """Gives `layer` the bias, unless it has one, which `update` writes to."""
    if not hasattr(layer, "bias"):
        raise ValueError(
            f"the layer at {path!r}, {type(layer).__name__}, has no attribute 'bias' "
            "to hold what is left of the norm: leave this pair out"
        )
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True
