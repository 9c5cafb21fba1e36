"""Flax NNX: one generic module for any norm, and the classes that Flax has.

The named classes inherit their constructors and defaults from the Flax that is
installed, so that they follow it; what they compute is jaxnorm's.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from jax import Array
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm.base import as_flag
from jaxnorm.convert import features
from jaxnorm.dtypes import at_least_float32, promote
from jaxnorm.folding.fold import as_pairs
from jaxnorm.layers import Where, everywhere
from jaxnorm.modules import (
    has_spectrum,
    refuse,
    run,
    scale_shape,
    settings,
    spectral_normed,
    warn,
    weight_normed,
    weight_standardized,
)
from jaxnorm.running import HELD, MARKS

_NO_FLAG = (
    "{} needs use_running_average: pass it to the constructor or to the call, or set "
    "it on the whole model with model.train(), model.eval() or nnx.view"
)


class Norm(nnx.Module):
    """Applies `norm`, with its parameters as nnx.Param, its statistics as BatchStat.

    `model.train()` and `model.eval()` switch between the batch's statistics (which
    update the running ones) and the running ones; `use_running_average` at the call
    takes precedence and may be traced. Raises what the norm raises.

    Args:
        norm: the settings, such as `jaxnorm.BatchNorm(momentum=0.9)`.
        num_features: the number of features, or the shape of several feature axes.
        use_running_average: normalize by the running statistics, and keep them.
        dtype: of the result; by default that of input and parameters together.
        param_dtype: of the parameters.
        use_scale, use_bias: have that parameter, if the norm has it at all.
        scale_init, bias_init: initializers in place of the norm's own values.
        rngs: key for the initializers, needed only where these are given.
    """

    def __init__(
        self,
        norm: jaxnorm.Norm,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        use_bias: bool = True,
        scale_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        shape = (num_features,) if isinstance(num_features, int) else num_features
        inits = {"scale": scale_init, "bias": bias_init}
        absent = {"scale": not use_scale, "bias": not use_bias}
        self.norm = norm
        self.use_running_average = use_running_average
        self.dtype = dtype
        stats_dtype = jnp.float32 if dtype is None else at_least_float32(dtype)
        for k, v in norm.init_stats(shape, stats_dtype).items():
            setattr(self, k, nnx.BatchStat(v))
        for k, v in norm.init_params(shape, param_dtype).items():
            if absent.get(k):
                setattr(self, k, nnx.data(None))
                continue
            # A key for each parameter, used or not, as Flax draws them.
            key, init = None if rngs is None else rngs.params(), inits.get(k)
            if init is not None:
                if key is None:
                    raise ValueError(f"{k}_init needs a key: pass rngs=nnx.Rngs(seed)")
                v = init(key, v.shape, param_dtype)
            setattr(self, k, nnx.Param(v))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Returns `x` normalized; what `mask` excludes comes out as 0.

        `inputs` are what the norm's `inputs` name, such as the domain of each example.
        """
        flag = self.norm.has_stats and _merged_flag(self, use_running_average)
        return _apply(self, self.norm, x, flag, mask, refuse, inputs)

    def set_view(self, use_running_average: bool | None = None):
        """Sets the default of `use_running_average`; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchNorm(nnx.BatchNorm):
    """Flax's BatchNorm, with exact statistics, masks and synchronization.

    Beyond Flax's arguments, `momentum=None` keeps the average over all batches, and
    `unbiased=True` the unbiased variance, as PyTorch does. `use_fast_variance` is
    accepted and has no effect: there is one formula, exact and of one pass.
    `promote_dtype` decides the dtype of the result; neither the input nor the running
    statistics are rounded to it before they are used.
    """

    def __init__(self, *args, unbiased: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.unbiased = unbiased
        if self.momentum is None:
            count = settings(jaxnorm.BatchNorm, self).init_stats(self.mean.shape)
            self.count = nnx.BatchStat(count["count"])

    def __call__(self, x, use_running_average=None, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        flag = _merged_flag(self, use_running_average)
        return _apply(self, settings(jaxnorm.BatchNorm, self), x, flag, mask)


def _signature(cls: type, *own: str) -> inspect.Signature:
    """Flax's signature of the constructor of `cls`, with the arguments named `own`."""
    flax = inspect.signature(cls.__mro__[1].__init__)
    added = [inspect.signature(cls.__init__).parameters[name] for name in own]
    return flax.replace(parameters=[*flax.parameters.values(), *added])


BatchNorm.__init__.__signature__ = _signature(BatchNorm, "unbiased")  # pyright: ignore


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result.
    """

    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.LayerNorm, self), x, False, mask)


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm, with exact masks and synchronization.

    `use_fast_variance` is accepted and has no effect. `promote_dtype` decides the dtype
    of the result.
    """

    def __call__(self, x, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        return _apply(self, settings(jaxnorm.RMSNorm, self), x, False, mask)


class GroupNorm(nnx.GroupNorm):
    """Flax's GroupNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result.
    """

    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        # Flax keeps both the number of groups and their size; one says it all.
        norm = settings(jaxnorm.GroupNorm, self, group_size=None)
        return _apply(self, norm, x, False, mask)


class InstanceNorm(nnx.InstanceNorm):
    """Flax's InstanceNorm, with exact statistics, masks and synchronization.

    `use_fast_variance` is accepted and has no effect: there is one formula, exact.
    `promote_dtype` decides the dtype of the result.
    """

    def __call__(self, x, *, mask=None):
        """Returns `x` normalized; what `mask` excludes comes out as 0."""
        norm = settings(jaxnorm.InstanceNorm, self, axis=self.feature_axes)
        return _apply(self, norm, x, False, mask)


def _merged_flag(module: Any, at_call: bool | Array | None) -> bool | Array:
    return as_flag(
        first_from(
            at_call,
            module.use_running_average,
            error_msg=_NO_FLAG.format(type(module).__name__),
        )
    )


def _apply(
    module: Any,
    norm: jaxnorm.Norm,
    x: ArrayLike,
    flag: bool | Array,
    mask: ArrayLike | None,
    on_lone_values: Callable[[str], None] = warn,
    inputs: Mapping[str, Any] = MappingProxyType({}),
) -> Array:
    """Applies `norm` to `x` with the variables of `module`."""
    x = jnp.asarray(x)
    shape = norm.axes(x.shape).feature_shape
    marks = [k for k in MARKS if hasattr(module, k)]
    held = {k: getattr(module, k) for k in [*norm.init_stats(shape), *marks]}
    variables = {k: getattr(module, k, None) for k in norm.params}
    params = {k: v[...] for k, v in variables.items() if v is not None}
    stats = {k: v[...] for k, v in held.items()}
    y, stats = run(
        norm,
        x,
        params,
        stats,
        flag=flag,
        mask=mask,
        dtype=_dtype(module, x, stats, params),
        on_lone_values=on_lone_values,
        inputs=inputs,
    )
    if flag is not True and HELD not in held:
        for k, v in held.items():
            v[...] = stats[k]
    return y


def _dtype(module: Any, x: Array, stats: dict, params: dict) -> DTypeLike | None:
    """The dtype that Flax gives the result: `promote_dtype` decides, if there is one.

    It is asked for dtypes only. What it would return is rounded to `dtype`, running
    statistics included, and statistics of rounded inputs are wrong.
    """
    promote_dtype = getattr(module, "promote_dtype", None)
    if promote_dtype is None or module.dtype is not None:
        return module.dtype
    kept = [stats[k] for k in ("mean", "var") if k in stats]
    named = [params.get(k) for k in ("scale", "bias") if hasattr(module, k)]
    with jax.numpy_dtype_promotion("standard"):
        x, *rest = jax.eval_shape(
            lambda *arrays: promote_dtype(arrays, dtype=None), x, *kept, *named
        )
    affine = rest[len(kept) :]
    return promote(*(v.dtype for v in (x, *affine) if v is not None))


def variables(model: nnx.Module) -> dict[str, Any]:
    """The arrays of `model` as plain dicts: {"params": ..., "batch_stats": ...}.

    What the tools for trained models take, and what `update` writes back. The
    parameters are the nnx.Param, the statistics the nnx.BatchStat; paths are those of
    the model's attributes.

    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> print(list(jaxnorm.layers(jaxnorm.nnx.variables(model)["batch_stats"])))
    ['layers/1']
    """
    return {
        name: nnx.to_pure_dict(nnx.state(model, kind)) for name, kind in _KINDS.items()
    }


def update(model: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Writes `variables`, such as those of `jaxnorm.freeze`, into `model`.

    Args:
        model: the module, changed in place.
        variables: {"params", "batch_stats"}, or one of them, with an array for each
            variable of the model. The statistics may hold more, such as the marks of
            a frozen layer: they become nnx.BatchStat of their layer, and those that
            they lack are taken from it.

    Raises:
        ValueError: for paths that the model has not, arrays of other shapes, and marks
            of layers that are not jaxnorm's; the model is then as it was.

    >>> from flax import nnx
    >>> import jaxnorm, jaxnorm.nnx
    >>> model = nnx.Sequential(nnx.relu, jaxnorm.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    >>> stats = jaxnorm.nnx.variables(model)["batch_stats"]
    >>> jaxnorm.nnx.update(model, {"batch_stats": jaxnorm.freeze(stats)})
    """
    modules = dict(nnx.iter_modules(model))
    writes, additions = [], []
    for name, tree in variables.items():
        if name not in _KINDS:
            raise ValueError(f"a model has the variables {list(_KINDS)}, got {name!r}")
        new = nnx.traversals.flatten_mapping(tree)
        held = dict(nnx.to_flat_state(nnx.state(model, _KINDS[name])))
        for path, value in new.items():
            if path in held:
                _check_shape(name, path, value, held[path])
                writes.append((held[path], value))
            elif path[-1] in MARKS and path[:-1] in modules:
                _check_reads_marks(path[:-1], modules[path[:-1]])
                additions.append((modules[path[:-1]], path[-1], value))
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
        variable[...] = jnp.asarray(value, variable.dtype)
    for module, name, value in additions:
        if value is None:
            delattr(module, name)
        else:
            setattr(module, name, nnx.BatchStat(jnp.asarray(value)))


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
) -> nnx.Module:
    """Replaces norms of `model` by `Norm(norm)` with their variables (`convert`).

    Flax's own norms are replaced as well: `convert(model, jaxnorm.BatchNorm())` is a
    model of Flax's with jaxnorm's batch norm.

    Args:
        model: the module, changed in place.
        norm: the settings of the new norms.
        where: whether the norm at a path, such as "layers/1", is meant.
        use_scale, use_bias: whether the new norms have these, if `norm` does at all.

    Returns:
        The model; its replacement where it is a norm itself.

    Raises:
        ValueError: as `jaxnorm.convert` does; the model is then as it was.
    """
    norms = {
        _named(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _NORMS)
    }
    found = {path: module for path, module in norms.items() if where(path)}
    if not found:
        raise ValueError(
            f"`where` means none of the norms of the model, which are {list(norms)}: "
            "return True for the paths of some of them"
        )
    # All of them before the first is put in its place, as one may not fit.
    new = {
        id(module): _converted(path, module, norm, use_scale, use_bias)
        for path, module in found.items()
    }
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(nnx.iter_children(parent)):
            if id(child) in new:
                _put(parent, name, new[id(child)])
    return new.get(id(model), model)


def _converted(
    path: str, module: Any, norm: jaxnorm.Norm, use_scale: bool, use_bias: bool
) -> Norm:
    """A module for `norm` in the place of `module`, which is at `path`."""
    path = path or "."  # the model itself
    old = {name: {path: tree} for name, tree in variables(module).items()}
    new = jaxnorm.convert(old, norm, use_scale=use_scale, use_bias=use_bias)
    shape, param_dtype = features(path, old["params"][path], old["batch_stats"][path])
    made = Norm(
        norm,
        shape,
        use_running_average=getattr(module, "use_running_average", False),
        dtype=module.dtype,
        param_dtype=param_dtype,
        use_scale=use_scale,
        use_bias=use_bias,
    )
    update(made, {name: tree.get(path, {}) for name, tree in new.items()})
    return made


_NORMS = (
    Norm,
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)
_KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def _check_reads_marks(path: tuple, module: nnx.Module) -> None:
    if not isinstance(module, (Norm, BatchNorm)):
        raise ValueError(
            f"the layer at {_named(path)!r} is {type(module).__module__}."
            f"{type(module).__name__}, which does not read marks such as those of a "
            "frozen layer: leave it out with `where`, or replace it by jaxnorm's own "
            "with jaxnorm.nnx.convert(model, jaxnorm.BatchNorm())"
        )


def _check_shape(name: str, path: tuple, value: Any, held: nnx.Variable) -> None:
    if jnp.shape(value) != held.shape:
        raise ValueError(
            f"{name} at {_named(path)!r} are of shape {jnp.shape(value)}, but those of "
            f"the model are {held.shape}"
        )


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
        _put(_at(copy, paths[pair.norm][:-1]), paths[pair.norm][-1], Identity())
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


def _put(node: Any, name: Any, child: nnx.Module) -> None:
    """Puts `child` in `node`, under `name`."""
    (operator.setitem if isinstance(node, _CONTAINERS) else setattr)(node, name, child)


def _set_bias(path: str, layer: Any, bias: Array) -> None:
    """Gives `layer` the bias, unless it has one, which `update` writes to."""
    if not hasattr(layer, "bias"):
        raise ValueError(
            f"the layer at {path!r}, {type(layer).__name__}, has no attribute 'bias' "
            "to hold what is left of the norm: leave this pair out"
        )
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True


class WeightNorm(nnx.WeightNorm):
    """Flax's WeightNorm, which leaves the kernels of the layer as they are.

    Each scale is an nnx.Param in `scales`, under the path of its kernel, of
    `param_dtype`. (Flax 0.12.8 has float32 arrays there, which nothing trains.) What
    `variable_filter` selects among the nnx.Param of the layer is normalized.
    `promote_dtype` is accepted and has no effect, as in Flax.
    """

    def __init__(self, layer_instance, *, use_scale: bool = True, rngs, **kwargs):
        super().__init__(layer_instance, use_scale=False, rngs=rngs, **kwargs)
        self.use_scale = use_scale
        self.scales = _scales(self, rngs)

    def __call__(self, x, *args, **kwargs):
        """Returns what the layer makes of the arguments, its kernels normalized."""
        transform = functools.partial(_rescaled, self, weight_normed)
        return _call_layer(self, transform, x, *args, **kwargs)


WeightNorm.__init__.__signature__ = _signature(WeightNorm)  # pyright: ignore


class WeightStandardization(nnx.Module):
    """Calls a layer with its kernels standardized (`jaxnorm.weight_standardize`).

    The kernels are stored as they are. Each has a trainable gain, an nnx.Param in
    `scales`, as in WeightNorm, whose arguments these are.

    Args:
        layer_instance: the layer, or any module.
        feature_axes: those with a mean and a variance for each index; None gives each
            kernel one.
        use_scale: have a gain.
        scale_init: initializer of the gain.
        epsilon: added to the variance.
        dtype: of the kernels that the layer is called with; by default that of the
            stored ones and the gain together.
        param_dtype: of the gain.
        variable_filter: which nnx.Param of the layer to standardize. Those of one axis
            never are.
        scaled: divide by the square root of the fan-in, too (Brock et al., 2021).
        rngs: key for the initializer.
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: nnx.Initializer = nnx.initializers.ones,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: nnx.filterlib.Filter = nnx.PathContains("kernel"),  # noqa: B008
        scaled: bool = False,
        rngs: nnx.Rngs,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = nnx.filterlib.to_predicate(
            nnx.All(_has_fan_in, variable_filter)
        )
        self.scaled = scaled
        self.scales = _scales(self, rngs)

    def __call__(self, x, *args, **kwargs):
        """Returns what the layer makes of the arguments, its kernels standardized."""
        transform = functools.partial(_rescaled, self, weight_standardized)
        return _call_layer(self, transform, x, *args, **kwargs)


class SpectralNorm(nnx.SpectralNorm):
    """Flax's SpectralNorm, which leaves the kernels of the layer as they are.

    Once `u` has settled, no kernel has a norm above 1, however small it was (Flax makes
    40 of 1e-6, by its `epsilon`), and none of 0 sets `u` to 0 for ever.
    """

    def __call__(self, x, update_stats=None, **kwargs):
        """Returns what the layer makes of `x`, and of arguments that Flax's does not
        take, its kernels normalized.

        With `update_stats`, the estimates of the singular values are kept for the next
        call; by default it is true after `model.train()` and false after
        `model.eval()`.
        """
        if update_stats is None:
            update_stats = not self.use_running_average

        def transform(path, param):
            kernel = param.get_value()
            if not has_spectrum(self, kernel):
                return None
            u, sigma = (
                _of_kernel(self.batch_stats, (*path, name)) for name in ("u", "sigma")
            )
            kernel, new_u, new_sigma = spectral_normed(self, kernel, u[...], sigma[...])
            if update_stats:
                u[...], sigma[...] = new_u, new_sigma
            return kernel

        return _call_layer(self, transform, x, **kwargs)

    def set_view(self, use_running_average: bool | None = None):
        """Sets the default of `not update_stats`; called by `nnx.view`."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _call_layer(
    module: Any,
    transform: Callable[[tuple, nnx.Param], Array | None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the layer of `module` with other values for its parameters.

    `transform` gives the value, or None for what stays, by path and parameter. The
    layer called is one beside the stored one: it shares all variables but those given
    a value, so that statistics, caches and random keys are updated as ever, and nothing
    that is stored is written to. So it also works where writing is not allowed, such
    as in a gradient by the input, taken by jax.grad of a closure.
    """
    graphdef, state = nnx.split(module.layer_instance)
    called = []
    for path, v in nnx.to_flat_state(state):
        value = transform(path, v) if isinstance(v, nnx.Param) else None
        called.append((path, v if value is None else v.replace(value)))
    layer = nnx.merge(graphdef, nnx.from_flat_state(called))
    return layer(*args, **kwargs)


def _has_fan_in(path: tuple, param: nnx.Param) -> bool:
    return param.ndim >= 2


def _rescaled(
    module: Any,
    function: Callable[[Any, Array, Array | None], Array],
    path: tuple,
    param: nnx.Param,
) -> Array | None:
    """`function` of the kernel and its scale, if `module` normalizes it."""
    if not module.variable_filter(path, param):
        return None
    scale = _of_kernel(module.scales, path)[...] if module.use_scale else None
    return function(module, param.get_value(), scale)


def _scales(module: Any, rngs: nnx.Rngs) -> Any:
    """A scale for each kernel that `module` normalizes, by path, or None."""
    if not module.use_scale:
        return None
    return nnx.data(
        {
            path: nnx.Param(
                module.scale_init(
                    rngs.params(), scale_shape(module, v), module.param_dtype
                )
            )
            for path, v in nnx.to_flat_state(
                nnx.state(module.layer_instance, nnx.Param)
            )
            if module.variable_filter(path, v)
        }
    )


def _of_kernel(variables: Mapping[tuple, nnx.Variable], path: tuple) -> nnx.Variable:
    if path not in variables:
        raise ValueError(
            f"nothing is kept for the parameter {'/'.join(map(str, path))} of the "
            f"layer, but for {list(variables)}: add and rename parameters before the "
            "layer is wrapped"
        )
    return variables[path]
