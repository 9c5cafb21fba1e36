"""Normalization methods from their papers' definitions, in plain NumPy float64.

The tests measure the package against this file. It shares no code with the package
and none of its structure: each statistic gathers its own valid elements.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    """Output, and for each element its statistic's mean, biased variance and size."""

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    size: np.ndarray


class Moments(NamedTuple):
    """Mean, biased variance and number of elements."""

    mean: np.ndarray
    var: np.ndarray
    size: np.ndarray


def batch_norm(x, scale=None, bias=None, *, axis: Any = -1, epsilon=1e-5, mask=None):
    """One statistic per index along `axis` (Ioffe & Szegedy 2015)."""
    x = _exact(x)
    features = _axes(axis, x.ndim)
    return _normalize(
        x, lambda i: _pick(i, features), scale, bias, features, epsilon, mask
    )


def layer_norm(
    x,
    scale=None,
    bias=None,
    *,
    reduction_axes=-1,
    feature_axes=-1,
    epsilon=1e-6,
    mask=None,
):
    """One statistic per index along the axes that are not reduced (Ba et al. 2016)."""
    x = _exact(x)
    kept = _others(reduction_axes, x.ndim)
    features = _axes(feature_axes, x.ndim)
    return _normalize(x, lambda i: _pick(i, kept), scale, bias, features, epsilon, mask)


def rms_norm(
    x, scale=None, *, reduction_axes=-1, feature_axes=-1, epsilon=1e-6, mask=None
):
    """Divide by the root of the mean square (Zhang & Sennrich 2019)."""
    x = _exact(x)
    kept = _others(reduction_axes, x.ndim)
    features = _axes(feature_axes, x.ndim)
    return _normalize(
        x, lambda i: _pick(i, kept), scale, None, features, epsilon, mask, centred=False
    )


def group_norm(
    x,
    scale=None,
    bias=None,
    *,
    num_groups=32,
    group_size=None,
    axis=-1,
    epsilon=1e-6,
    mask=None,
):
    """One statistic per example and run of consecutive features (Wu & He 2018)."""
    x = _exact(x)
    (feature,) = features = _axes(axis, x.ndim)
    if (num_groups is None) == (group_size is None):
        raise ValueError("give exactly one of num_groups and group_size")
    count = x.shape[feature]
    if count % (group_size or num_groups):
        raise ValueError(f"{count} features do not form equal groups")
    width = group_size or count // num_groups
    return _normalize(
        x, lambda i: (i[0], i[feature] // width), scale, bias, features, epsilon, mask
    )


def instance_norm(x, scale=None, bias=None, *, axis=-1, epsilon=1e-6, mask=None):
    """One statistic per example and feature (Ulyanov et al. 2016)."""
    x = _exact(x)
    features = _axes(axis, x.ndim)
    return _normalize(
        x, lambda i: (i[0], *_pick(i, features)), scale, bias, features, epsilon, mask
    )


def ghost_batch_norm(
    x, scale=None, bias=None, *, size, axis=-1, epsilon=1e-5, mask=None
):
    """Batch norm in each run of `size` consecutive examples (Hoffer et al. 2017)."""
    x = _exact(x)
    features = _axes(axis, x.ndim)
    if x.shape[0] % size:
        raise ValueError(f"{x.shape[0]} examples do not form runs of {size}")

    def ghost(i):
        return i[0] // size, *_pick(i, features)

    return _normalize(x, ghost, scale, bias, features, epsilon, mask)


def by_running(x, scale, bias, stats, axis, epsilon, mask=None):
    """Batch norm at evaluation."""
    x = _exact(x)
    features = _axes(axis, x.ndim)
    y = np.zeros(x.shape)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask) != 0, x.shape)
    mean, var = _exact(stats["mean"]), _exact(stats["var"])
    for i in np.ndindex(x.shape):
        if valid[i]:
            f = _pick(i, features)
            z = (x[i] - mean[f]) / np.sqrt(var[f] + epsilon)
            z = z if scale is None else z * _at(_exact(scale), i, features)
            y[i] = z if bias is None else z + _at(_exact(bias), i, features)
    return y


def running(stats, batch, *, momentum, unbiased=False):
    """The running statistics after one more batch, as a new dict."""
    mean, var, size = _triple(batch)
    new: dict[str, Any] = {name: np.array(_exact(v)) for name, v in stats.items()}
    new["mean"] = new["mean"].astype(np.result_type(new["mean"], mean))
    if "count" in new:
        new["count"] = new["count"].astype(np.int64)
    features = list(np.ndindex(mean.shape))
    finite = np.isfinite(mean) & np.isfinite(var)
    # One bad feature means a bad step, whose other features are not to be trusted.
    if any(size[f] >= 1 and not finite[f] for f in features):
        return new
    for f in features:
        n = size[f]
        if n < 2:
            continue
        keep = momentum if momentum is not None else 0.0
        if momentum is None:
            keep = new["count"][f] / (new["count"][f] + 1)
            new["count"][f] += 1
        seen = var[f] * n / (n - 1) if unbiased else var[f]
        new["mean"][f] = keep * new["mean"][f] + (1 - keep) * mean[f]
        new["var"][f] = keep * new["var"][f] + (1 - keep) * seen
    return new


@np.errstate(all="ignore")  # NaN and inf in, NaN out: no news
def pooled(moments):
    """Moments of the union of disjoint sets, given the moments of each."""
    sets = [_triple(m) for m in moments]
    mean = np.zeros_like(np.stack([s.mean for s in sets])[0])
    var = np.zeros(mean.shape)
    size = np.zeros(mean.shape, np.int64)
    for f in np.ndindex(mean.shape):
        # An empty set has no mean: whatever stands in its place must not count.
        parts = [(s.mean[f], s.var[f], s.size[f]) for s in sets if s.size[f] > 0]
        if not parts:
            continue
        total = sum(n for _, _, n in parts)
        centre = sum(n * m for m, _, n in parts) / total
        size[f], mean[f] = total, centre
        var[f] = sum(n * (v + abs(m - centre) ** 2) for m, v, n in parts) / total
    return Moments(mean, var, size)


def gradient(f, args, index, cotangent, step=1e-5):
    """Derivative of sum(cotangent * f(*args)) by each element of args[index].

    For a complex argument: d/dre - i d/dim of the sum's real part, as JAX defines it.
    Differences for f in float64: only args[index] is converted here.
    """
    x, cotangent = _exact(args[index]), _exact(cotangent)
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        out[i] = np.sum(cotangent * _partial(f, args, index, i, 1, step)).real
        if np.iscomplexobj(x):
            slope = _partial(f, args, index, i, 1j, step)
            out[i] -= 1j * np.sum(cotangent * slope).real
    return out


def jvp(f, args, tangents, step=1e-5):
    """Derivative of f along `tangents`; an argument whose tangent is None stays."""

    def along(t):
        pairs = zip(args, tangents, strict=True)
        return _exact(
            f(*(a if d is None else _exact(a) + t * _exact(d) for a, d in pairs))
        )

    return _derivative(along, step)


def _partial(f, args, index, where, unit, step):
    x = _exact(args[index])
    # A step lost in the rounding of a large element would measure nothing.
    if np.isfinite(x[where]):
        step = max(step, 1e-10 * float(np.abs(x[where])))

    def along(t):
        moved = x.copy()
        moved[where] += t * unit
        return _exact(f(*args[:index], moved, *args[index + 1 :]))

    return _derivative(along, step)


def _derivative(along, step):
    """Slope of `along` at 0: central differences, the h^2 error extrapolated away."""
    # With a power of two, x + h is nearly always exact.
    h = 2.0 ** round(math.log2(step))
    wide = (along(h) - along(-h)) / (2 * h)
    narrow = (along(h / 2) - along(-h / 2)) / h
    return (4 * narrow - wide) / 3


@np.errstate(all="ignore")  # as above
def _normalize(x, statistic_of, scale, bias, features, epsilon, mask, centred=True):
    """Normalize; `statistic_of` names the statistics that indices belong to."""
    scale, bias = _parameter(scale, x, features), _parameter(bias, x, features)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask) != 0, x.shape)
    given = [a for a in (x, scale, bias) if a is not None]
    y = np.zeros(x.shape, np.result_type(*given))
    mean, var = np.zeros_like(x), np.zeros(x.shape)
    size = np.zeros(x.shape, np.int64)
    for every in _members(x.shape, statistic_of):
        some = tuple(a[valid[every]] for a in every)
        m, v = _mean_and_variance(x[some], centred)
        mean[every], var[every], size[every] = m, v, len(some[0])
        z = (x[some] - m) / np.sqrt(v + epsilon)
        z = z if scale is None else z * _at(scale, some, features)
        y[some] = z if bias is None else z + _at(bias, some, features)
    return Result(y, mean, var, size)


def _members(shape, statistic_of):
    """For each statistic the indices of its elements."""
    indices = np.indices(shape).reshape(len(shape), -1)
    names = np.reshape(statistic_of(tuple(indices)), (-1, indices.shape[1]))
    _, which = np.unique(names, axis=1, return_inverse=True)
    order = np.argsort(which, kind="stable")
    for own in np.split(order, np.cumsum(np.bincount(which))[:-1]):
        yield tuple(indices[:, own])


def _mean_and_variance(values, centred):
    if len(values) == 0:
        return 0.0, 0.0
    mean = np.sum(values) / len(values) if centred else 0.0
    return mean, np.sum(np.abs(values - mean) ** 2) / len(values)


def _parameter(value, x, features):
    """The parameter, checked: an index into a wrong shape could pass unnoticed."""
    if value is None:
        return None
    value, shape = _exact(value), _pick(x.shape, features)
    if value.shape not in (shape, x.shape[:1] + shape):
        raise ValueError(f"parameter of shape {value.shape} where {shape} is due")
    return value


def _at(parameter, i, features):
    """The parameter's elements for indices `i` of x, of the example's own if it has."""
    place = _pick(i, features)
    return parameter[place if parameter.ndim == len(place) else (i[0], *place)]


def _triple(moments):
    mean, var, size = moments
    mean = _exact(mean)
    var = np.broadcast_to(_exact(var), mean.shape)
    return Moments(mean, var, np.broadcast_to(np.asarray(size, np.int64), mean.shape))


def _exact(a):
    a = np.asarray(a)
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def _axes(axis, ndim):
    axes = (axis,) if np.ndim(axis) == 0 else axis
    return tuple(sorted({range(ndim)[a] for a in axes}))


def _others(axis, ndim):
    return tuple(a for a in range(ndim) if a not in _axes(axis, ndim))


def _pick(i, axes):
    return tuple(i[a] for a in axes)
