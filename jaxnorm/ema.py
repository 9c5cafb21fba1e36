"""How does the moving average of a model's variables treat its statistics?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm.layers import Tree, check_same, layers, with_layers
from jaxnorm.running import blend

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
        decay: weight of the average so far, from 0 to 1; may be traced.
        batch_stats: "recalibrate" leaves the statistics of norms as they are in
            `average`, to be recalibrated before they are used; "average" blends mean
            and var by `decay`; "copy" takes those of `variables`.

    Returns:
        New variables, of the dtypes of `average`: keep it in float32, as half precision
        rounds small steps away. All else, such as integers, other collections and what
        spectral norm keeps, is copied from `variables`.

    Raises:
        ValueError: for an unknown policy, or trees that differ.

    Source: Tarvainen and Valpola, 2017 (https://arxiv.org/abs/1703.01780); Izmailov et
    al., 2018 (https://arxiv.org/abs/1803.05407).

    >>> import jax.numpy as jnp, jaxnorm
    >>> average = {"params": {"kernel": jnp.array([1.0])}}
    >>> variables = {"params": {"kernel": jnp.array([2.0])}}
    >>> jaxnorm.ema(average, variables, 0.75, batch_stats="recalibrate")
    {'params': {'kernel': Array([1.25], dtype=float32)}}
    """
    if batch_stats not in POLICIES:
        raise ValueError(f"batch_stats must be one of {POLICIES}, got {batch_stats!r}")
    new = dict(variables)
    new["params"] = jax.tree.map(
        lambda a, b: _blended(a, b, decay), average["params"], variables["params"]
    )
    if batch_stats != "copy":
        stats = variables.get("batch_stats", {})
        old, now = layers(average.get("batch_stats", {})), layers(stats)
        check_same(old, now)
        if batch_stats == "average":
            old = {path: _averaged(a, now[path], decay) for path, a in old.items()}
        new |= {"batch_stats": with_layers(stats, old)} if old else {}
    return new


def _averaged(a: Mapping, b: Mapping, decay: ArrayLike) -> dict[str, Any]:
    moved = {k: _blended(a[k], b[k], decay) for k in ("mean", "var") if k in b}
    return {**b, **moved}


def _blended(a: ArrayLike, b: ArrayLike, decay: ArrayLike) -> Array:
    a, b = jnp.asarray(a), jnp.asarray(b)
    return blend(a, b, decay) if jnp.issubdtype(a.dtype, jnp.inexact) else b
