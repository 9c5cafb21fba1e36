"""Standardization of inputs: the moments of a data set or stream, and their use."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import devices
from jaxnorm.axes import Axes, Shape, keep
from jaxnorm.dtypes import as_floating, at_least_float32, promote, widened
from jaxnorm.moments import Moments, moments, pool
from jaxnorm.standardize import standardize

MAX_SIZE = 2**31 - 1  # sizes are int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Standardize:
    """Moments of each feature of a data set, to standardize it with and to undo that.

        x = x.reshape(-1, features)
        y = (x - x.mean(0)) / x.std(0)

    but of all data seen so far: in one array (`fit`), in batches (`init` and `update`)
    or in parts (`merge`). However the data is split, masked or spread over devices, the
    moments are those of the whole, pooled by the numbers of elements (Chan, Golub and
    LeVeque, 1983). A frozen pytree of four arrays: a carry of `lax.scan`, an entry of a
    checkpoint, a constant of a model.

    A feature is constant if its deviation is at most `finfo(dtype).eps * abs(mean)`,
    the spacing of the numbers it consists of: 0 but for rounding. `apply` maps it to 0,
    also values never seen in it, and `invert` gives back the constant. A feature of
    which nothing has been seen is left as it is by both. NaN and infinity in the data
    make the moments of their feature NaN: mask them, as with `mask=~jnp.isnan(x)`.

    Attributes:
        mean, var: of each feature, the variance biased; at least float32, and 0 where
            nothing has been seen.
        size: number of elements seen of each feature, in int32. Past 2**31 - 1 all
            moments of the feature become NaN.
        residue: what rounding to its dtype has cut off the mean.
        axis: the feature axis, or axes; all others are reduced. Negative ones also fit
            arrays of another rank, such as one example. Static under `jax.jit`.

    Source: Chan, Golub and LeVeque, 1983.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 10.0, 7.0], [3.0, 30.0, 7.0]])
    >>> inputs = jaxnorm.Standardize.fit(x)
    >>> print(inputs.apply(x))
    [[-1. -1.  0.]
     [ 1.  1.  0.]]
    >>> print(inputs.invert(inputs.apply(x)))
    [[ 1. 10.  7.]
     [ 3. 30.  7.]]
    """

    mean: Array
    var: Array
    size: Array
    residue: Array
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

            mean, var, size, residue = 0, 0, 0, 0

        Args:
            feature_shape: number of features, or the shape of several feature axes.
            axis: the feature axis, or axes, in ascending order.
            dtype: of the moments, at least float32; wider data widens them later.

        Returns:
            A Standardize that leaves everything as it is.

        >>> import jax.numpy as jnp, jaxnorm
        >>> inputs = jaxnorm.Standardize.init(2)
        >>> for batch in (jnp.array([[1.0, 5.0]]), jnp.array([[2.0, 7.0], [3.0, 9.0]])):
        ...     inputs = inputs.update(batch)
        >>> print(inputs.mean, inputs.size)
        [2. 7.] [3 3]
        """
        zeros = jnp.zeros(feature_shape, at_least_float32(dtype))
        size = jnp.zeros(feature_shape, jnp.int32)
        return cls(mean=zeros, var=zeros, size=size, residue=zeros, axis=_static(axis))

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
            x: array of real numbers; integers are read as float32.
            axis: the feature axis, or axes; () for one mean and variance of all of x.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
                nothing, and may be NaN.
            axis_name: mapped axis, or several, over whose devices `x` is split; each of
                them gets the moments of all.

        Returns:
            A Standardize; that of no data where nothing is valid.

        Raises:
            ValueError, TypeError: while tracing, for shapes, dtypes or axes that do not
                fit, an `axis_name` that is not bound, and more than 2**31 - 1 elements
                of a feature at once.

        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, jnp.nan], [3.0, 5.0]])
        >>> inputs = jaxnorm.Standardize.fit(x, mask=~jnp.isnan(x))
        >>> print(inputs.mean, inputs.size)
        [2. 5.] [2 1]
        """
        x = _as_data(x)
        axes = keep(x.shape, _static(axis))
        _check_size(axes, axis_name)
        m = devices.sync(moments(x, axes, mask=mask), axis_name)
        mean, var, size, residue = (
            jnp.broadcast_to(v, m.var.shape).reshape(axes.feature_shape)
            for v in (m.mean, m.var, jnp.asarray(m.size, jnp.int32), m.residue)
        )
        return cls(mean=mean, var=var, size=size, residue=residue, axis=_static(axis))

    def update(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of all data seen so far and of `x`.

            self.merge(Standardize.fit(x, axis=self.axis, mask=mask, axis_name=...))

        Args:
            x, mask, axis_name: as in `fit`. With `axis_name`, self is the same on all
                devices, and the result is too.

        Returns:
            A new Standardize.

        Raises:
            ValueError, TypeError: while tracing, as `fit` does, and for features of
                another shape than those of self.
        """
        x = _as_data(x)
        self._axes(x.shape)
        return self.merge(
            type(self).fit(x, axis=self.axis, mask=mask, axis_name=axis_name)
        )

    def merge(self, other: "Standardize") -> Self:
        """The moments of the union of two disjoint parts of the data.

            size = self.size + other.size
            apart = other.mean - self.mean
            mean = self.mean + apart * other.size / size
            spread = self.var * self.size + other.var * other.size
            var = (spread + apart**2 * self.size * other.size / size) / size

        `functools.reduce(Standardize.merge, parts)` merges many.

        Args:
            other: of as many features; its axis may differ from that of self.

        Returns:
            A new Standardize with the axis of self, in the wider of their dtypes.

        Raises:
            ValueError, TypeError: while tracing, if other is no Standardize, or one of
                features of another shape.
        """
        if not isinstance(other, Standardize):
            raise TypeError(
                f"merge takes another Standardize, got {type(other).__name__}: pass a "
                "batch of data to update"
            )
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"merge takes statistics of the same features, got those of shapes "
                f"{self.mean.shape} and {other.mean.shape}: fit both parts with the "
                "same feature axis, to the same features"
            )
        return dataclasses.replace(self, **_union(self, other)._asdict())

    def apply(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> Array:
        """Standardizes each feature of `x`.

            y = (x - mean) / deviation, and 0 for constant features

        Args:
            x: array with these features on `axis`, of any other shape; integers are
                read as float32.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes, NaN or not,
                comes out as 0, which is the mean of the feature.

        Returns:
            y, of the shape and dtype of x; the moments get no gradient.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.
        """
        x = _as_data(x)
        axes, mean, deviation, residue = self._read(x)
        rstd = _reciprocal(deviation)
        return standardize(
            widened(x, mean.dtype),
            mean.reshape(axes.param_shape()),
            rstd.reshape(axes.param_shape()),
            axes,
            bias=-residue * rstd,
            mask=mask,
            dtype=x.dtype,
        )

    def invert(self, y: ArrayLike) -> Array:
        """The `x` that `apply` maps to `y`; of constant features, the constant.

            x = y * deviation + mean

        Args:
            y: array with these features on `axis`, of any other shape; integers are
                read as float32.

        Returns:
            x, of the shape and dtype of y; the moments get no gradient.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.
        """
        y = _as_data(y)
        axes, mean, deviation, _ = self._read(y)
        return standardize(
            widened(y, mean.dtype),
            jnp.zeros(axes.param_shape(), mean.dtype),
            deviation.reshape(axes.param_shape()),
            axes,
            bias=mean,
            dtype=y.dtype,
        )

    @property
    def deviation(self) -> Array:
        """`sqrt(var)`: 0 for constant features, 1 where nothing has been seen."""
        deviation = jnp.sqrt(self.var)
        spacing = jnp.finfo(self.mean.dtype).eps * abs(self.mean)
        deviation = jnp.where(deviation <= spacing, 0, deviation)
        return jnp.where(self.size == 0, 1, deviation)

    def _read(self, x: Array) -> tuple[Axes, Array, Array, Array]:
        """Axes of `x`, and mean, deviation and residue in a dtype that holds both."""
        # Moments of data are no parameters, also where a model holds them.
        stats = lax.stop_gradient(self)
        dtype = promote(x.dtype, stats.mean.dtype)
        values = (stats.mean, stats.deviation, stats.residue)
        mean, deviation, residue = (v.astype(dtype) for v in values)
        return self._axes(x.shape), mean, deviation, residue

    def _axes(self, shape: Shape) -> Axes:
        """Raises ValueError unless an array of `shape` has these features."""
        axes = keep(shape, self.axis)
        if axes.feature_shape != self.mean.shape:
            raise ValueError(
                f"the statistics are of features of shape {self.mean.shape}, but "
                f"axis={self.axis} of an input of shape {shape} holds features of "
                f"shape {axes.feature_shape}: pass data with the same features, or fit "
                "with the axis that they are on"
            )
        return axes


def _static(axis: int | Sequence[int]) -> int | tuple[int, ...]:
    """`axis` as a hashable value."""
    return tuple(axis) if isinstance(axis, Sequence) else axis


def _as_data(x: Any) -> Array:
    """`x` as an array of real floating point numbers."""
    if isinstance(x, Iterator):
        raise TypeError(
            f"the data must be one array, got an iterator, {type(x).__name__}: start "
            "from Standardize.init(num_features) and call update with each batch"
        )
    if isinstance(x, np.ndarray) and x.dtype in (np.int64, np.uint64):
        x = x.astype(np.float32)  # JAX would keep their low 32 bits only
    x = as_floating(x)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"Standardize takes real data, got {x.dtype}: make the real and imaginary "
            "parts features of their own, jnp.stack([x.real, x.imag], -1)"
        )
    return x


def _check_size(axes: Axes, axis_name: str | Sequence[str] | None) -> None:
    count = devices.group_size(devices.as_axis_name(axis_name), None)
    if axes.size_is_known and axes.size * count > MAX_SIZE:
        raise ValueError(
            f"an input of shape {axes.shape} on each of {count} devices has "
            f"{axes.size * count} elements per feature, but sizes are int32: fit at "
            f"most {MAX_SIZE} in all, such as every second position"
        )


def _reciprocal(deviation: Array) -> Array:
    """`1 / deviation`, and 0 of 0."""
    return jnp.where(deviation == 0, 0, 1 / jnp.where(deviation == 0, 1, deviation))


@functools.partial(jax.jit, inline=True)
def _union(a: Standardize, b: Standardize) -> Moments:
    """The pooled moments; compiled once, also where nothing around it is."""
    dtype = promote(a.mean.dtype, b.mean.dtype)
    mean, var, residue = (
        jnp.stack([v.astype(dtype) for v in pair])
        for pair in ((a.mean, b.mean), (a.var, b.var), (a.residue, b.residue))
    )
    both = Moments(mean, var, jnp.stack([a.size, b.size]), residue)
    m = Moments(*(v[0] for v in pool(both, lambda v: v.sum(0, keepdims=True))))
    # Sums of two sizes past 2**31 - 1 are negative; NaN stays NaN from there on.
    lost = jnp.where(m.size < 0, jnp.nan, 0).astype(dtype)
    return m._replace(mean=m.mean + lost, var=m.var + lost)
