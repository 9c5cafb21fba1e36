"""Which kernels and biases standardize what a model's layers make of a batch?"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm._arguments import array_or_none, as_array, as_bool, check_function, shown
from jaxnorm._base import Norm
from jaxnorm._methods.batch_norm import BatchNorm
from jaxnorm._working import as_mask
from jaxnorm.models._leaves import array_of, boxed_like, is_box
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_variables,
    copied,
    everywhere,
    join_path,
    path_name,
    select,
)

SEEN = "init_from_batch"  # the collection of what was seen, of each layer
Found = Mapping[str, Array]  # mean and variance of each output, by the layer's path
# A kernel that is rounded to half precision moves a deviation by less than this.
TOLERANCE = 0.1


class How(NamedTuple):
    """How outputs are standardized: the options of `init_from_batch`, checked."""

    where: Where
    norm: BatchNorm  # over the batch
    center: bool
    mask: Array | None

    def standardized(
        self, path: str, y: Any, has_bias: bool, own_mask: ArrayLike | None
    ) -> tuple[Array, Array]:
        """The output of a layer, as it will be, and the moments that it has now.

        `own_mask` is that of the call. A feature of no usable variance stays.
        """
        y = as_array(f"the output of the layer {path!r}", y)
        mask = self._mask(path, y.shape) if own_mask is None else own_mask
        m = self.norm.batch_moments(y, mask)
        if not (self.center and has_bias):
            m = m._replace(mean=jnp.zeros_like(m.mean), residue=0.0)
        mean, var = usable(m.mean, m.var)
        by = m._replace(mean=mean, var=var, residue=jnp.where(mean == 0, 0, m.residue))
        standard = self.norm.normalize_by(y, {}, by, mask=own_mask, dtype=y.dtype)
        return standard, jnp.stack([v.reshape(-1) for v in (m.mean, m.var)])

    def _mask(self, path: str, shape: tuple[int, ...]) -> Array | None:
        """The mask for an output of `shape`, whose leading axes it is of."""
        mask = self.mask
        if mask is None:
            return None
        if mask.shape != shape[: mask.ndim]:
            raise ValueError(
                f"mask has shape {mask.shape}, which must be the leading axes of every "
                f"output, but that of the layer {path!r} has shape {shape}: leave the "
                "layer out with `where`, or mask whole examples"
            )
        return as_mask(
            mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape
        )


def usable(mean: Any, var: Any) -> tuple[Array, Array]:
    """The mean and variance of each feature, and 0 and 1 where there is nothing to
    divide by."""
    valid = jnp.isfinite(mean) & jnp.isfinite(var) & (var > 0)
    return jnp.where(valid, mean, 0), jnp.where(valid, var, 1)


def checked(
    *, where: Any, per_feature: Any, center: Any, mask: Any, **devices: Any
) -> How:
    """The options, checked."""
    check_function("where", where)
    axis = -1 if as_bool("per_feature", per_feature) else ()
    norm = BatchNorm(axis=axis, epsilon=0.0, **devices)
    if mask is not None:
        given = array_or_none(mask)
        mask = as_mask(mask, () if given is None else given.shape)
    return How(where, norm, as_bool("center", center), mask)


def is_affine(module: Any) -> bool:
    """Whether a module is a norm of scale and bias alone, such as `ActNorm`."""
    norm = getattr(module, "norm", None)
    return isinstance(norm, Norm) and norm.is_affine


def init_from_batch(
    apply: Callable[..., Any],
    variables: Mapping[str, Tree],
    batch: Any,
    *,
    where: Where = everywhere,
    per_feature: bool = True,
    center: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Tree:
    """Parameters by which each layer's output has mean 0 and variance 1 on a batch.

        std = sqrt(var of the layer's output over the batch)
        kernel = kernel / std
        bias = (bias - mean of the output) / std

    In the order of the computation: what a layer is given comes from layers that are
    standardized already, in one pass. A layer is a module of Linen with a "kernel", or
    a `Norm` of scale and bias alone, `jaxnorm.ActNorm`, whose scale takes the place of
    the kernel; where a kernel is normalized by `WeightNorm` or `WeightStandardization`,
    their scale does. For NNX there is `jaxnorm.nnx.init_from_batch`.

    | Initialization | Settings |
    |---|---|
    | of ActNorm; of weight norm, data-dependent | the defaults |
    | LSUV, of kernels by `orthogonal()` | `per_feature=False, center=False` |

    Args:
        apply: `apply(variables, batch, mutable=...)` runs the model and returns what
            `model.apply` does: it is `model.apply` itself, perhaps with arguments bound
            by `functools.partial`, or a function that passes `mutable` on.
        variables: {"params", ...} of the model, as `init` made them.
        batch: anything that `apply` takes; sharded arrays count as a whole.
        where: whether to take the layer at a path, such as "Block_0/Conv_1"; others,
            such as those that are to start at 0, stay.
        per_feature: a scale for each feature, along the last axis of the kernel; or
            else one for the whole layer.
        center: make the mean 0, too, in layers that have a bias.
        mask: boolean, of the leading axes of every output, such as (batch,) or (batch,
            length): what it excludes counts for nothing. A mask that a norm is called
            with takes its place.
        axis_name: mapped axis, or several, to pool the moments over, where this is
            called within `jax.shard_map` and the like.
        axis_index_groups: groups of indices along `axis_name` that share them.

    Returns:
        New params, of the same structure and dtypes. Layers of a `nn.scan` are taken
        where its `variable_axes` have "init_from_batch" as they have "params".

    Raises:
        ValueError: if no layer is found, or one that is selected is not called, or
            several times, or within a transform that hides it; if a feature has
            variance 0, or one that is not finite; and if the output of a layer is not
            proportional to its kernel, as with `SpectralNorm`. The layer is named.
            Where the arrays are traced, features of no usable variance stay as they
            are, and nothing is said; nor is it of what is not proportional.
        TypeError: for arguments of another kind.

    Source: Mishkin and Matas, 2016 (https://arxiv.org/abs/1511.06422); Salimans and
    Kingma, 2016 (https://arxiv.org/abs/1602.07868); Kingma and Dhariwal, 2018
    (https://arxiv.org/abs/1807.03039).

    >>> import jax, jax.numpy as jnp, jaxnorm
    >>> from flax import linen as nn
    >>> model = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(1)])
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> variables = model.init(jax.random.key(1), x)
    >>> params = jaxnorm.models.init_from_batch(model.apply, variables, x)
    >>> y = model.apply({"params": params}, x)
    >>> print(f"{abs(y.mean()):.3f} {y.std():.3f}")
    0.000 1.000
    """
    from flax.core import DenyList

    check_function("apply", apply)
    check_variables(variables)
    how = checked(
        where=where,
        per_feature=per_feature,
        center=center,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )

    def see(variables: Any, batch: Any) -> dict[str, Array]:
        with _intercepting(how):
            returned = apply(variables, batch, mutable=DenyList("params"))
        return _seen(returned)

    return initialized(see, variables, batch, how)


def initialized(
    see: Callable[[Any, Any], dict[str, Array]], variables: Any, batch: Any, how: How
) -> Tree:
    """New params, by what `see(variables, batch)` sees of each layer."""
    params = variables.get("params", {})
    select(dict.fromkeys(_names(params)), everywhere, "parameters")
    found = jax.jit(see)(variables, batch)
    _check_reached(params, found, how.where)
    if any(isinstance(v, Tracer) for v in found.values()):
        return _rescaled(params, found)
    _check_variances(found)
    new = _rescaled(params, found)
    after = jax.jit(see)({**variables, "params": new}, batch)
    off = [path for path, v in after.items() if not _is_standard(found[path], v)]
    if off:
        raise ValueError(
            f"the outputs of the layers {off} are not proportional to their kernels, "
            "as where these are normalized, or do not add their biases as they are: "
            "leave them out with `where`"
        )
    return new


def _intercepting(how: How) -> Any:
    """A context in which the layers of Linen models give standardized outputs."""
    from flax import linen as nn

    def layer_called(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, y = context.module, call(*args, **kwargs)
        path = "/".join(module.path)
        if context.method_name != "__call__" or not how.where(path):
            return y
        weight = "scale" if is_affine(module) else "kernel"
        if not module.has_variable("params", weight):
            return y
        own_mask = kwargs.get("mask") if weight == "scale" else None
        has_bias = module.has_variable("params", "bias")
        y, seen = how.standardized(path, y, has_bias, own_mask)
        if not module.sow(SEEN, SEEN, seen):
            raise ValueError(
                f"the layer {path!r} is within a transform that hides it, such as "
                f'nn.scan: give that variable_axes with "{SEEN}" as with "params", or '
                "leave the layer out with `where`"
            )
        return y

    return nn.intercept_methods(layer_called)


def _seen(returned: Any) -> dict[str, Array]:
    """What was seen of each layer, of what `apply` has returned."""
    whole = isinstance(returned, tuple) and len(returned) == 2
    if not whole or not isinstance(returned[1], Mapping):
        raise TypeError(
            "apply(variables, batch, mutable=...) must return what model.apply does "
            f"with this `mutable`, (output, variables), got {shown(returned)}"
        )
    tree = returned[1].get(SEEN, {})
    calls = jax.tree_util.tree_flatten_with_path(tree, lambda v: isinstance(v, tuple))
    return {(p := path_name(at[:-1])): only(p, seen) for at, seen in calls[0]}


def only(path: str, seen: Sequence[Array]) -> Array:
    """What was seen, the moments first; raises ValueError unless it was once."""
    if len(seen) != 1:
        raise ValueError(
            f"the layer {path!r} is called {len(seen)} times, whose outputs one kernel "
            "cannot all standardize: leave it out with `where`"
        )
    return jnp.moveaxis(seen[0], -2, 0)  # after the steps of a scan


def _check_reached(params: Tree, found: Found, where: Where) -> None:
    """Raises ValueError unless all layers that `where` selects were seen."""
    kernels = [p for p, name in map(_parted, _names(params)) if name == "kernel"]
    layers = select(dict.fromkeys([*kernels, *found]), where, "layers with a kernel")
    missing = [path for path in layers if path not in found]
    if missing:
        raise ValueError(
            f"the layers {missing} are not called as modules of their own: leave them "
            "out with `where`"
        )


def _check_variances(found: Found) -> None:
    """Raises ValueError unless each feature of each layer can be standardized."""
    for path, (mean, var) in jax.device_get(dict(found)).items():
        bad = ~(np.isfinite(mean) & np.isfinite(var))
        if bad.any():
            raise ValueError(
                f"the output of the layer {path!r} is not finite in {bad.sum()} of "
                f"{bad.size} features: mask what is not valid in the batch"
            )
        if not var.all():
            raise ValueError(
                f"the output of the layer {path!r} has variance 0 in "
                f"{(var == 0).sum()} of {var.size} features, which no scale makes 1: "
                "give a larger batch or another kernel, or leave the layer out with "
                "`where`"
            )


def _is_standard(before: Array, after: Array) -> bool:
    """Whether the moments are 0 and 1, but for the rounding of kernel and bias."""
    (mean, var), (shift, scale) = usable(*before), usable(*after)
    far = TOLERANCE * (1 + abs(mean) / jnp.sqrt(var))
    return bool(((abs(jnp.sqrt(scale) - 1) < TOLERANCE) & (abs(shift) < far)).all())


def _rescaled(params: Tree, found: Found) -> Tree:
    """`params` by which each layer gives what it was seen to give, standardized."""
    names, changes = _names(params), {}
    for path, seen in found.items():
        mean, var = usable(*seen)
        std = jnp.sqrt(var)
        changes[_weight(names, path)] = jnp.zeros_like(mean), std
        changes[join_path(path, "bias")] = mean, std

    def changed(path: tuple[Any, ...], variable: Any) -> Any:
        name = path_name(path)
        if name not in changes:
            return variable
        old = array_of(name, variable)
        mean, std = (_along(v, old, name) for v in changes[name])
        return boxed_like(variable, ((old - mean) / std).astype(old.dtype))

    return copied(jax.tree_util.tree_map_with_path(changed, params, is_leaf=is_box))


def _names(params: Tree) -> list[str]:
    """The paths of all parameters."""
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)[0]
    return [path_name(path) for path, _ in flat]


def _parted(name: str) -> tuple[str, str]:
    """The path of a layer, and what its parameter is called."""
    path, _, own = name.rpartition("/")
    return path, own


def _weight(names: Sequence[str], path: str) -> str:
    """The parameter that the output of the layer at `path` is proportional to."""
    parent, own = _parted(path)
    kernel = join_path(path, "kernel")
    if kernel not in names:
        return join_path(path, "scale")
    before = re.escape(join_path(parent, ""))  # the wrapper stands there, or is it
    of_linen = re.compile(f"{before}([^/]+/)?{re.escape(own)}/kernel/scale")
    of_nnx = join_path(parent, "scales/('kernel',)") if own == "layer_instance" else ""
    scales = [name for name in names if name == of_nnx or of_linen.fullmatch(name)]
    return next(iter(scales), kernel)


def _along(statistic: Array, value: Array, name: str) -> Array:
    """`statistic`, of the features and the steps of a scan, as it broadcasts."""
    *steps, size = statistic.shape
    if size not in (1, *value.shape[-1:]):
        raise ValueError(
            f"{name!r} has shape {value.shape}, but the output of its layer has {size} "
            "features, which must be along its last axis: leave the layer out with "
            "`where`"
        )
    ones = (1,) * (value.ndim - len(steps) - 1)
    return statistic.reshape(*steps, *ones, size)
