"""Which running statistics do fixed weights have on a data set?"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import _marks as marks
from jaxnorm import _running as running
from jaxnorm._arguments import as_bool, check_function, shown
from jaxnorm._marks import BATCH, MARKS, RUNNING
from jaxnorm._moments import Moments, mix
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_layers,
    check_variables,
    everywhere,
    layers,
    map_layers,
    select_layers,
    with_layers,
)

Apply = Callable[[Mapping[str, Tree], Any], Tree]


def recalibrate(
    apply: Apply,
    variables: Mapping[str, Tree],
    batches: Iterable[Any],
    *,
    where: Where = everywhere,
    layer_by_layer: bool = False,
    unbiased: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Tree:
    """Running statistics that are the moments of a whole data set, for fixed weights.

        mean = mean of a layer's inputs over all elements of all batches
        var = their variance about it

    For weights that no statistics fit, such as averaged, rounded or merged ones, and
    for statistics that are too noisy an average (precise batch norm). However the data
    is split into batches, masked, or spread over devices, elements count alike.

    By default each layer sees what it would in training, its inputs normalized by
    batches. With `layer_by_layer` the layers normalize by the new statistics, so that
    these are exactly the moments of what each layer will see in evaluation, also where
    batches are small. That goes over the data until nothing changes: at most as often
    as there are layers, and once more.

    Args:
        apply: `apply(variables, batch)` runs the model in training mode and returns its
            new batch_stats. It is compiled once for each shape of a batch. For Linen:
            `model.apply(variables, batch, train=True, mutable=["batch_stats"])[1]
            ["batch_stats"]`; NNX models have `jaxnorm.nnx.recalibrate`.
        variables: {"params", "batch_stats"} of the model.
        batches: any iterable of anything `apply` takes: arrays on one device or many,
            tuples, dicts with masks; with `layer_by_layer`, one that starts again each
            time, such as a list.
        where: whether to take the layer at a path; others keep their statistics, and
            normalize as `apply` has them; with `layer_by_layer` by these statistics,
            if they are jaxnorm's.
        layer_by_layer: take the moments of each layer as those before it evaluate.
        unbiased: keep `var * n / (n - 1)`, PyTorch's convention.
        progress: wraps the batches of each pass, such as `tqdm.tqdm`.

    Returns:
        New batch_stats, of the same structure and dtypes; the moments are pooled in
        float64 on the host. A feature with fewer than two valid elements in all the
        data keeps its statistics.

    Raises:
        ValueError: if there is no batch, a moment is not finite, or a layer gathers
            nothing, as it is not called, or not one of jaxnorm's, or does not settle,
            as it is called several times (`layer_by_layer`); the layer is named, and
            nothing has changed.
        TypeError: for an iterator with `layer_by_layer`, and arguments of another kind.

    Source: Wu and Johnson, 2021 (https://arxiv.org/abs/2105.07576), section 3.

    >>> import jax.numpy as jnp, jaxnorm
    >>> norm = jaxnorm.BatchNorm()
    >>> def apply(variables, batch):
    ...     return {"norm": norm(batch, {}, variables["batch_stats"]["norm"])[1]}
    >>> variables = {"params": {}, "batch_stats": {"norm": norm.init_stats((1,))}}
    >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]
    >>> jaxnorm.models.recalibrate(apply, variables, batches[:1])["norm"]["mean"]
    Array([2.], dtype=float32)
    """
    check_function("apply", apply)
    check_variables(variables)
    if isinstance(batches, Mapping | str | bytes) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"batches must be an iterable of what `apply` takes, got {shown(batches)}: "
            "put a single batch into a list"
        )
    if progress is not None:
        check_function("progress", progress)
    layer_by_layer = as_bool("layer_by_layer", layer_by_layer)
    unbiased = as_bool("unbiased", unbiased)
    if layer_by_layer and isinstance(batches, Iterator):
        raise TypeError(
            f"layer_by_layer goes over the batches several times, got an iterator, "
            f"{type(batches).__name__}, which ends after the first: pass a list, or an "
            "object whose __iter__ starts again"
        )
    stats = variables.get("batch_stats", {})
    meant = select_layers(stats, where)
    gather = jax.jit(lambda variables, batch: _gathered(apply, variables, batch, meant))
    base = _by_running(stats) if layer_by_layer else stats

    def once(own: dict[str, dict]) -> dict[str, dict]:
        marked = {p: _gathering(v, layer_by_layer) for p, v in own.items()}
        now = {**variables, "batch_stats": with_layers(base, marked)}
        found = _one_pass(gather, now, progress(batches) if progress else batches)
        return {p: _moved(v, found[p], unbiased) for p, v in own.items()}

    own = {p: marks.without(layer, MARKS) for p, layer in meant.items()}
    own = _settled(once, own) if layer_by_layer else once(own)
    return with_layers(stats, {p: {**meant[p], **v} for p, v in own.items()})


def _union(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets together, all in NumPy's float64."""
    size = a.size + b.size
    share = b.size / np.maximum(size, 1)
    return mix((a, b), (1 - share, share))._replace(size=size)


def _gathering(stats: Mapping[str, Any], by_running: bool) -> dict[str, Any]:
    switch = marks.marks(stats, RUNNING) if by_running else {}
    return running.init_batch(stats) | switch


def _gathered(apply: Apply, variables: Any, batch: Any, meant: Iterable[str]) -> dict:
    """The moments of one batch in each layer."""
    returned = apply(variables, batch)
    check_layers(returned, "what apply(variables, batch) returns")
    new = layers(returned)
    missing = [p for p in meant if p not in new or BATCH[0] not in new[p]]
    if missing:
        raise ValueError(
            f"apply(variables, batch) returned no statistics of the layers {missing}: "
            "it must return the batch_stats that the model updates in training, all of "
            f"them; those returned are {list(new)}"
        )
    return {p: [new[p][k] for k in BATCH] for p in meant}


def _one_pass(
    gather: Callable, variables: Any, batches: Iterable[Any]
) -> dict[str, Moments]:
    found: dict[str, Moments] = {}
    before = None
    for number, batch in enumerate(batches):
        # The device works on this batch while the host pools the one before.
        now = number, gather(variables, batch)
        _join(found, before)
        before = now
    if before is None:
        raise ValueError(
            "there are no batches: pass an iterable of at least one, and no iterator "
            "that has come to its end"
        )
    _join(found, before)
    empty = [path for path, pooled in found.items() if not np.any(pooled.size)]
    if empty:
        raise ValueError(
            f"the layers {empty} have gathered nothing: each must be one of jaxnorm's, "
            "called in training mode (use_running_average=False) on something valid; "
            "leave others, such as Flax's own, out with `where`"
        )
    return found


def _join(found: dict[str, Moments], batch: tuple[int, dict] | None) -> None:
    if batch is None:
        return
    number, moments = batch
    for path, (mean, var, size, residue) in jax.device_get(moments).items():
        batch = _float64(Moments(mean, var, size, residue))
        if not (np.isfinite(batch.mean).all() and np.isfinite(batch.var).all()):
            raise ValueError(
                f"the moments of batch {number} (counted from 0) in the layer {path!r} "
                "are not finite: mask what is not valid in the data, or find out which "
                "weights make it so; no statistics have changed"
            )
        found[path] = _union(found[path], batch) if path in found else batch


def _float64(m: Moments) -> Moments:
    """`m` in NumPy's float64, with its mean and residue in one number."""
    wide = np.result_type(m.mean.dtype, np.float64)
    mean = m.mean.astype(wide) + m.residue
    zero = np.zeros_like(mean)
    return Moments(mean, m.var.astype(np.float64), m.size.astype(np.int64), zero)


def _moved(stats: Mapping[str, Any], found: Moments, unbiased: bool) -> dict[str, Any]:
    """`stats` with the moments found, where there are any."""
    size = np.maximum(found.size, 2)
    var = found.var * (size / (size - 1) if unbiased else 1)
    new = dict(stats)
    for name, value in (("mean", found.mean + found.residue), ("var", var)):
        if name in stats:
            old = np.asarray(stats[name])
            value = np.where(found.size < 2, old, value).astype(old.dtype)
            new[name] = jnp.asarray(value)
    return new


def _by_running(batch_stats: Tree) -> Tree:
    """All layers normalize by running statistics, those that keep theirs, too."""
    return map_layers(lambda _, v: v | marks.marks(v, RUNNING), batch_stats)


def _depth(own: Mapping[str, Any]) -> int:
    """How many layers there are at most, stacked ones, as of a scan, one by one."""
    return sum(math.prod(marks.shape_of(v)[:-1]) for v in own.values())


def _settled(once: Callable[[dict], dict], own: dict[str, dict]) -> dict[str, dict]:
    """What `once` makes of `own`, again and again, until nothing changes.

    Each pass settles the layers behind those settled before. Raises where the last one
    still changed something by more than rounding does.
    """
    before = own
    for _ in range(_depth(own) + 1):
        before, own = own, once(own)
        if _same(before, own):
            return own
    moving = [path for path, stats in own.items() if not _close(stats, before[path])]
    if moving:
        raise ValueError(
            f"the statistics of the layers {moving} do not settle, as it is where one "
            "norm is called several times: recalibrate without layer_by_layer, or give "
            "each call a norm of its own; no statistics have changed"
        )
    return own


def _close(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    names = [k for k in ("mean", "var") if k in a]
    return all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-3) for k in names)


def _same(a: Any, b: Any) -> bool:
    return all(
        np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
