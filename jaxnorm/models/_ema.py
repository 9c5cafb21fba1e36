"""How does the moving average of a model's variables treat its statistics?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm import _running as running
from jaxnorm._arguments import as_share, shown
from jaxnorm.models._combine import between
from jaxnorm.models._paths import (
    Tree,
    check_same,
    check_shapes,
    check_tree,
    copied,
    layers,
    path_name,
    with_layers,
)

POLICIES = ("average", "copy", "recalibrate")


def ema(
    average: Mapping[str, Tree],
    variables: Mapping[str, Tree],
    decay: ArrayLike,
    *,
    batch_stats: str,
) -> dict[str, Tree]:
    """The moving average of variables after one more step.

        params = decay * average["params"] + (1 - decay) * variables["params"]

    Averaged weights give activations that no step has seen, so neither the statistics
    of the last step nor their average fit them: `recalibrate` takes those that do.
    With `decay=n / (n + 1)` at the n-th step, counted from 0, it is the average of all
    steps (stochastic weight averaging).

    Args:
        average: {"params", "batch_stats"} so far; at first the variables themselves.
        variables: those of the model after a step.
        decay: weight of the average so far, from 0 to 1; may be traced. At 0 what is
            in `average` counts for nothing, and may be NaN.
        batch_stats: "recalibrate" leaves the statistics of norms as they are in
            `average`, to be recalibrated before they are used; "average" blends mean
            and var by `decay`; "copy" takes those of `variables`.

    Returns:
        New variables, of the dtypes of `average`: keep it in float32, as half precision
        rounds small steps away. All else, such as integers, other collections and what
        spectral norm keeps, is copied from `variables`.

    Raises:
        ValueError: for an unknown policy, trees that differ or lack "params", or a
            decay that is NaN or not from 0 to 1.
        TypeError: for what are no trees of arrays, and a decay that is no number.

    Source: Tarvainen and Valpola, 2017 (https://arxiv.org/abs/1703.01780); Izmailov et
    al., 2018 (https://arxiv.org/abs/1803.05407).

    >>> import jax.numpy as jnp, jaxnorm
    >>> average = {"params": {"kernel": jnp.array([1.0])}}
    >>> variables = {"params": {"kernel": jnp.array([2.0])}}
    >>> jaxnorm.models.ema(average, variables, 0.75, batch_stats="recalibrate")
    {'params': {'kernel': Array([1.25], dtype=float32)}}
    """
    if not isinstance(batch_stats, str) or batch_stats not in POLICIES:
        raise ValueError(
            f"batch_stats must be one of {POLICIES}, got {shown(batch_stats)}"
        )
    decay = as_share("decay", decay)
    check_tree(average, "average")
    check_tree(variables, "variables")
    _check_params(average, variables)
    new = {k: copied(v) for k, v in variables.items() if k != "params"}
    new["params"] = jax.tree.map(
        lambda a, b: _blended(a, b, decay), average["params"], variables["params"]
    )
    if batch_stats != "copy":
        stats = variables.get("batch_stats", {})
        old, now = layers(average.get("batch_stats", {})), layers(stats)
        check_same(old, now)
        for path, a in old.items():
            check_shapes(path, _moments(a), _moments(now[path]))
        if batch_stats == "average":
            old = {path: _averaged(a, now[path], decay) for path, a in old.items()}
        new |= {"batch_stats": with_layers(stats, old)} if old else {}
    return new


def _check_params(average: Mapping[str, Tree], variables: Mapping[str, Tree]) -> None:
    """Raises ValueError unless both have the same parameters."""
    for name, tree in (("average", average), ("variables", variables)):
        if "params" not in tree:
            raise ValueError(
                f'{name} must hold "params", got {list(tree)}: pass the variables of a '
                "model, and not one of their trees"
            )
    a, b = (_shapes(tree["params"]) for tree in (average, variables))
    if a[1] != b[1]:
        unlike = sorted(p for p in {*a[0], *b[0]} if a[0].get(p) != b[0].get(p))
        raise ValueError(
            'the "params" of average and of variables must be alike, but differ at '
            f"{unlike or 'the types of their nodes'}: take both from one model"
        )


def _shapes(params: Tree) -> tuple[dict[str, tuple[int, ...]], Any]:
    """The shape of each array by its path, and these in the structure of `params`."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {path_name(path): jnp.shape(v) for path, v in found}
    return shapes, (list(shapes.values()), jax.tree.structure(params))


def _moments(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and var among `stats`."""
    return {k: stats[k] for k in ("mean", "var") if k in stats}


def _averaged(
    a: Mapping[str, Any], b: Mapping[str, Any], decay: ArrayLike
) -> dict[str, Any]:
    """The statistics `b`, with mean and var averaged with those of `a`."""
    return {**b, **{k: _blended(v, b[k], decay) for k, v in _moments(a).items()}}


def _blended(a: ArrayLike, b: ArrayLike, decay: ArrayLike) -> Array:
    """The average of two arrays; a copy of `b` where they are no floating point."""
    floating = jnp.issubdtype(jnp.asarray(a).dtype, jnp.inexact)
    return between(a, b, decay) if floating else running.copy_of(jnp.asarray(b))
