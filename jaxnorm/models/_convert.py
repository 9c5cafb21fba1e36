"""How do the variables of one norm become those of another?"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxnorm._arguments import as_bool, shown
from jaxnorm._axes import Shape
from jaxnorm._base import Norm
from jaxnorm._marks import BATCH, SWITCHES, marks
from jaxnorm.models._leaves import array_of, boxed_like
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_variables,
    copied,
    everywhere,
    keys_at,
    select_norms,
    set_at,
)


def convert(
    variables: Mapping[str, Tree],
    norm: Norm,
    where: Where = everywhere,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
) -> dict[str, Tree]:
    """The variables of a model whose norms are replaced by `norm`.

    Parameters and statistics that both norms have are kept, along new leading axes
    (of domains or steps) as copies; others start as `norm` starts them. So batch norm
    becomes synchronized, ghost, domain or recurrent batch norm or renorm, and back from
    those without such axes, with nothing lost. Group norm takes over scale and bias of
    batch norm and has to be fine-tuned; the other way round, the statistics have to be
    taken first (`recalibrate`). `freeze` makes the norms of a model frozen ones. All
    settings, such as epsilon, axis and axis_name, are those of `norm`.

    Args:
        variables: {"params", "batch_stats"} of the model, as nested dicts.
        norm: the settings of the new norm, such as `jaxnorm.GroupNorm()`.
        where: whether to take the norm at a path, such as "Block_0/BatchNorm_1". A
            module of nothing but a bias is not taken for a norm.
        use_scale, use_bias: whether the new norms have these, if `norm` does at all.

    Returns:
        New variables, in buffers of their own, for the model built with `norm` in the
        same places. Marks of frozen layers stay, and so do boxes of Flax's, such as
        `nn.Partitioned`, around what they held.

    Raises:
        ValueError, TypeError: if `where` selects no norm, arrays of one do not fit
            `norm`, or it gathers batches (`accumulate`); its path is named.

    >>> import jax.numpy as jnp, jaxnorm
    >>> variables = {"params": {"BatchNorm_0": {"scale": jnp.array([2.0])}},
    ...              "batch_stats": {"BatchNorm_0": jaxnorm.init_stats(1)}}
    >>> new = jaxnorm.models.convert(variables, jaxnorm.GroupNorm(num_groups=1))
    >>> print(new)
    {'batch_stats': {}, 'params': {'BatchNorm_0': {'bias': Array([0.], dtype=float32), \
'scale': Array([2.], dtype=float32)}}}
    """
    check_variables(variables)
    check_norm(norm, use_scale, use_bias)
    trees = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    new = dict(variables) | trees
    for path, old in select_norms(variables, where).items():
        keys = keys_at(trees.values(), path)
        if keys is None:
            raise ValueError(
                f"the norm at {path!r} is within a list or tuple, where a new variable "
                "has no place: convert trees of dicts"
            )
        shape = feature_shape(path, *old)
        nodes = converted(
            path, norm, *old, shape, use_scale=use_scale, use_bias=use_bias
        )
        for name, node in zip(trees, nodes, strict=True):
            new[name] = set_at(new[name], keys, node)
    return copied(new)


def check_norm(norm: Any, use_scale: Any, use_bias: Any) -> None:
    """Raises ValueError or TypeError unless norms can be converted to `norm`."""
    if isinstance(norm, type) and issubclass(norm, Norm):
        raise TypeError(
            f"norm must be a settings value, got the class {norm.__name__}: call it, "
            f"{norm.__name__}()"
        )
    if not isinstance(norm, Norm):
        raise TypeError(
            "norm must be a settings value such as jaxnorm.GroupNorm(), got "
            f"{shown(norm)}"
        )
    for name, flag in {"use_scale": use_scale, "use_bias": use_bias}.items():
        as_bool(name, flag)
    if getattr(norm, "zero_centered_scale", False):
        raise ValueError(
            "convert copies scales as they are, and zero_centered_scale keeps them "
            "less 1: convert without it, and subtract 1 from the scales"
        )


def converted(
    path: str,
    norm: Norm,
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    shape: Shape,
    *,
    use_scale: bool,
    use_bias: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and statistics of `norm` for features of `shape`, with the values of
    those of the norm at `path`."""
    gathering = [k for k in BATCH if k in stats]
    if gathering:
        raise ValueError(
            f"the norm at {path!r} gathers batches, which convert would lose: commit "
            "or discard them first"
        )
    arrays = _arrays(path, params, stats)
    dtypes = [arrays[k].dtype for k in ("scale", "bias") if k in params]
    new_params = norm.init_params(shape, *dtypes[:1])
    dtypes = [arrays[k].dtype for k in ("mean", "var") if k in stats]
    new_stats = norm.init_stats(shape, *dtypes[:1])
    used = {"scale": use_scale, "bias": use_bias}
    new_params = {k: v for k, v in new_params.items() if used.get(k, True)}
    switches = [k for k in SWITCHES if k in stats and new_stats]
    switched = marks(new_stats, *switches)
    for new, old in ((new_params, params), (new_stats, stats)):
        for k in (k for k in new if k in old):
            array = _spread(path, norm, k, arrays[k], new[k].shape)
            new[k] = boxed_like(old[k], array)
    return new_params, new_stats | switched


def feature_shape(
    path: str, params: Mapping[str, Any], stats: Mapping[str, Any]
) -> Shape:
    """The shape of the features of the norm at `path`, as its variables tell it."""
    arrays = _arrays(path, params, stats)
    for name in (k for k in ("scale", "bias", "mean", "var") if k in arrays):
        return arrays[name].shape
    raise ValueError(
        f"the norm at {path!r} has none of scale, bias, mean and var, which would say "
        f"how many features there are: it has {sorted(arrays)}"
    )


def _arrays(path: str, *variables: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of all variables of the norm at `path`, by their names."""
    return {
        k: array_of(f"{k} of the norm at {path!r}", v)
        for tree in variables
        for k, v in tree.items()
    }


def _spread(path: str, norm: Norm, name: str, old: Array, shape: Shape) -> Array:
    """`old` as copies along the leading axes that `shape` has beside its own."""
    if shape[len(shape) - old.ndim :] == old.shape:
        return jnp.broadcast_to(old, shape)
    raise ValueError(
        f"{name} of the norm at {path!r} has shape {old.shape}, but "
        f"{type(norm).__name__} there has {shape}: choose one row of a table of "
        "domains or steps before converting it"
    )
