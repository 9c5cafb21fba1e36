"""How do the moments of several batches make one update of the statistics, or none?"""

from collections.abc import Callable, Mapping
from typing import Any

from jax.typing import ArrayLike

from jaxnorm import _marks as marks
from jaxnorm import _running as running
from jaxnorm._arguments import as_bool, as_momentum
from jaxnorm._axes import Axes
from jaxnorm._marks import BATCH
from jaxnorm.models._paths import Tree, Where, everywhere, layers, map_layers


def accumulate(batch_stats: Tree, where: Where = everywhere) -> Tree:
    """Statistics that gather the moments of batches in training, and do not move.

    Training with the result normalizes each batch as ever and leaves mean and var as
    they are. The moments of all batches together, pooled by their numbers of elements,
    are in the entries "batch_mean", "batch_var", "batch_size" and "batch_residue" of
    each layer, until `commit` makes one update of them, or `discard` none. So the
    statistics after k micro-batches are those after one batch of all their examples.

    Those of running instance, L1 and range batch norm are averages over instances or
    batches, and are averaged by numbers of elements ("batch_averaged" is true). Running
    instance norm applies `unbiased` itself. The history that cross-iteration batch norm
    keeps goes on, and is not gathered.

    Args:
        batch_stats: statistics of the layers of a model, or of one layer.
        where: whether to take the layer at a path, such as "Block_0/BatchNorm_1".

    Returns:
        A new tree; entries gathered before start again from none. Sizes are int32, so
        a commit is due before 2**31 elements per feature (`recalibrate` has no limit).
        Layers that `freeze` holds gather nothing.

    Raises:
        ValueError: if `where` selects no layer; in training, for methods whose
            statistics follow no single batch (moving average, online and IterNorm).
        TypeError: for what is no tree of arrays.

    Source: Chan, Golub and LeVeque, 1983.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> norm = jaxnorm.BatchNorm(momentum=0.9)
    >>> stats = jaxnorm.models.accumulate(norm.init_stats((1,)))
    >>> for micro_batch in (x[:2], x[2:]):
    ...     y, stats = norm(micro_batch, {}, stats)
    >>> stats = jaxnorm.models.commit(stats, momentum=0.9)
    >>> _, expected = norm(x, {}, norm.init_stats((1,)))
    >>> print(stats["mean"] == expected["mean"], stats["var"] == expected["var"])
    [ True] [ True]
    """
    return map_layers(
        lambda _, stats: running.start_accumulation(stats), batch_stats, where=where
    )


def commit(
    batch_stats: Tree, *, momentum: ArrayLike | None, unbiased: bool = False
) -> Tree:
    """Moves the statistics once, towards the moments gathered since `accumulate`.

        mean = momentum * mean + (1 - momentum) * batch_mean
        var = momentum * var + (1 - momentum) * batch_var

    With `momentum=1 - alpha` it is also how statistics are adapted to the batches of
    another domain (AdaBN, Li et al., 2016), and with `momentum=n0 / (n0 + n)` those of
    n examples weigh as much against n0 of before (Schneider et al., 2020).

    Args:
        batch_stats: statistics after `accumulate` and any number of batches.
        momentum: weight of the old statistics, as in the norms of the model, whose
            variables do not tell; None for norms that average over all batches.
        unbiased: keep `var * n / (n - 1)`, as those norms do.

    Returns:
        A new tree, of the structure it had before `accumulate`. A feature with fewer
        than two valid elements keeps its statistics, and so does a layer of which some
        moment is not finite.

    Raises:
        ValueError: if the tree does not come from `accumulate`, or `momentum` is None
            where a layer counts no batches, or a number where it does, or not from 0
            to 1.
        TypeError: for what is no tree of arrays, no number and no boolean.

    Source: Li et al., 2016 (https://arxiv.org/abs/1603.04779); Schneider et al., 2020
    (https://arxiv.org/abs/2006.16971).
    """
    momentum = as_momentum("momentum", momentum)
    unbiased = as_bool("unbiased", unbiased)

    def moved(path: str, stats: Mapping[str, Any]) -> dict[str, Any]:
        if ("count" in stats) != (momentum is None):
            raise ValueError(
                f"the norm at {path!r} keeps {sorted(stats)}, but momentum="
                f"{momentum}: give None where batches are counted, else a number, as "
                "in the norm's own settings"
            )
        m = running.accumulated(stats)
        axes = Axes.keep(m.var.shape, tuple(range(m.var.ndim)))
        names = tuple(k for k in ("mean", "var") if k in stats)
        return running.update_stats(
            marks.without(stats, BATCH),
            m,
            axes,
            momentum=momentum,
            unbiased=unbiased,
            stat_names=names,
        )

    return _map_gathered(moved, batch_stats)


def discard(batch_stats: Tree) -> Tree:
    """Statistics as they were before `accumulate`, whatever was gathered since.

    Raises ValueError if the tree does not come from `accumulate`, and TypeError for
    what is no tree of arrays.

    >>> import jaxnorm
    >>> sorted(jaxnorm.models.discard(jaxnorm.models.accumulate(jaxnorm.init_stats(1))))
    ['mean', 'var']
    """
    return _map_gathered(lambda _, stats: marks.without(stats, BATCH), batch_stats)


def _map_gathered(
    f: Callable[[str, Mapping[str, Any]], dict[str, Any]], batch_stats: Tree
) -> Tree:
    """`batch_stats` with `f(path, stats)` for each layer that gathers batches."""
    gathered = {p for p, stats in layers(batch_stats).items() if BATCH[0] in stats}
    if not gathered:
        raise ValueError(
            "no layer of these statistics gathers batches: start with "
            f"accumulate(batch_stats); the layers are {list(layers(batch_stats))}"
        )
    return map_layers(f, batch_stats, where=gathered.__contains__)
