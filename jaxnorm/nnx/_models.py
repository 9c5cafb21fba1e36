"""A whole NNX model: its variables as plain trees, and what is done with them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm._activation import add_and_activate, without_masked
from jaxnorm._arguments import as_array, check_function, shown
from jaxnorm._dtypes import promote
from jaxnorm._marks import MARKS
from jaxnorm._working import as_mask
from jaxnorm.models._convert import check_norm, converted, features
from jaxnorm.models._folding.fold import Pair, as_pairs
from jaxnorm.models._paths import Where, check_tree, copied, everywhere, select
from jaxnorm.nnx._layer_norms import LayerNorm, RMSNorm
from jaxnorm.nnx._norm import Norm
from jaxnorm.nnx._norms import BatchNorm, GroupNorm, InstanceNorm


def variables(model: nnx.Module) -> dict[str, Any]:
    """Copies of the arrays of `model`: {"params": ..., "batch_stats": ...}.

    Plain dicts, as the tools for trained models take them, and what `update` writes
    back. The parameters are the nnx.Param, the statistics the nnx.BatchStat; paths are
    those of the model's attributes. Raises TypeError for what is no model.

    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> print(list(jaxnorm.models.layers(jaxnorm.nnx.variables(model)["batch_stats"])))
    ['layers/1']
    """
    _check_model(model)
    return {
        name: copied(nnx.to_pure_dict(nnx.state(model, kind)))
        for name, kind in _KINDS.items()
    }


def update(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Writes copies of `variables`, as of `jaxnorm.models.freeze`, into `model`.

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
    >>> jaxnorm.nnx.update(model, {"batch_stats": jaxnorm.models.freeze(stats)})
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
        options: as in `jaxnorm.models.recalibrate`, which says what is raised.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.relu)
    >>> jaxnorm.nnx.recalibrate(model, [jnp.array([[1.0], [2.0], [3.0]])])
    >>> print(model.layers[0].mean[...])
    [2.]
    """
    _check_model(model)
    check_function("call", call)
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
    stats = jaxnorm.models.recalibrate(apply, arrays, batches, where=where, **options)
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
        ValueError, TypeError: as `jaxnorm.models.convert` does, for an activation that
            `norm` cannot have, and for classes of norms that compute something of their
            own.

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
    for path, module in select(norms, where, "norms of the model").items():
        _become(module, _converted(path, module, norm, use_scale, use_bias))
    return new


def _converted(
    path: str, module: Any, norm: jaxnorm.Norm, use_scale: bool, use_bias: bool
) -> Norm:
    """A module for `norm` in the place of `module`, which is at `path`."""
    path = path or "."  # the model itself
    norm = _with_activation(path, module, norm)
    held = {
        kind: {k: v for k, v in vars(module).items() if isinstance(v, kind)}
        for kind in _KINDS.values()
    }
    params, stats = (
        {k: v.get_value() for k, v in own.items()} for own in held.values()
    )
    size = getattr(module, "num_features", None)
    shape = (size,) if isinstance(size, int) else features(path, params, stats)
    used: dict[str, Any] = {"use_scale": use_scale, "use_bias": use_bias}
    flag = getattr(module, "use_running_average", False)
    made: Any = Norm(norm, shape, use_running_average=flag, dtype=module.dtype, **used)
    if hasattr(module, "promote_dtype"):
        made.promote_dtype = module.promote_dtype
    new = converted(path, norm, params, stats, shape, **used)
    for (kind, own), values in zip(held.items(), new, strict=True):
        for k, v in values.items():
            setattr(made, k, _with_metadata(own[k], v) if k in own else kind(copied(v)))
    return made


def _with_activation(path: str, module: Any, norm: jaxnorm.Norm) -> jaxnorm.Norm:
    """`norm` with the activation of `module`, unless it has one of its own."""
    if type(module).__call__ not in {kind.__call__ for kind in _KNOWN}:
        raise ValueError(
            f"the norm at {path!r} is {_class_of(module)}, which computes something "
            "of its own that would be lost: leave it out with `where`"
        )
    own = _activation(module)
    if own is None or getattr(norm, "activation", None) is not None:
        return norm
    if not hasattr(norm, "activation"):
        raise ValueError(
            f"the norm at {path!r} applies activation={own!r}, and "
            f"{type(norm).__name__} has none: call it after the norm in the model, or "
            "leave this norm out with `where`"
        )
    return dataclasses.replace(norm, activation=own)


def _activation(module: Any) -> str | None:
    settings = module.norm if isinstance(module, Norm) else module
    return getattr(settings, "activation", None)


def _class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _with_metadata(variable: Any, value: Array) -> Any:
    """`variable`, or one of `value` with its metadata, where that has more axes.

    The first ones are new, and not partitioned.
    """
    axes = value.ndim - variable.ndim
    if not axes:
        return variable
    new = variable.replace(value)
    for _ in range(axes):
        nnx.spmd.add_axis(new, 0, {nnx.PARTITION_NAME: None})
    return new


def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be a flax.nnx.Module, got {shown(model)}: the tools of "
            "jaxnorm itself take the variables of Linen models, such as "
            "jaxnorm.models.fold(variables, pairs)"
        )


def _copy(model: Any) -> Any:
    """`model` in modules and buffers of its own."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, copied(state))


def _become(module: Any, new: Any) -> None:
    """Makes `module` be `new` for all that hold it, in attributes or containers."""
    object.__setattr__(module, "__class__", type(new))
    vars(module).clear()
    vars(module).update(vars(new))


_FLAX_NORMS = (
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)
_NORMS = (Norm, *_FLAX_NORMS)
_KNOWN = (*_NORMS, BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm)
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def _by_names(items: Iterable[tuple[tuple, Any]]) -> dict[tuple[str, ...], Any]:
    """`items` by their paths in strings, as those of checkpoints are."""
    return {tuple(map(str, path)): value for path, value in items}


def _check_reads_marks(path: tuple, module: nnx.Module) -> None:
    if not isinstance(module, (Norm, BatchNorm)):
        raise ValueError(
            f"the layer at {_named(path)!r} is {_class_of(module)}, which does not "
            "read marks such as those of a frozen layer: leave it out with `where`, or "
            "take the model that jaxnorm.nnx.convert(model, jaxnorm.BatchNorm()) "
            "returns, with jaxnorm's own"
        )


def _of_shape(name: str, path: tuple, value: Any, held: nnx.Variable) -> Array:
    """`value` as an array; raises unless it is of the shape of `held`."""
    array = as_array(f"{name} at {_named(path)!r}", value)
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
    """The identity, where there was a norm before `fold`, and what follows the norm.

        activation(x + residual)

    Args:
        path: where it is in the model.
        activation: that of the norm, such as "relu"; None is none.
        dtype: of the result; by default that of `x` and `dtypes` together.
        dtypes: of the parameters that were.
        before: whether the layer it is folded into takes its result, and does not give
            its input.
    """

    def __init__(
        self,
        path: str,
        *,
        activation: str | None = None,
        dtype: DTypeLike | None = None,
        dtypes: Sequence[DTypeLike] = (),
        before: bool = False,
    ):
        self.path = path
        self.activation = activation
        self.dtype = dtype
        self.dtypes = tuple(dtypes)
        self.before = before

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Adds the residual and activates as after the norm; 0 where `mask` is false.

        Other inputs of the norm count for nothing. Raises ValueError for the statistics
        of a batch, and for what cannot come between a norm and the layer after it.
        """
        known = not isinstance(use_running_average, Tracer | None)
        if known and not use_running_average:
            raise ValueError(
                f"the norm at {self.path!r} is folded, and normalizes by no batch: "
                "call it with use_running_average=True, or train the model that was "
                "folded"
            )
        if self.before and (mask is not None or residual is not None):
            raise ValueError(
                f"the norm at {self.path!r} is folded into the layer after it, and its "
                "mask or residual would come between: leave this pair out"
            )
        x = jnp.asarray(x)
        dtype = promote(x.dtype, *self.dtypes) if self.dtype is None else self.dtype
        mask = as_mask(mask, x.shape)
        return add_and_activate(
            without_masked(x.astype(dtype), mask), self.activation, residual, mask
        )


def fold(
    model: nnx.Module,
    *args: Any,
    pairs: Mapping[str, str] | Iterable[Sequence[Any]] | None = None,
    epsilon: float | None = None,
    **kwargs: Any,
) -> Any:
    """A copy of `model` for inference, with norms folded into the layers beside them.

    An `Identity` is in the place of each of these norms, which does what follows the
    norm in its call, `activation(x + residual)`, and the layers have a bias.

    Args:
        model: the module, which stays as it is.
        args, kwargs: what it is called with, or `jax.ShapeDtypeStruct`s; for
            `find_pairs`.
        pairs: as in `jaxnorm.models.fold`, and taken as they are; by default those that
            `jaxnorm.models.find_pairs` finds.
        epsilon: as in `jaxnorm.models.fold`.

    Returns:
        The copy, in buffers of its own.

    Raises:
        ValueError, TypeError: as `jaxnorm.models.fold` does, also where there are no
            pairs, for a layer that has no attribute "bias", or does not add it, and for
            norms that compute something of their own.

    >>> import jax, jax.numpy as jnp, jaxnorm.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs),
    ...                        jaxnorm.nnx.BatchNorm(3, rngs=rngs), nnx.relu)
    >>> x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    >>> folded = jaxnorm.nnx.fold(model, x)
    >>> print(type(folded.layers[1]).__name__, folded.layers[0].bias.shape)
    Identity (3,)
    """
    _check_model(model)
    copy = _copy(model)
    copy.eval()
    held = variables(copy)

    def found() -> list[Pair]:
        return jaxnorm.models.find_pairs(
            _functional(copy), variables(copy), *args, **kwargs
        )

    chosen = found() if pairs is None else as_pairs(pairs)
    folded = jaxnorm.models.fold(held, chosen, epsilon=epsilon)
    modules = {_named(path): module for path, module in nnx.iter_modules(copy)}
    for path in (path for pair in chosen for path in pair[:2] if path not in modules):
        raise ValueError(
            f"the variables at {path!r} are not those of a module, so that nothing can "
            "take its place: leave this pair out, with pairs= of the others"
        )
    left = {pair: _left(pair, modules[pair.norm]) for pair in chosen}
    flat = {_named(path): v for path, v in _flat(folded["params"]).items()}
    for pair in chosen:
        _set_bias(pair.layer, modules[pair.layer], flat[f"{pair.layer}/bias"])
    for pair in {*chosen} - {*found()} if pairs is None else ():
        raise ValueError(
            f"the layer at {pair.layer!r}, {_class_of(modules[pair.layer])}, does not "
            "add its attribute 'bias' to its result, which is to hold what is left of "
            "the norm: leave this pair out"
        )
    for pair in chosen:
        _become(modules[pair.norm], left[pair])
    update(copy, folded)
    return copy


def _left(pair: Pair, norm: Any) -> Identity:
    """What is left of the `norm` of `pair`."""
    ours = type(norm).__call__ in {
        kind.__call__ for kind in (Norm, BatchNorm, nnx.BatchNorm)
    }
    if ours and isinstance(norm, Norm):
        ours = cast(Any, norm.norm).evaluate.__module__.startswith("jaxnorm.")
    if not ours:
        raise ValueError(
            f"the norm at {pair.norm!r}, {_class_of(norm)}, computes something of its "
            "own, which might be lost: leave this pair out, with pairs= of the others"
        )
    activation = _activation(norm)
    if pair.norm_first and activation is not None:
        raise ValueError(
            f"the norm at {pair.norm!r} applies activation={activation!r} before the "
            f"layer at {pair.layer!r}, so that it cannot be folded into it: leave this "
            "pair out"
        )
    kept = ["scale", "bias", *(["mean", "var"] * hasattr(norm, "promote_dtype"))]
    held = [getattr(norm, k, None) for k in kept]
    dtypes = [v.dtype for v in held if v is not None]
    return Identity(
        pair.norm,
        activation=activation,
        dtype=norm.dtype,
        dtypes=dtypes,
        before=pair.norm_first,
    )


def _flat(tree: Any) -> dict[tuple, Any]:
    return nnx.traversals.flatten_mapping(tree)


def _functional(model: nnx.Module) -> Callable[..., Any]:
    """`apply(variables, ...)`: what `model` makes of arguments with these variables."""
    graph, state = nnx.split(model)

    def apply(variables, *args, **kwargs):
        flat = {k: _flat(variables[k]) for k in _KINDS}
        new = {path: value for tree in flat.values() for path, value in tree.items()}
        called = [
            (path, v.replace(new[path]) if path in new else v)
            for path, v in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(called))(*args, **kwargs)

    return apply


def _set_bias(path: str, layer: Any, bias: Array) -> None:
    """Gives `layer` the bias, unless it has one, which `update` writes to."""
    if not hasattr(layer, "bias"):
        raise ValueError(
            f"the layer at {path!r}, {type(layer).__name__}, has no attribute 'bias' "
            "to hold what is left of the norm: leave this pair out"
        )
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True
