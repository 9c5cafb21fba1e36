"""Step 4: the moving statistics that stand in for the batch at evaluation."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import (
    as_array,
    as_bool,
    as_dtype,
    as_feature_shape,
    as_integer,
    as_momentum,
    check_instance,
    check_mapping,
    shown,
)
from jaxnorm._axes import Axes
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm._marks import AVERAGED, BATCH, MOMENTS
from jaxnorm._moments import Moments, pool
from jaxnorm._sharding import sharded_as

Stats = dict[str, Array]

# Of small arrays, and so most of the cost where each operation is traced or called.
_compiled_once = functools.partial(jax.jit, inline=True)


def init_stats(
    feature_shape: int | tuple[int, ...],
    *,
    momentum: ArrayLike | None = 0.99,
    dtype: DTypeLike = jnp.float32,
    stat_names: tuple[str, ...] = ("mean", "var"),
) -> Stats:
    """Statistics before any batch: {"mean": zeros, "var": ones}, or those `stat_names`.

    `feature_shape` is the number of features, or the shape of several feature axes.
    With `momentum=None` there is also "count", the number of batches averaged so far,
    in int32, one per feature. `dtype` is at least float32; complex for complex inputs.
    """
    shape = as_feature_shape("feature_shape", feature_shape)
    as_momentum("momentum", momentum)
    check_stat_names(stat_names)
    dtype = at_least_float32(as_dtype("dtype", dtype))
    stats = {"mean": jnp.zeros(shape, dtype), "var": jnp.zeros(shape, dtype).real + 1}
    stats = {k: stats[k] for k in stat_names}
    if momentum is None:
        stats["count"] = jnp.zeros(shape, jnp.int32)
    return stats


def read(
    stats: Mapping[str, ArrayLike],
    axes: Axes,
    dtype: DTypeLike,
    *,
    stat_names: tuple[str, ...] = ("mean", "var"),
) -> Moments:
    """The running statistics as moments to standardize an input of `dtype` with."""
    check(stats, axes, stat_names)
    arrays = as_arrays({k: stats[k] for k in stat_names})
    var = arrays["var"]
    mean = arrays["mean"] if "mean" in stat_names else jnp.zeros_like(var)
    mean = mean.astype(promote(dtype, mean.dtype, jnp.float32))
    var = var.astype(mean.real.dtype)
    shape = axes.param_shape()
    return Moments(mean.reshape(shape), var.reshape(shape), 1)


@sharded_as("stats")
def update_stats(
    stats: Mapping[str, ArrayLike],
    m: Moments,
    axes: Axes,
    *,
    momentum: ArrayLike | None,
    unbiased: bool = False,
    stat_names: tuple[str, ...] = ("mean", "var"),
    least: int = 2,
) -> Stats:
    """`momentum * old + (1 - momentum) * new` for each statistic, without gradient.

    With `momentum=None`, the average over all batches so far. With `unbiased`, the
    variance kept is `var * size / (size - 1)`, PyTorch's convention; else the biased
    one, Flax's. Dtypes never change. A feature with fewer than `least` valid elements
    (two, as a variance needs) keeps its statistics, and a batch with any statistic that
    is not finite leaves all as they were, bit for bit.
    """
    check_stat_names(stat_names)
    least, momentum = as_integer("least", least), as_momentum("momentum", momentum)
    unbiased = as_bool("unbiased", unbiased)
    check_instance("m", m, Moments, "jaxnorm.moments")
    check(stats, axes, stat_names + (("count",) if momentum is None else ()))
    old = as_arrays(stats)
    complex_mean = "mean" in stat_names and jnp.iscomplexobj(m.mean)
    if complex_mean and not jnp.iscomplexobj(old["mean"]):
        raise TypeError(
            f"the running mean is {old['mean'].dtype} and cannot hold the mean of a "
            f"complex input: initialize the statistics with dtype={m.mean.dtype}"
        )
    mean, var, size = _per_feature(m, axes)
    counted = all_finite(mean, var) & (size >= least)
    if unbiased:
        size = jnp.maximum(size, 2).astype(var.dtype)
        var = var * (size / (size - 1))
    new = dict(old)
    if momentum is None:
        count = old["count"]
        rate = 1 / (count + 1).astype(var.dtype)
        new["count"] = jnp.where(counted, count + 1, count)
    else:
        rate = 1 - momentum
    values = {"mean": mean, "var": var}
    for name, value in ((k, values[k]) for k in stat_names):
        moved = _toward(value, old[name], rate, chance=_chance(mean, var))
        new[name] = jnp.where(counted, moved, old[name])
    if "step" in old:  # the number of batches so far, of the layer as a whole
        step = old["step"]
        some = counted.any(tuple(range(step.ndim, counted.ndim)))
        new["step"] = step + some.astype(step.dtype)
    return new


def as_arrays(stats: Mapping[str, ArrayLike]) -> Stats:
    """Copies of `stats` as arrays: they may be donated while `stats` are in use."""
    return {k: copy_of(as_array(f"stats[{k!r}]", v)) for k, v in stats.items()}


def copy_of(value: Any) -> Any:
    """A copy of a concrete array; a traced one as it is."""
    return value if isinstance(value, Tracer) else value.copy()


def start_accumulation(stats: Mapping[str, ArrayLike]) -> Stats:
    """`stats` that pool the moments of batches from now on, and are not updated."""
    like = jnp.asarray(stats["mean" if "mean" in stats else "var"])
    dtypes = (like.dtype, like.real.dtype, jnp.int32, like.dtype, bool)
    zeros = (jnp.zeros_like(like, dtype) for dtype in dtypes)
    return as_arrays(stats) | dict(zip(BATCH, zeros, strict=True))


def accumulated(stats: Mapping[str, ArrayLike]) -> Moments:
    """The moments of all batches pooled in `stats` so far."""
    return Moments(*(jnp.asarray(stats[k]) for k in MOMENTS))


def accumulate(
    stats: Mapping[str, ArrayLike], m: Moments, axes: Axes, *, averaged: bool
) -> Stats:
    """`stats`, in which the batch of the moments `m` joins those pooled before.

    Where `averaged`, mean and variance are averages over all elements, each by itself.
    """
    check(stats, axes, BATCH)
    before, shape = accumulated(stats), axes.feature_shape
    new = (lax.stop_gradient(v) for v in m.broadcast_to(m.var.shape))
    both = Moments(
        *(
            jnp.stack([a, b.reshape(shape).astype(a.dtype)])
            for a, b in zip(before, new, strict=True)
        )
    )
    pooled = (_average if averaged else _union)(both)
    gathered = {k: v[0] for k, v in zip(MOMENTS, pooled, strict=True)}
    gathered[AVERAGED] = jnp.full_like(stats[AVERAGED], averaged, bool)
    return as_arrays(stats) | gathered


def _union(both: Moments) -> Moments:
    """The moments of the two along the leading axis together."""
    return pool(both, lambda v: v.sum(0, keepdims=True))


def _average(both: Moments) -> Moments:
    """As `_union`, but for the variance, which is their average."""
    var = both._replace(mean=both.var, var=jnp.zeros_like(both.var), residue=0.0)
    return _union(both)._replace(var=_union(var).mean)


def all_finite(*arrays: Array) -> Array:
    """Whether all elements of all arrays are finite."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(v).all() for v in arrays])


def replaced(
    stats: Mapping[str, ArrayLike], new: Mapping[str, Array], when: Array
) -> Stats:
    """`stats` with those of `new` in their place, where `when`; without gradient."""
    out = as_arrays(stats)
    for k, v in new.items():
        v = lax.stop_gradient(v).astype(out[k].dtype)
        out[k] = jnp.where(when, v.reshape(out[k].shape), out[k])
    return out


def check_stat_names(stat_names: Any) -> None:
    """Raises ValueError unless `stat_names` is a tuple of names of statistics."""
    if not isinstance(stat_names, tuple) or stat_names not in (
        ("mean", "var"),
        ("var",),
    ):
        raise ValueError(
            f"stat_names must be ('mean', 'var') or ('var',), got {shown(stat_names)}"
        )


def check_kind(stats: Any) -> None:
    """Raises TypeError unless `stats` is a dict or the like."""
    fix = "give it before scale and bias" if hasattr(stats, "shape") else "start there"
    check_mapping("stats", stats, "init_stats", fix)


def require(stats: Mapping[str, ArrayLike], names: Iterable[str]) -> None:
    """Raises ValueError unless `stats` holds `names`."""
    check_kind(stats)
    missing = [k for k in names if k not in stats]
    if missing:
        raise ValueError(
            f"stats lacks {missing}, it holds {sorted(stats)}: start from init_stats, "
            "with momentum=None for a cumulative average"
        )


def check(stats: Mapping[str, ArrayLike], axes: Axes, names: tuple[str, ...]) -> None:
    """Raises ValueError unless `stats` holds `names`, each in the features' shape."""
    require(stats, names)
    check_instance("axes", axes, Axes, "jaxnorm.Axes.keep")
    for k in names:
        shape = as_array(f"stats[{k!r}]", stats[k]).shape
        if shape != axes.feature_shape:
            raise ValueError(
                f"stats[{k!r}] has shape {shape}, but the features of an "
                f"input of shape {axes.shape} are {axes.feature_shape}"
            )


def _per_feature(m: Moments, axes: Axes) -> tuple[Array, Array, Array]:
    """`m` in the features' shape, out of reach of gradients."""
    size = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)
    shaped = (v.reshape(axes.feature_shape) for v in (m.mean, m.var, size))
    mean, var, size = (lax.stop_gradient(v) for v in shaped)
    return mean, var, size


def moving_average(old: Array, new: Array, keep: ArrayLike) -> Array:
    """`keep * old + (1 - keep) * new`, in the dtype of `old`; see `_toward`."""
    return _toward(new, old, 1 - keep, chance=_chance(new))


@_compiled_once
def _toward(new: Array, old: Array, rate: ArrayLike, *, chance: Array) -> Array:
    """`old + rate * (new - old)`, in the dtype of `old`.

    Rounded to the nearest number, unless that is `old`: an average of many would stand
    still wherever `rate * (new - old)` is less than half the spacing of its numbers. It
    then moves by the whole spacing as often as makes up for the steps that are lost:
    where `chance`, a number from 0 to 1, is less than the step is of the spacing.
    """
    dtype = at_least_float32(promote(old.dtype, new.dtype))
    start, end = old.astype(dtype), new.astype(dtype)
    if jnp.iscomplexobj(start):
        parts = ((end.real, start.real), (end.imag, start.imag))
        moved = lax.complex(*(_toward(*p, rate, chance=chance) for p in parts))
        return moved.astype(old.dtype)
    rate = jnp.asarray(rate, dtype)
    step = rate * (end - start)
    # From the nearer end: no difference of two large numbers is left of a small one.
    moved = jnp.where(rate > 0.5, end - (1 - rate) * (end - start), start + step)
    beside = jnp.nextafter(*lax.stop_gradient((start, end)))
    lost = (moved == start) & (chance.astype(dtype) * abs(beside - start) < abs(step))
    return jnp.where(lost, beside, moved).astype(old.dtype)


@_compiled_once
def _chance(*values: Array) -> Array:
    """A number from 0 to 1 made of the last bits of `values`, which are noise.

    One for each element, the same on every device and in every run, and uniform over
    batches of which no two are alike.
    """
    mixed = jnp.zeros((), jnp.uint32)
    for v in values:
        parts = (v.real, v.imag) if jnp.iscomplexobj(v) else (v,)
        for part in parts:
            part = lax.bitcast_convert_type(part.astype(jnp.float32), jnp.uint32)
            # The finalizer of MurmurHash3 (Appleby, 2011).
            mixed = mixed ^ part
            mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
            mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
            mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).astype(jnp.float32) * 2.0**-24
