"""How does an NNX model get other norms?"""

import dataclasses
from typing import Any

from flax import nnx
from jax import Array

from jaxnorm import _base as base
from jaxnorm.models._convert import check_norm, converted, feature_shape
from jaxnorm.models._paths import Where, copied, everywhere, select
from jaxnorm.nnx._graph import (
    KINDS,
    activation_of,
    become,
    check_model,
    class_of,
    copy_of,
    path_of,
)
from jaxnorm.nnx._layer_norms import LayerNorm, RMSNorm
from jaxnorm.nnx._norm import Norm
from jaxnorm.nnx._norms import BatchNorm, GroupNorm, InstanceNorm


def convert(
    model: nnx.Module,
    norm: base.Norm,
    where: Where = everywhere,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
) -> Any:
    """A copy of `model` with `Norm(norm)` in place of norms, and their variables.

    Flax's own norms are replaced as well: `convert(model, jaxnorm.BatchNorm())` is a
    model of Flax's with jaxnorm's batch norm. What a norm does beyond its settings
    stays: its dtypes, the metadata of its variables, such as their sharding, and an
    activation that `norm` leaves open. What uses the model, such as an optimizer, has
    to be made for the copy.

    Args:
        model: the module, which stays as it is.
        norm: the settings of the new norms: all of them, such as epsilon and axis.
        where: whether to take the norm at a path, such as "layers/1". One that is
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
    check_model(model)
    check_norm(norm, use_scale, use_bias)
    new = copy_of(model)
    norms = {
        path_of(path): module
        for path, module in nnx.iter_modules(new)
        if isinstance(module, NORMS)
    }
    for path, module in select(norms, where, "norms of the model").items():
        become(module, _converted(path, module, norm, use_scale, use_bias))
    return new


def _converted(
    path: str, module: Any, norm: base.Norm, use_scale: bool, use_bias: bool
) -> Norm:
    """A module of `norm` with the variables of `module`, which is at `path`."""
    path = path or "."  # the model itself
    norm = _with_activation(path, module, norm)
    variables = {
        kind: {k: v for k, v in vars(module).items() if isinstance(v, kind)}
        for kind in KINDS.values()
    }
    params, stats = (
        {k: v.get_value() for k, v in old.items()} for old in variables.values()
    )
    size = getattr(module, "num_features", None)
    shape = (size,) if isinstance(size, int) else feature_shape(path, params, stats)
    used: dict[str, Any] = {"use_scale": use_scale, "use_bias": use_bias}
    flag = getattr(module, "use_running_average", False)
    made: Any = Norm(norm, shape, use_running_average=flag, dtype=module.dtype, **used)
    if hasattr(module, "promote_dtype"):
        made.promote_dtype = module.promote_dtype
    new = converted(path, norm, params, stats, shape, **used)
    for (kind, old), values in zip(variables.items(), new, strict=True):
        for k, v in values.items():
            setattr(made, k, _with_metadata(old[k], v) if k in old else kind(copied(v)))
    return made


def _with_activation(path: str, module: Any, norm: base.Norm) -> base.Norm:
    """`norm` with the activation of `module`, unless it has one of its own."""
    if type(module).__call__ not in {kind.__call__ for kind in _KNOWN}:
        raise ValueError(
            f"the norm at {path!r} is {class_of(module)}, which computes something "
            "of its own that would be lost: leave it out with `where`"
        )
    activation = activation_of(module)
    if activation is None or getattr(norm, "activation", None) is not None:
        return norm
    if not hasattr(norm, "activation"):
        raise ValueError(
            f"the norm at {path!r} applies activation={activation!r}, and "
            f"{type(norm).__name__} has none: call it after the norm in the model, or "
            "leave this norm out with `where`"
        )
    return dataclasses.replace(norm, activation=activation)


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


_FLAX_NORMS = (
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
)


NORMS = (Norm, *_FLAX_NORMS)


_KNOWN = (*NORMS, BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm)
