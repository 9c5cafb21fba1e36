"""What are the moments of each feature of a data set, as seven arrays?"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes, Shape
from jaxnorm._dtypes import promote, widened
from jaxnorm._exact import (
    Pair,
    add_pairs,
    not_zero,
    overflow_as_nan,
    shrink_pair,
    split_size,
    two_sum,
)
from jaxnorm._moments import Moments, like_moments, moved
from jaxnorm._reduce import moments, weighted_moments
from jaxnorm._samples import Sample, pieces_of
from jaxnorm._sharding import automatically
from jaxnorm._standardize import standardize
from jaxnorm._wide_data import Data


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FeatureMoments:
    """Mean, variance and size of each feature, and the axis that the features are on.

    `Standardizer` says what each array holds.
    """

    mean: Array
    var: Array
    residue: Array
    var_residue: Array
    spacing: Array
    size_high: Array
    size_low: Array
    axis: int | tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> Array | np.ndarray:
        """The number of elements seen of each feature, or the sum of their weights.

        As float64 of NumPy; while tracing in the dtype of the moments, which is rounded
        from 2**24 on in float32.
        """
        if isinstance(self.size_high, Tracer):
            return self.size_high
        return np.asarray(self.size_high, np.float64) + np.asarray(self.size_low)

    @property
    def deviation(self) -> Array:
        """`sqrt(var)`: 0 for constant features, 1 where nothing has been seen."""
        deviation = jnp.sqrt(self.var)
        deviation = jnp.where(deviation <= self.spacing, 0, deviation)
        return jnp.where(self.size_high == 0, 1, deviation)

    def axes(self, shape: Shape) -> Axes:
        """The axes of an array of `shape`; raises ValueError unless it has these
        features."""
        axes = Axes.keep(shape, self.axis)
        if axes.feature_shape != self.mean.shape:
            raise ValueError(
                f"the statistics are of features of shape {self.mean.shape}, but "
                f"axis={self.axis} of an input of shape {shape} holds features of "
                f"shape {axes.feature_shape}: pass data with the same features, or fit "
                "with the axis that they are on"
            )
        return axes


def moments_of(
    samples: Sequence[Sample], axis_name: str | Sequence[str] | None
) -> list[list[dict[str, Array]]]:
    """The arrays for each part of each of `samples`, which are several parts where
    one is too large; by one collective for all of them."""
    axis_name = devices.as_axis_name(axis_name)
    num_devices = devices.group_size(axis_name, None)
    parts = [[*pieces_of(sample, num_devices)] for sample in samples]
    pieces = [piece for part in parts for piece in part]
    like = [like_moments(p.data.high, p.axes) for p in pieces]
    taken = automatically(
        lambda pieces: _synced([*map(_moments_of_one, pieces)], axis_name),
        pieces,
        like=like,
    )
    found = iter(map(_feature_arrays, pieces, taken))
    return [[next(found) for _ in part] for part in parts]


def _moments_of_one(sample: Sample) -> Moments:
    def taken(x: Array) -> Moments:
        if sample.weights is None:
            return moments(x, sample.axes, mask=sample.mask)
        return weighted_moments(x, sample.weights, sample.axes)

    m = taken(sample.data.high)
    if sample.data.low is None:
        return m
    pivot = lax.stop_gradient(m.mean)
    return moved(taken((sample.data.high - pivot) + sample.data.low), pivot)


def _synced(parts: list[Moments], axis_name: Any) -> list[Moments]:
    """Each over all devices, joined to one vector for that."""
    if axis_name is None or not parts:
        return parts
    shapes = [m.var.shape for m in parts]
    flat = [
        [jnp.broadcast_to(jnp.asarray(v), shape).ravel() for v in m]
        for m, shape in zip(parts, shapes, strict=True)
    ]
    whole = devices.sync(Moments(*map(_joined, zip(*flat, strict=True))), axis_name)
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    each = zip(*(jnp.split(v, ends) for v in whole), strict=True)
    return [_shaped_as(m, *values) for m, values in zip(parts, each, strict=True)]


def _shaped_as(
    m: Moments, mean: Array, var: Array, size: Array, residue: Array
) -> Moments:
    """Moments in the shape and dtype of `m`."""
    mean, var, residue = (
        v.reshape(m.var.shape).astype(m.mean.dtype) for v in (mean, var, residue)
    )
    return Moments(mean, var, size.reshape(m.var.shape), residue)


def _joined(vectors: Sequence[Array]) -> Array:
    dtype = promote(*(v.dtype for v in vectors))
    return jnp.concatenate([v.astype(dtype) for v in vectors])


def _feature_arrays(sample: Sample, m: Moments) -> dict[str, Array]:
    """The arrays for the moments of a sample."""
    dtype, size = m.mean.dtype, jnp.asarray(m.size)
    mean, var, residue, high, low = (
        jnp.broadcast_to(v, m.var.shape).reshape(sample.axes.feature_shape)
        for v in (m.mean, m.var, m.residue, *_as_pair(size, dtype))
    )
    eps = jnp.finfo(dtype).eps ** (1 if sample.data.low is None else 2)
    rest = jnp.zeros_like(var)
    return _arrays((mean, residue), (var, rest), (high, low), eps * abs(mean))


def _as_pair(size: Array, dtype: DTypeLike) -> Pair:
    """`size` as the sum of two floating point numbers."""
    high, low = (v.astype(dtype) for v in split_size(size))
    if jnp.issubdtype(size.dtype, jnp.floating):
        return high, low
    return two_sum(2.0**16 * high, low)


@functools.partial(jax.jit, inline=True)
def union_of(a: FeatureMoments, b: FeatureMoments) -> dict[str, Array]:
    """The arrays for two disjoint parts of the data together.

    As `pool` of the two, without a limit to the sizes; and without a pivot, so that the
    variance is right also where it is below the rounding of the means. Compiled once,
    also where nothing around it is.
    """
    dtype = promote(a.mean.dtype, b.mean.dtype)
    b = dataclasses.replace(b, axis=a.axis)
    a, b = (jax.tree.map(lambda v: v.astype(dtype), m) for m in (a, b))
    less = a.size_high < b.size_high
    near = jax.tree.map(lambda u, v: jnp.where(less, v, u), a, b)
    far = jax.tree.map(lambda u, v: jnp.where(less, u, v), a, b)
    size = add_pairs((near.size_high, near.size_low), (far.size_high, far.size_low))
    weight = far.size_high / not_zero(size[0])
    # Relative to the larger set: weights do not add up to 1 to the last bit, which
    # would add up over many batches.
    offset = (far.mean - near.mean) + (far.residue - near.residue)
    spread = (far.var - near.var) + (far.var_residue - near.var_residue)
    shift = weight * offset
    change = weight * (spread + (1 - weight) * jnp.square(offset))
    shift, change = (jnp.where(weight != 0, v, 0) for v in (shift, change))
    mean = two_sum(near.mean, near.residue + shift)
    var = add_pairs((near.var, near.var_residue), (change, jnp.zeros_like(change)))
    return _arrays(mean, var, size, jnp.maximum(near.spacing, far.spacing))


def faded(m: FeatureMoments, seen: FeatureMoments, decay: Any) -> dict[str, Array]:
    """The arrays of `m` that weigh it by `decay` in the features that `seen` holds
    something of."""
    dtype = m.size_high.dtype
    share = jnp.where(seen.size_high == 0, 0, jnp.asarray(1 - decay, dtype))
    high, low = shrink_pair((m.size_high, m.size_low), share)
    # With its weight, as numbers far from 0 that are forgotten are no reason to take
    # those near 0 for constant.
    spacing = jnp.where(share == 1, 0, (1 - share) * m.spacing)
    return {"spacing": spacing, "size_high": high, "size_low": low}


def _arrays(mean: Pair, var: Pair, size: Pair, spacing: Array) -> dict[str, Array]:
    """All by their names; of each pair the second is what rounding cut off."""
    return {
        "mean": mean[0],
        "var": var[0],
        "residue": mean[1],
        "var_residue": var[1],
        "spacing": spacing,
        "size_high": size[0],
        "size_low": size[1],
    }


def standardized(m: FeatureMoments, data: Data, mask: Any, dtype: jnp.dtype) -> Array:
    """`(data - mean) / deviation` in `dtype`, and 0 for constant features."""
    axes, mean, deviation, residue = _in_working_shape(m, data.high, dtype)
    rstd = _reciprocal(deviation)
    if data.low is None:
        y = widened(data.high, mean.dtype)
        return standardize(y, mean, rstd, axes, residue=residue, mask=mask, dtype=dtype)
    y = data.high.astype(mean.dtype) - mean
    y = y + (data.low.astype(mean.dtype) - residue)
    return standardize(y, jnp.zeros_like(mean), rstd, axes, mask=mask, dtype=dtype)


def restored(m: FeatureMoments, y: Array, dtype: jnp.dtype) -> Array:
    """`y * deviation + mean` in `dtype`."""
    _, mean, deviation, residue = _in_working_shape(m, y, dtype)
    x = (y.astype(mean.dtype) * deviation + residue) + mean
    return x.astype(dtype)


def _in_working_shape(
    m: FeatureMoments, x: Array, dtype: DTypeLike
) -> tuple[Axes, Array, Array, Array]:
    """Axes of `x`, and mean, deviation and residue as they broadcast to it, in a dtype
    that holds all."""
    # Moments of data are no parameters, also where a model holds them.
    m = lax.stop_gradient(m)
    axes, wide = m.axes(x.shape), promote(x.dtype, dtype, m.mean.dtype)
    mean, deviation, residue = (
        v.astype(wide).reshape(axes.param_shape())
        for v in (m.mean, m.deviation, m.residue)
    )
    return axes, mean, deviation, residue


def _reciprocal(deviation: Array) -> Array:
    """`1 / deviation`, and 0 of 0."""
    usable = jnp.where(deviation == 0, 1, overflow_as_nan(deviation))
    return jnp.where(deviation == 0, 0, 1 / usable)
