"""How does the moving average of a model's variables treat its statistics?"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm.layers import Tree, map_layers
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
        batch_stats: "recalibrate" leaves the statistics as they are in `average`, to
            be recalibrated before they are used; "average" blends mean and var by
            `decay` and copies all else; "copy" takes those of `variables`.

    Returns:
        New variables, of the dtypes of `average`. Arrays of integers are copied from
        `variables`, and so are collections other than these two.

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
    if "batch_stats" in variables and batch_stats != "copy":
        new["batch_stats"] = average["batch_stats"]
    if batch_stats == "average" and jax.tree.leaves(variables.get("batch_stats")):
        new["batch_stats"] = map_layers(
            lambda _, a, b: _averaged(a, b, decay),
            average["batch_stats"],
            variables["batch_stats"],
        )
    return new


def _averaged(a: Mapping, b: Mapping, decay: ArrayLike) -> dict[str, Any]:
    moved = {k: _blended(a[k], b[k], decay) for k in ("mean", "var") if k in b}
    return {**b, **moved}


def _blended(a: ArrayLike, b: ArrayLike, decay: ArrayLike) -> Array:
    a, b = jnp.asarray(a), jnp.asarray(b)
    return blend(a, b, decay) if jnp.issubdtype(a.dtype, jnp.inexact) else b
