"""What are the variables of an NNX model as plain trees, and how are they set?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxnorm import models
from jaxnorm._arguments import as_array, check_function
from jaxnorm._marks import MARKS
from jaxnorm.models._paths import Where, check_tree, copied, everywhere
from jaxnorm.nnx._graph import KINDS, check_model, class_of, path_of
from jaxnorm.nnx._norm import Norm
from jaxnorm.nnx._norms import BatchNorm

Path = tuple[Any, ...]  # the keys that lead to a module or variable


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
    check_model(model)
    return {
        name: copied(nnx.to_pure_dict(nnx.state(model, kind)))
        for name, kind in KINDS.items()
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
    check_model(model)
    check_tree(variables, "variables")
    modules = _by_names(nnx.iter_modules(model))
    writes, additions = [], []
    for name, tree in variables.items():
        if name not in KINDS:
            raise ValueError(f"a model has the variables {list(KINDS)}, got {name!r}")
        check_tree(tree, name)
        old = _by_names(nnx.to_flat_state(nnx.state(model, KINDS[name])))
        new = _by_names(nnx.traversals.flatten_mapping(tree).items())
        for path, value in new.items():
            if path in old:
                writes.append((old[path], _fitting(name, path, value, old[path])))
            elif path[-1] in MARKS and path[:-1] in modules:
                module = modules[path[:-1]]
                _check_reads_marks(path[:-1], module)
                like = "var" if hasattr(module, "var") else "mean"
                array = _of_shape(name, path, value, getattr(module, like))
                additions.append((module, path[-1], jnp.array(array)))
            else:
                raise ValueError(f"the model has no {name} at {path_of(path)!r}")
        for path in old:
            if path not in new and path[-1] not in MARKS:
                raise ValueError(
                    f"{name} lacks {path_of(path)!r}, which the model has: start from "
                    "variables(model)"
                )
        removals = [p for p in old if p not in new]
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

    The layers that `where` selects train while `call` runs; all else, such as dropout,
    stays in the mode that the model is in.

    Args:
        model: the module, whose statistics are changed in place, at the end.
        batches: any iterable of anything `call` takes.
        call: `call(model, batch)` runs the model on a batch.
        where: whether to take the layer at a path; others keep their statistics.
        options: as in `jaxnorm.models.recalibrate`, which says what is raised.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(jaxnorm.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.relu)
    >>> jaxnorm.nnx.recalibrate(model, [jnp.array([[1.0], [2.0], [3.0]])])
    >>> print(model.layers[0].mean[...])
    [2.]
    """
    check_model(model)
    check_function("call", call)
    graphdef, state = nnx.split(model)

    def apply(arrays: Mapping[str, Any], batch: Any) -> Any:
        twin = nnx.merge(graphdef, arrays["state"])
        update(twin, {name: arrays[name] for name in KINDS})
        for path, module in nnx.iter_modules(twin):
            if isinstance(module, (Norm, BatchNorm)) and where(path_of(path)):
                module.use_running_average = False
        call(twin, batch)
        return variables(twin)["batch_stats"]

    arrays = variables(model) | {"state": state}
    stats = models.recalibrate(apply, arrays, batches, where=where, **options)
    update(model, {"batch_stats": stats})


def _by_names(items: Iterable[tuple[Path, Any]]) -> dict[tuple[str, ...], Any]:
    """`items` by their paths, whose parts are strings as in checkpoints."""
    return {tuple(map(str, path)): value for path, value in items}


def _check_reads_marks(path: Path, module: nnx.Module) -> None:
    """Raises ValueError unless `module` is a norm of jaxnorm with statistics."""
    if not isinstance(module, (Norm, BatchNorm)):
        raise ValueError(
            f"the layer at {path_of(path)!r} is {class_of(module)}, which does not "
            "read marks such as those of a frozen layer: leave it out with `where`, or "
            "take the model that jaxnorm.nnx.convert(model, jaxnorm.BatchNorm()) "
            "returns, with jaxnorm's own"
        )


def _of_shape(name: str, path: Path, value: Any, variable: Any) -> Array:
    """`value` as an array; raises ValueError unless `variable` is of its shape."""
    array = as_array(f"{name} at {path_of(path)!r}", value)
    if array.shape != variable.shape:
        raise ValueError(
            f"{name} at {path_of(path)!r} are of shape {array.shape}, but those of the "
            f"model are {variable.shape}"
        )
    return array


def _fitting(name: str, path: Path, value: Any, variable: Any) -> Array:
    """A copy of `value` to write into `variable`."""
    array, dtype = _of_shape(name, path, value, variable), variable.dtype
    if jnp.iscomplexobj(array) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} at {path_of(path)!r} are complex, but those of the model are "
            f"{dtype}"
        )
    return jnp.array(array, dtype)
