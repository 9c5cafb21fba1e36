"""Standardization of inputs: the moments of a data set or stream, and their use."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm._arguments import as_feature_shape, as_integers
from jaxnorm._axes import Axes, Shape
from jaxnorm._dtypes import as_floating, at_least_float32, promote, widened
from jaxnorm._exact import overflow_as_nan
from jaxnorm._moments import Moments, like_moments, moved, union
from jaxnorm._reduce import moments
from jaxnorm._sharding import automatically, sharded_as
from jaxnorm._standardize import standardize
from jaxnorm._working import aligned, as_mask

MAX_SIZE = 2**31 - 1  # moments are taken of at most so many elements at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Standardizer:
    """Moments of each feature of a data set, to standardize it with and to undo that.

        x = x.reshape(-1, features)
        y = (x - x.mean(0)) / x.std(0)

    but of all data seen so far: in one array (`fit`), in batches (`init` and `update`)
    or in parts (`merge`). However the data is split, masked or spread over devices, the
    moments are those of the whole, pooled by the numbers of elements (Chan, Golub and
    LeVeque, 1983). A frozen pytree of six arrays of the features' shape: a carry of
    `lax.scan`, to be donated or not, an entry of a checkpoint, a constant of a model.

    Data that float32 has too few digits for is read as the sum of two numbers in
    float32, 48 bits in all: integers of 32 bits and more, and without
    `jax_enable_x64` also float64 and integers of 64 bits, as NumPy arrays or lists.
    What is passed to a function under `jax.jit` is rounded to float32 before.

    A feature is constant if its deviation is at most the spacing of the numbers it
    consists of: 0 but for rounding. `apply` maps it to 0, also values never seen in it,
    and `invert` gives back the constant. A feature of which nothing has been seen is
    left as it is by both. NaN and infinity in the data make the moments of their
    feature NaN: mask them, as with `mask=~jnp.isnan(x)`.

    Attributes:
        mean, var: of each feature, the variance biased; at least float32, and 0 where
            nothing has been seen.
        residue: what rounding to its dtype has cut off the mean.
        spacing: of the numbers that the feature consists of: `eps * abs(mean)`, with
            the eps of float32 or float64, or 2**-46 for the sum of two in float32.
        size_high, size_low: number of elements seen of each feature,
            `size_high * 2**32 + size_low`, both in uint32.
        axis: the feature axis, or axes; all others are reduced. Negative ones also fit
            arrays of another rank, such as one example. Static under `jax.jit`.

    Source: Chan, Golub and LeVeque, 1983.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 10.0, 7.0], [3.0, 30.0, 7.0]])
    >>> inputs = jaxnorm.Standardizer.fit(x)
    >>> print(inputs.apply(x))
    [[-1. -1.  0.]
     [ 1.  1.  0.]]
    >>> print(inputs.invert(inputs.apply(x)))
    [[ 1. 10.  7.]
     [ 3. 30.  7.]]
    """

    mean: Array
    var: Array
    residue: Array
    spacing: Array
    size_high: Array
    size_low: Array
    axis: int | tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        feature_shape: int | tuple[int, ...],
        *,
        axis: int | Sequence[int] = -1,
        dtype: DTypeLike = jnp.float32,
    ) -> Self:
        """The moments of no data, to `update` with batches.

            mean, var, size = 0, 0, 0

        Args:
            feature_shape: number of features, or the shape of several feature axes.
            axis: the feature axis, or axes, in ascending order.
            dtype: of the moments, at least float32; wider data widens them later.

        Returns:
            A Standardizer that leaves everything as it is.

        Raises:
            ValueError, TypeError: for a shape, an axis or a dtype that is none, a dtype
                that is not real, and float64 without `jax_enable_x64`.

        >>> import jax.numpy as jnp, jaxnorm
        >>> inputs = jaxnorm.Standardizer.init(2)
        >>> for batch in (jnp.array([[1.0, 5.0]]), jnp.array([[2.0, 7.0], [3.0, 9.0]])):
        ...     inputs = inputs.update(batch)
        >>> print(inputs.mean, inputs.size)
        [2. 7.] [3 3]
        """
        shape = as_feature_shape("feature_shape", feature_shape)
        static = as_integers("axis", axis)
        wide = at_least_float32(_as_dtype(dtype))
        # Each an array of its own, so that all can be donated.
        mean, var, residue, spacing = (jnp.zeros(shape, wide) for _ in range(4))
        high, low = (jnp.zeros(shape, jnp.uint32) for _ in range(2))
        return cls(
            mean=mean,
            var=var,
            residue=residue,
            spacing=spacing,
            size_high=high,
            size_low=low,
            axis=static,
        )

    @classmethod
    def fit(
        cls,
        x: ArrayLike,
        *,
        axis: int | Sequence[int] = -1,
        mask: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of `x`, over every axis but `axis`.

            others = tuple(a for a in range(x.ndim) if a != axis)
            mean, var = x.mean(others, where=mask), x.var(others, where=mask)

        Args:
            x: array of real numbers, or nested lists of them.
            axis: the feature axis, or axes; () for one mean and variance of all of x.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
                nothing, and may be NaN.
            axis_name: mapped axis, or several, over whose devices `x` is split; each of
                them gets the moments of all.

        Returns:
            A Standardizer; that of no data where nothing is valid.

        Raises:
            ValueError, TypeError: while tracing, for shapes, dtypes or axes that do not
                fit, and an `axis_name` that is not bound.

        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, jnp.nan], [3.0, 5.0]])
        >>> inputs = jaxnorm.Standardizer.fit(x, mask=~jnp.isnan(x))
        >>> print(inputs.mean, inputs.size)
        [2. 5.] [2 1]
        """
        return cls._fit(_as_data(x), as_integers("axis", axis), mask, axis_name)

    @classmethod
    def _fit(cls, data: "_Data", axis: Any, mask: Any, axis_name: Any) -> Self:
        axes = Axes.keep(data.high.shape, axis)
        total = axes.size * devices.group_size(devices.as_axis_name(axis_name), None)
        if isinstance(total, int) and total > MAX_SIZE:  # a symbolic one is not known
            parts = _split(data, axes, as_mask(mask, axes.shape))
            one, other = (cls._fit(v, axis, m, axis_name) for v, m in parts)
            return one.merge(other)
        return cls(**_fitted(data, axes, mask, axis_name), axis=axis)

    def update(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of all data seen so far and of `x`.

            self.merge(Standardizer.fit(x, axis=self.axis, mask=mask, axis_name=...))

        Args:
            x, mask, axis_name: as in `fit`. With `axis_name`, self is the same on all
                devices, and the result is too.

        Returns:
            A new Standardizer.

        Raises:
            ValueError, TypeError: while tracing, as `fit` does, and for features of
                another shape than those of self.
        """
        data = _as_data(x)
        self._axes(data.high.shape)
        return self.merge(self._fit(data, self.axis, mask, axis_name))

    @sharded_as("self")
    def merge(self, other: "Standardizer") -> Self:
        """The moments of the union of two disjoint parts of the data.

            size = self.size + other.size
            apart = other.mean - self.mean
            mean = self.mean + apart * other.size / size
            spread = self.var * self.size + other.var * other.size
            var = (spread + apart**2 * self.size * other.size / size) / size

        `functools.reduce(Standardizer.merge, parts)` merges many.

        Args:
            other: of as many features; its axis may differ from that of self.

        Returns:
            A new Standardizer with the axis of self, in the wider of their dtypes.

        Raises:
            ValueError, TypeError: while tracing, if other is no Standardizer, or one of
                features of another shape.
        """
        if not isinstance(other, Standardizer):
            raise TypeError(
                f"merge takes another Standardizer, got {type(other).__name__}: pass a "
                "batch of data to update"
            )
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"merge takes statistics of the same features, got those of shapes "
                f"{self.mean.shape} and {other.mean.shape}: fit both parts with the "
                "same feature axis, to the same features"
            )
        return dataclasses.replace(self, **_union(self, other))

    def apply(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """Standardizes each feature of `x`.

            y = (x - mean) / deviation, and 0 for constant features

        Args:
            x: array with these features on `axis`, of any other shape.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes, NaN or not,
                comes out as 0, which is the mean of the feature.
            dtype: of y; by default that of x, float32 for integers and for what is read
                as two numbers. Computed in at least float32, and rounded once.

        Returns:
            y, of the shape of x; the moments get no gradient.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.
        """
        data = _as_data(x)
        dtype = data.high.dtype if dtype is None else _as_dtype(dtype)
        given = self, data, mask, dtype
        return automatically(Standardizer._applied, *given, like=data.high)

    def _applied(self, data: "_Data", mask: Any, dtype: jnp.dtype) -> Array:
        axes, *values = self._read(data.high, dtype)
        mean, deviation, residue = (v.reshape(axes.param_shape()) for v in values)
        rstd = _reciprocal(deviation)
        if data.low is None:
            y = widened(data.high, mean.dtype)
        else:
            y = data.high.astype(mean.dtype) - mean
            y = y + (data.low.astype(mean.dtype) - residue)
            mean, residue = jnp.zeros_like(mean), 0.0
        return standardize(y, mean, rstd, axes, residue=residue, mask=mask, dtype=dtype)

    def invert(self, y: ArrayLike, *, dtype: DTypeLike | None = None) -> Array:
        """The `x` that `apply` maps to `y`; of constant features, the constant.

            x = y * deviation + mean

        Args:
            y: array with these features on `axis`, of any other shape.
            dtype: of x; by default the wider of those of y and the moments, so at least
                float32: half precision has too few digits for data far from 0. Computed
                in at least float32, and rounded once.

        Returns:
            x, of the shape of y; the moments get no gradient.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.

        >>> import jax.numpy as jnp, jaxnorm
        >>> inputs = jaxnorm.Standardizer.fit(jnp.array([[999900.0], [1000100.0]]))
        >>> print(inputs.invert(jnp.ones(1, jnp.bfloat16)) == 1000100)
        [ True]
        """
        data = _as_data(y)
        y = data.high if data.low is None else data.high + data.low
        if dtype is None:
            dtype = promote(y.dtype, self.mean.dtype)
        given = self, y, _as_dtype(dtype)
        return automatically(Standardizer._inverted, *given, like=y)

    def _inverted(self, y: Array, dtype: jnp.dtype) -> Array:
        axes, *values = self._read(y, dtype)
        mean, deviation, residue = (v.reshape(axes.param_shape()) for v in values)
        x = (y.astype(mean.dtype) * deviation + residue) + mean
        return x.astype(dtype)

    @property
    def size(self) -> Array | np.ndarray:
        """The number of elements seen of each feature.

        As int64 of NumPy and exact; while tracing in the dtype of the moments, which is
        rounded from 2**24 on in float32.
        """
        if isinstance(self.size_low, Tracer):
            return self._weight(self.var.dtype)
        high, low = (np.asarray(v, np.int64) for v in (self.size_high, self.size_low))
        return high * 2**32 + low

    @property
    def deviation(self) -> Array:
        """`sqrt(var)`: 0 for constant features, 1 where nothing has been seen."""
        deviation = jnp.sqrt(self.var)
        deviation = jnp.where(deviation <= self.spacing, 0, deviation)
        return jnp.where((self.size_high | self.size_low) == 0, 1, deviation)

    def _weight(self, dtype: DTypeLike) -> Array:
        """The size, rounded to a floating point number."""
        high, low = (v.astype(dtype) for v in (self.size_high, self.size_low))
        return high * 2.0**32 + low

    def _read(self, x: Array, dtype: DTypeLike) -> tuple[Axes, Array, Array, Array]:
        """Axes of `x`, and mean, deviation and residue in a dtype that holds all."""
        # Moments of data are no parameters, also where a model holds them.
        stats = lax.stop_gradient(self)
        wide = promote(x.dtype, dtype, stats.mean.dtype)
        values = (stats.mean, stats.deviation, stats.residue)
        mean, deviation, residue = (v.astype(wide) for v in values)
        return self._axes(x.shape), mean, deviation, residue

    def _axes(self, shape: Shape) -> Axes:
        """Raises ValueError unless an array of `shape` has these features."""
        axes = Axes.keep(shape, self.axis)
        if axes.feature_shape != self.mean.shape:
            raise ValueError(
                f"the statistics are of features of shape {self.mean.shape}, but "
                f"axis={self.axis} of an input of shape {shape} holds features of "
                f"shape {axes.feature_shape}: pass data with the same features, or fit "
                "with the axis that they are on"
            )
        return axes


class _Data(NamedTuple):
    """An array, or the sum of two where float32 has too few digits for one."""

    high: Array
    low: Array | None = None


def _as_dtype(dtype: DTypeLike) -> jnp.dtype:
    """`dtype`; raises TypeError unless it is one of real floating point in use."""
    try:
        known = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.floating):
        raise TypeError(
            f"dtype must be one of real floating point, such as float32, got {dtype!r}"
        )
    if known == jnp.float64 and _longest() < known.itemsize:
        raise TypeError(
            f"dtype={known} needs jax_enable_x64, without which JAX has no numbers of "
            "64 bits: set it, or pass float32"
        )
    return known


def _as_data(x: Any) -> _Data:
    """`x` as an array of real floating point numbers, or as the sum of two."""
    if isinstance(x, _Data):
        return x
    if isinstance(x, Iterator):
        raise TypeError(
            f"the data must be one array, got an iterator, {type(x).__name__}: start "
            "from Standardizer.init(num_features) and call update with each batch"
        )
    x = _as_array(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"Standardizer takes real data, got {x.dtype}: make the real and imaginary "
            "parts features of their own, jnp.stack([x.real, x.imag], -1)"
        )
    if isinstance(x, np.ndarray) and x.itemsize > _longest():
        return _halves_of_floats(x.astype(np.float64))
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.itemsize < 4:
        return _Data(as_floating(x))
    return _halves_of_integers(x) if x.itemsize == 4 else _Data(x.astype(jnp.float64))


def _as_array(x: Any) -> Array | np.ndarray:
    """`x` as an array of numbers, of NumPy if none of it is one of JAX."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            "the data must be one array of real numbers, got a masked array of NumPy: "
            "pass x.data, and mask=~np.ma.getmaskarray(x)"
        )
    try:
        of_jax = any(isinstance(v, jax.Array) for v in jax.tree.leaves(x))
        array = jnp.asarray(x) if of_jax else np.asarray(x)
    except (TypeError, ValueError):
        array = None
    if array is None or not (
        array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.number)
    ):
        kind = "" if array is None else f", which has dtype {array.dtype}"
        raise TypeError(
            f"the data must be one array of real numbers, got {type(x).__name__}{kind}"
        )
    return array


def _longest() -> int:
    """The number of bytes of the widest numbers that JAX keeps."""
    return jax.dtypes.canonicalize_dtype(np.float64).itemsize


def _halves_of_floats(x: np.ndarray) -> _Data:
    """Numbers in float64 as their rounding to float32, and what that cut off."""
    with np.errstate(over="ignore", invalid="ignore"):
        high = x.astype(np.float32)
        low = np.where(np.isfinite(high), x - high, 0).astype(np.float32)
    return _Data(jnp.asarray(high), jnp.asarray(low))


def _halves_of_integers(x: Array) -> _Data:
    """Integers of 32 bits, as `_halves_of_floats`, of two exact halves of the bits."""
    high = 2.0**16 * (x >> 16).astype(jnp.float32)
    low = (x & 0xFFFF).astype(jnp.float32)
    both = high + low
    return _Data(both, low - (both - high))


def _fitted(
    data: _Data, axes: Axes, mask: Any, axis_name: str | Sequence[str] | None
) -> dict[str, Array]:
    """The arrays of a Standardizer of no more elements than can be taken at once."""

    def whole(x, mask):
        return devices.sync(moments(x, axes, mask=mask), axis_name)

    def fitted(data, mask):
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
    return _arrays(mean, var, residue, eps * abs(mean), jnp.zeros_like(size), size)


def _arrays(mean, var, residue, spacing, high, low) -> dict[str, Array]:
    return {
        "mean": mean,
        "var": var,
        "residue": residue,
        "spacing": spacing,
        "size_high": high.astype(jnp.uint32),
        "size_low": low.astype(jnp.uint32),
    }


def _split(
    data: _Data, axes: Axes, mask: Array | None
) -> Iterator[tuple[_Data, Array | None]]:
    """Data and mask, in two parts along the longest of the axes that are reduced."""
    along = max(axes.reduce, key=lambda a: axes.shape[a])
    middle = axes.shape[along] // 2
    mask = None if mask is None else aligned(mask, axes.shape)

    def part(v, start, stop):
        whole = v.shape[along] == 1
        return v if whole else lax.slice_in_dim(v, start, stop, axis=along)

    for cut in ((0, middle), (middle, axes.shape[along])):
        low = None if data.low is None else part(data.low, *cut)
        yield (
            _Data(part(data.high, *cut), low),
            None if mask is None else part(mask, *cut),
        )


def _reciprocal(deviation: Array) -> Array:
    """`1 / deviation`, and 0 of 0."""
    usable = jnp.where(deviation == 0, 1, overflow_as_nan(deviation))
    return jnp.where(deviation == 0, 0, 1 / usable)


@functools.partial(jax.jit, inline=True)
def _union(a: Standardizer, b: Standardizer) -> dict[str, Array]:
    """The pooled arrays; compiled once, also where nothing around it is."""
    dtype = promote(a.mean.dtype, b.mean.dtype)
    both = ((v.mean, v.var, v._weight(dtype), v.residue) for v in (a, b))
    m = union(*(Moments(*(u.astype(dtype) for u in values)) for values in both))
    spacing = jnp.maximum(*(v.spacing.astype(dtype) for v in (a, b)))
    low = a.size_low + b.size_low
    carry = (low < a.size_low).astype(low.dtype)
    high = a.size_high + b.size_high + carry
    return _arrays(m.mean, m.var, m.residue, spacing, high, low)
