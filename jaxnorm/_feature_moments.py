"""What are the moments of each feature of a data set, as six arrays?"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes, Shape
from jaxnorm._dtypes import promote, widened
from jaxnorm._exact import overflow_as_nan
from jaxnorm._moments import Moments, like_moments, moved, union
from jaxnorm._reduce import moments
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
    spacing: Array
    size_high: Array
    size_low: Array
    axis: int | tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> Array | np.ndarray:
        """The number of elements seen of each feature.

        As int64 of NumPy and exact; while tracing in the dtype of the moments, which is
        rounded from 2**24 on in float32.
        """
        if isinstance(self.size_low, Tracer):
            return self.rounded_size(self.var.dtype)
        high, low = (np.asarray(v, np.int64) for v in (self.size_high, self.size_low))
        return high * 2**32 + low

    @property
    def deviation(self) -> Array:
        """`sqrt(var)`: 0 for constant features, 1 where nothing has been seen."""
        deviation = jnp.sqrt(self.var)
        deviation = jnp.where(deviation <= self.spacing, 0, deviation)
        return jnp.where((self.size_high | self.size_low) == 0, 1, deviation)

    def rounded_size(self, dtype: DTypeLike) -> Array:
        """The size as a floating point number."""
        high, low = (v.astype(dtype) for v in (self.size_high, self.size_low))
        return high * 2.0**32 + low

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
    data: Data,
    axes: Axes,
    mask: ArrayLike | None,
    axis_name: str | Sequence[str] | None,
) -> dict[str, Array]:
    """The six arrays for data of no more elements than can be taken at once."""

    def whole(x: Array, mask: Any) -> Moments:
        return devices.sync(moments(x, axes, mask=mask), axis_name)

    def fitted(data: Data, mask: Any) -> Moments:
        m = whole(data.high, mask)
        if data.low is None:
            return m
        pivot = lax.stop_gradient(m.mean)
        return moved(whole((data.high - pivot) + data.low, mask), pivot)

    like = like_moments(data.high, axes)
    m = automatically(fitted, data, mask, like=like)
    eps = jnp.finfo(m.mean.dtype).eps ** (1 if data.low is None else 2)
    size = jnp.asarray(m.size, jnp.int32)
    mean, var, residue, size = (
        jnp.broadcast_to(v, m.var.shape).reshape(axes.feature_shape)
        for v in (m.mean, m.var, m.residue, size)
    )
    spacing, high = eps * abs(mean), jnp.zeros_like(size)
    return _arrays(Moments(mean, var, size, residue), spacing, high, size)


@functools.partial(jax.jit, inline=True)
def union_of(a: FeatureMoments, b: FeatureMoments) -> dict[str, Array]:
    """The six arrays for two disjoint parts of the data together.

    Compiled once, also where nothing around it is.
    """
    dtype = promote(a.mean.dtype, b.mean.dtype)
    both = ((v.mean, v.var, v.rounded_size(dtype), v.residue) for v in (a, b))
    m = union(*(Moments(*(u.astype(dtype) for u in values)) for values in both))
    spacing = jnp.maximum(*(v.spacing.astype(dtype) for v in (a, b)))
    low = a.size_low + b.size_low
    carry = (low < a.size_low).astype(low.dtype)
    high = a.size_high + b.size_high + carry
    return _arrays(m, spacing, high, low)


def _arrays(m: Moments, spacing: Array, high: Array, low: Array) -> dict[str, Array]:
    return {
        "mean": m.mean,
        "var": m.var,
        "residue": m.residue,
        "spacing": spacing,
        "size_high": high.astype(jnp.uint32),
        "size_low": low.astype(jnp.uint32),
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
