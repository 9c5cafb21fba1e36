"""Which running statistics do fixed weights have on a data set?"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm import _marks as marks
from jaxnorm import _running as running
from jaxnorm._arguments import as_bool, check_function, shown
from jaxnorm._marks import AVERAGED, BATCH, MARKS, RUNNING
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
Layers = dict[str, dict[str, Any]]  # the statistics of each layer, by its path


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

    Statistics that are no moments of the data, of running instance, L1 and range batch
    norm, become the averages of those of instances or batches, weighed by their numbers
    of elements. Running instance norm applies its own `unbiased`.

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
    selected = select_layers(stats, where)
    paths = [*selected]
    gather = jax.jit(lambda variables, batch: _gathered(apply, variables, batch, paths))
    base = _by_running(stats) if layer_by_layer else stats

    def once(layers: Layers) -> Layers:
        marked = {p: _gathering(v, layer_by_layer) for p, v in layers.items()}
        now = {**variables, "batch_stats": with_layers(base, marked)}
        found = _one_pass(gather, now, progress(batches) if progress else batches)
        return {p: _replaced(v, found[p], unbiased) for p, v in layers.items()}

    new = {p: marks.without(v, MARKS) for p, v in selected.items()}
    new = _until_stable(once, new) if layer_by_layer else once(new)
    return with_layers(stats, {p: {**selected[p], **v} for p, v in new.items()})


class Seen(NamedTuple):
    """The moments of batches, and whether they are averages (`AVERAGED`)."""

    moments: Moments
    averaged: Any


def _union(a: Seen, b: Seen) -> Seen:
    """Those of the union of two disjoint sets, all in NumPy's float64."""
    size = a.moments.size + b.moments.size
    share = b.moments.size / np.maximum(size, 1)
    parts, weights = (a.moments, b.moments), (1 - share, share)
    averaged = a.averaged | b.averaged
    both = mix(parts, weights, weights if averaged.any() else None)
    return Seen(both._replace(size=size), averaged)


def _gathering(stats: Mapping[str, Any], by_running: bool) -> dict[str, Any]:
    """The statistics of a layer that gathers moments, and may normalize by these."""
    switch = marks.marks(stats, RUNNING) if by_running else {}
    return running.start_accumulation(stats) | switch


def _gathered(
    apply: Apply, variables: Any, batch: Any, paths: list[str]
) -> dict[str, Seen]:
    """The moments of one batch in the layers at `paths`."""
    returned = apply(variables, batch)
    check_layers(returned, "what apply(variables, batch) returns")
    new = layers(returned)
    missing = [p for p in paths if p not in new or BATCH[0] not in new[p]]
    if missing:
        raise ValueError(
            f"apply(variables, batch) returned no statistics of the layers {missing}: "
            "it must return the batch_stats that the model updates in training, all of "
            f"them; those returned are {list(new)}"
        )
    return {p: Seen(running.accumulated(new[p]), new[p][AVERAGED]) for p in paths}


def _one_pass(
    gather: Callable[[Any, Any], dict[str, Seen]],
    variables: Any,
    batches: Iterable[Any],
) -> dict[str, Moments]:
    """The moments of all batches in each layer."""
    found: dict[str, Seen] = {}
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
    pooled = {path: seen.moments for path, seen in found.items()}
    empty = [path for path, m in pooled.items() if not np.any(m.size)]
    if empty:
        raise ValueError(
            f"the layers {empty} have gathered nothing: each must be one of jaxnorm's, "
            "called in training mode (use_running_average=False) on something valid; "
            "leave others, such as Flax's own, out with `where`"
        )
    return pooled


def _join(found: dict[str, Seen], batch: tuple[int, dict[str, Seen]] | None) -> None:
    """Pools the moments of a batch of this number into those found so far."""
    if batch is None:
        return
    number, layers = batch
    for path, (m, averaged) in jax.device_get(layers).items():
        m = _float64(m)
        if not (np.isfinite(m.mean).all() and np.isfinite(m.var).all()):
            raise ValueError(
                f"the moments of batch {number} (counted from 0) in the layer {path!r} "
                "are not finite: mask what is not valid in the data, or find out which "
                "weights make it so; no statistics have changed"
            )
        seen = Seen(m, averaged)
        found[path] = _union(found[path], seen) if path in found else seen


def _float64(m: Any) -> Any:
    """Moments in NumPy's float64, with mean and residue in one number."""
    wide = np.result_type(m.mean.dtype, np.float64)
    mean = m.mean.astype(wide) + m.residue
    zero = np.zeros_like(mean)
    return Moments(mean, m.var.astype(np.float64), m.size.astype(np.int64), zero)


def _replaced(stats: Mapping[str, Any], m: Moments, unbiased: bool) -> dict[str, Any]:
    """`stats` with the moments `m` of each feature that has two elements or more."""
    size = np.maximum(m.size, 2)
    var = m.var * (size / (size - 1) if unbiased else 1)
    new = dict(stats)
    for name, value in (("mean", m.mean + m.residue), ("var", var)):
        if name in stats:
            old = np.asarray(stats[name])
            value = np.where(m.size < 2, old, value).astype(old.dtype)
            new[name] = jnp.asarray(value)
    return new


def _by_running(batch_stats: Tree) -> Tree:
    """Statistics by which each layer normalizes in training, too."""
    return map_layers(lambda _, v: v | marks.marks(v, RUNNING), batch_stats)


def _depth(layers: Layers) -> int:
    """How many layers there are at most; those of a scan are one for each step."""
    return sum(math.prod(marks.shape_of(v)[:-1]) for v in layers.values())


def _until_stable(once: Callable[[Layers], Layers], layers: Layers) -> Layers:
    """The statistics after passes of `once` over the data, until one changes nothing.

    Each pass makes those layers stable that follow the layers that are. Raises
    ValueError if the last one still changed something by more than rounding does.
    """
    before = layers
    for _ in range(_depth(layers) + 1):
        before, layers = layers, once(layers)
        if _same(before, layers):
            return layers
    moving = [path for path, v in layers.items() if not _close(v, before[path])]
    if moving:
        raise ValueError(
            f"the statistics of the layers {moving} do not settle, as it is where one "
            "norm is called several times: recalibrate without layer_by_layer, or give "
            "each call a norm of its own; no statistics have changed"
        )
    return layers


def _close(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the statistics of a layer differ by rounding alone."""
    names = [k for k in ("mean", "var") if k in a]
    return all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-3) for k in names)


def _same(a: Layers, b: Layers) -> bool:
    """Whether all statistics are equal, bit for bit."""
    return all(
        np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
