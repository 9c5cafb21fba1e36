"""How do the variables of one norm become those of another?"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxnorm.axes import Shape
from jaxnorm.base import Norm
from jaxnorm.layers import (
    Tree,
    Where,
    chosen_norms,
    everywhere,
    keys_at,
    put,
)
from jaxnorm.running import SWITCHES, marks


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
    taken first (`recalibrate`). `freeze` makes the norms of a model frozen ones.

    Args:
        variables: {"params", "batch_stats"} of the model, as nested dicts.
        norm: the settings of the new norm, such as `jaxnorm.GroupNorm()`.
        where: whether the norm at a path, such as "Block_0/BatchNorm_1", is meant. A
            module of nothing but a bias is not taken for a norm.
        use_scale, use_bias: whether the new norms have these, if `norm` does at all.

    Returns:
        New variables, for the model built with `norm` in the same places.

    Raises:
        ValueError: if `where` means no norm, or arrays of one do not fit `norm`; its
            path is named.

    >>> import jax.numpy as jnp, jaxnorm
    >>> variables = {"params": {"BatchNorm_0": {"scale": jnp.array([2.0])}},
    ...              "batch_stats": {"BatchNorm_0": jaxnorm.init_stats(1)}}
    >>> new = jaxnorm.convert(variables, jaxnorm.GroupNorm(num_groups=1))
    >>> print(new)
    {'params': {'BatchNorm_0': {'scale': Array([2.], dtype=float32), \
'bias': Array([0.], dtype=float32)}}, 'batch_stats': {}}
    """
    trees = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    meant = chosen_norms(variables, where)
    if getattr(norm, "zero_centered_scale", False):
        raise ValueError(
            "convert copies scales as they are, and zero_centered_scale keeps them "
            "less 1: convert without it, and subtract 1 from the scales"
        )
    used = {"scale": use_scale, "bias": use_bias}
    new = dict(variables) | trees
    for path, old in meant.items():
        keys = keys_at(trees.values(), path)
        assert keys is not None  # as the path comes from one of them
        for name, node in zip(trees, _converted(path, norm, *old), strict=True):
            node = {k: v for k, v in node.items() if used.get(k, True)}
            new[name] = put(new[name], keys, node)
    return new


def _converted(
    path: str, norm: Norm, params: Mapping[str, Any], stats: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and statistics of `norm` in the place of these."""
    shape, dtype = features(path, params, stats)
    new_params = norm.init_params(shape, dtype)
    new_stats = norm.init_stats(shape, jnp.asarray(stats.get("mean", 0.0)).dtype)
    new_params = _kept(path, norm, new_params, params)
    new_stats = _kept(path, norm, new_stats, stats)
    if new_stats:
        new_stats |= marks(new_stats, *(k for k in SWITCHES if k in stats))
    return new_params, new_stats


def features(
    path: str, params: Mapping[str, Any], stats: Mapping[str, Any]
) -> tuple[Shape, Any]:
    """Shape of the features of the norm at `path`, and dtype of its parameters."""
    for tree, names in ((params, ("scale", "bias")), (stats, ("mean", "var"))):
        for name in (k for k in names if k in tree):
            dtype = tree[name].dtype if tree is params else jnp.float32
            return jnp.shape(tree[name]), dtype
    raise ValueError(
        f"the norm at {path!r} has none of scale, bias, mean and var, which would say "
        f"how many features there are: it has {sorted({*params, *stats})}"
    )


def _kept(
    path: str, norm: Norm, new: Mapping[str, Any], old: Mapping[str, Any]
) -> dict[str, Any]:
    """`new`, with what `old` has of the same name in its place."""
    out = dict(new)
    for k in (k for k in new if k in old):
        try:
            out[k] = jnp.broadcast_to(old[k], jnp.shape(new[k]))
        except ValueError:
            raise ValueError(
                f"{k} of the norm at {path!r} has shape {jnp.shape(old[k])}, but "
                f"{type(norm).__name__} there has {jnp.shape(new[k])}: choose one row "
                "of a table of domains or steps before converting it"
            ) from None
    return out
