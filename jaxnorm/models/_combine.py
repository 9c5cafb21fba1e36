"""How do the statistics of several models or domains become one?"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_epsilon, as_share, shown
from jaxnorm._dtypes import at_least_float32
from jaxnorm._marks import BATCH, SWITCHES
from jaxnorm._moments import Moments, mix
from jaxnorm._running import moving_average
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_layers,
    check_shapes,
    everywhere,
    map_layers,
)


def merge(
    trees: Sequence[Tree],
    weights: Sequence[ArrayLike] | None = None,
    *,
    where: Where = everywhere,
) -> Tree:
    """Statistics of several sets of data together, from the statistics of each.

        share = weights / sum(weights)
        mean = sum(share * means)
        var = sum(share * (vars + abs(means - mean)**2))

    So the statistics of workers, clients or unsynchronized devices become those that
    one model would have of all their data. An average of the variances, which is what
    averaging the trees gives, lacks the spread of the means.

    Args:
        trees: statistics of one model each, of the same layers.
        weights: how much each counts, such as its number of examples; None for all
            alike. One of weight 0 counts for nothing, whatever its statistics are.
            Where all are traced and 0, the result is NaN.
        where: whether to take the layer at a path; others are those of the first tree.

    Returns:
        A new tree. Entries but "mean" and "var" are those of the first tree. What it
        holds is true of norms whose "var" is a variance, or mean square, of the data;
        that of L1, range and running instance norm is an average, as `blend` makes it.

    Raises:
        ValueError: if the trees differ in layers or shapes, or the weights in number,
            for weights that are negative, not finite or all 0, and for norms that keep
            no variance.
        TypeError: for what are no trees of arrays, and weights that are no numbers.

    Source: Chan, Golub and LeVeque, 1983.

    >>> import jax.numpy as jnp, jaxnorm
    >>> a = {"mean": jnp.array([0.0]), "var": jnp.array([1.0])}
    >>> b = {"mean": jnp.array([4.0]), "var": jnp.array([1.0])}
    >>> jaxnorm.models.merge([a, b], weights=[30, 10])
    {'mean': Array([1.], dtype=float32), 'var': Array([4.], dtype=float32)}
    """
    trees = _listed("trees", trees)
    for i, tree in enumerate(trees):
        check_layers(tree, f"trees[{i}]")
    weights = _weights([1] * len(trees) if weights is None else weights, len(trees))

    def merged(path: str, *each: Mapping[str, Any]) -> dict[str, Any]:
        if "var" not in each[0]:
            raise ValueError(
                f"the norm at {path!r} keeps {sorted(each[0])} and no variance, which "
                "cannot be merged: leave it out with `where`"
            )
        for other in each[1:]:
            check_shapes(path, each[0], other)
        mean, var = _mixed(each, weights)
        new = {"mean": mean, "var": var}
        return dict(each[0]) | {k: v for k, v in new.items() if k in each[0]}

    return map_layers(merged, trees[0], *trees[1:], where=where)


def _mixed(
    each: Sequence[Mapping[str, Any]], weights: Sequence[ArrayLike]
) -> tuple[Array, Array]:
    """Mean and variance of all data together, in the dtypes of the first."""
    dtypes = [jnp.asarray(each[0].get(k, 0.0)).dtype for k in ("mean", "var")]
    wide = at_least_float32(dtypes[1])
    known = int | float  # whose shares are exact, however large or small they are
    weights = [w if isinstance(w, known) else jnp.asarray(w, wide) for w in weights]
    shares = [jnp.asarray(w / sum(weights), wide) for w in weights]
    parts = [_moments(*pair) for pair in zip(each, shares, strict=True)]
    m = mix(parts, shares)
    return (m.mean + m.residue).astype(dtypes[0]), m.var.astype(dtypes[1])


def _moments(stats: Mapping[str, Any], share: Array) -> Moments:
    """The statistics of one model as moments; 0, whatever they are, with no share."""
    var = jnp.asarray(stats["var"])
    mean = jnp.asarray(stats.get("mean", jnp.zeros_like(var)))
    mean, var = (jnp.where(share == 0, 0, v) for v in (mean, var))
    return Moments(mean, var, 1)


def _listed(name: str, values: Any) -> list[Any]:
    """`values` in a list; raises TypeError unless they have an order."""
    ordered = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if ordered or (isinstance(values, np.ndarray | Array) and values.ndim):
        return list(values)
    raise TypeError(f"{name} must be a list or tuple, got {shown(values)}")


def _weights(weights: Any, number: int) -> list[Any]:
    """The weights in a list; raises unless each of the trees has a valid one."""
    weights = [as_epsilon("a weight", w) for w in _listed("weights", weights)]
    if not len(weights) == number > 0:
        raise ValueError(
            f"each tree needs a weight, got {number} trees and {len(weights)} weights"
        )
    if all(isinstance(w, int | float) and w == 0 for w in weights):
        raise ValueError(f"some weight must not be 0, got {weights}")
    return weights


def blend(a: Tree, b: Tree, weight: ArrayLike, *, where: Where = everywhere) -> Tree:
    """The weighted average of the statistics of `a` and `b`.

        mean = (1 - weight) * a["mean"] + weight * b["mean"], and var alike

    For statistics of two domains of which the norm is to see a bit of both. Averages
    of n and n0 examples of a similar distribution blend by `weight=n / (n + n0)`.
    Unlike `merge`, the variance does not grow with the distance of the means.

    Args:
        a, b: statistics of the same layers.
        weight: of b, from 0 to 1; may be traced. At 0 and 1 it is exactly those of a
            and of b, whatever the other holds.
        where: whether to take the layer at a path; others are those of a.

    Returns:
        A new tree. Entries but "mean" and "var" are those of a.

    Raises:
        ValueError: if the trees differ in layers or shapes, or the weight is NaN or
            not from 0 to 1.
        TypeError: for what are no trees of arrays, and a weight that is no number.

    Source: Schneider et al., 2020 (https://arxiv.org/abs/2006.16971).
    """

    check_layers(a, "a")
    check_layers(b, "b")
    keep = 1 - as_share("weight", weight)

    def blended(path: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        check_shapes(path, old, new)
        names = [k for k in ("mean", "var") if k in old]
        return old | {k: between(old[k], new[k], keep) for k in names}

    return map_layers(blended, a, b, where=where)


def between(a: ArrayLike, b: ArrayLike, keep: ArrayLike) -> Array:
    """`keep * a + (1 - keep) * b`, in the dtype of a; what has no weight may be NaN."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    mixed = moving_average(a, b, keep)
    return jnp.where(keep == 1, a, jnp.where(keep == 0, b.astype(a.dtype), mixed))


def swap(a: Tree, b: Tree, *, where: Where = everywhere) -> Tree:
    """The statistics of `a`, with those of `b` in the layers that `where` selects.

    For a set of statistics per domain, task or branch on one set of parameters; and,
    with the statistics of a fresh model as b, to start some layers anew.

    Args:
        a, b: statistics of the same layers.
        where: whether to take the layer at a path, such as "Block_0/BatchNorm_1".

    Returns:
        A new tree.

    Raises:
        ValueError: if the trees differ in layers or shapes.
        TypeError: for what are no trees of arrays.
    """
    check_layers(a, "a")
    check_layers(b, "b")

    def swapped(path: str, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        check_shapes(path, old, new)
        return new

    return map_layers(swapped, a, b, where=where)


def reset(batch_stats: Tree, *, where: Where = everywhere) -> Tree:
    """Statistics as before the first batch: mean 0, var 1, count and step 0.

    The marks of `freeze` stay, and what `accumulate` gathered is forgotten.

    Args:
        batch_stats: statistics of the layers of a model, or of one layer.
        where: whether to take the layer at a path, such as "Block_0/BatchNorm_1".

    Returns:
        A new tree.

    Raises:
        ValueError: for a layer that keeps something else, such as a history, of which
            only its method knows the start: take it from a fresh model by `swap`.
        TypeError: for what is no tree of arrays.

    >>> import jax.numpy as jnp, jaxnorm
    >>> jaxnorm.models.reset({"mean": jnp.array([4.0]), "var": jnp.array([2.0])})
    {'mean': Array([0.], dtype=float32), 'var': Array([1.], dtype=float32)}
    """

    def reset(path: str, stats: dict[str, Any]) -> dict[str, Any]:
        unknown = {*stats} - {*_STARTS, *SWITCHES}
        if unknown:
            raise ValueError(
                f"the norm at {path!r} keeps {sorted(unknown)}, of which only its "
                "method knows the start: take it from a fresh model by swap"
            )
        new = {k: jnp.full_like(stats[k], v) for k, v in _STARTS.items() if k in stats}
        return stats | new

    return map_layers(reset, batch_stats, where=where)


_STARTS = {"mean": 0, "var": 1, "count": 0, "step": 0} | dict.fromkeys(BATCH, 0)
