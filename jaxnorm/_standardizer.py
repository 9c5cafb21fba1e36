"""Standardization of inputs: the moments of a data set or stream, and their use."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import (
    as_feature_shape,
    as_integers,
    as_positive,
    as_share,
    optional,
)
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm._feature_moments import (
    FeatureMoments,
    faded,
    moments_of,
    restored,
    standardized,
    union_of,
)
from jaxnorm._samples import Sample, as_sample
from jaxnorm._sharding import automatically, sharded_as
from jaxnorm._wide_data import as_data, as_real_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Standardizer(FeatureMoments):
    """Moments of each feature of a data set, to standardize it with and to undo that.

        x = x.reshape(-1, features)
        y = (x - x.mean(0)) / x.std(0)

    but of all data seen so far: in one array (`fit`), in batches (`init` and `update`)
    or in parts (`merge`). However the data is split, masked or spread over devices, the
    moments are those of the whole, pooled by the numbers of elements or the sums of
    their weights (Chan, Golub and LeVeque, 1983). A frozen pytree of seven arrays of
    the features' shape: a carry of `lax.scan`, to be donated or not, an entry of a
    checkpoint, a constant of a model. `TreeStandardizer` does the same for dicts of
    arrays and other trees.

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
        residue, var_residue: what rounding has cut off mean and variance, so that
            nothing adds up over millions of batches.
        spacing: of the numbers that the feature consists of: `eps * abs(mean)`, with
            the eps of float32 or float64, or 2**-46 for the sum of two in float32.
        size_high, size_low: number of elements seen of each feature, or the sum of
            their weights, `size_high + size_low`: the second is what rounding has cut
            off the first. Numbers are exact up to 2**47 in float32, and beyond, as sums
            of weights, to 48 bits. `size` is the sum in float64.
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
        [2. 7.] [3. 3.]
        """
        shape = as_feature_shape("feature_shape", feature_shape)
        static = as_integers("axis", axis)
        wide = at_least_float32(as_real_dtype(dtype))
        # Each an array of its own, so that all can be donated.
        names = (f.name for f in dataclasses.fields(cls) if f.name != "axis")
        return cls(**{name: jnp.zeros(shape, wide) for name in names}, axis=static)

    @classmethod
    def fit(
        cls,
        x: ArrayLike,
        *,
        axis: int | Sequence[int] = -1,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of `x`, over every axis but `axis`.

            others = tuple(a for a in range(x.ndim) if a != axis)
            mean, var = x.mean(others, where=mask), x.var(others, where=mask)

        With weights, those of a data set that holds each element as often as its weight
        says:

            size = weights.sum(others)
            mean = (weights * x).sum(others) / size
            var = (weights * (x - mean) ** 2).sum(others) / size

        Args:
            x: array of real numbers, or nested lists of them.
            axis: the feature axis, or axes; () for one mean and variance of all of x.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
                nothing, and may be NaN.
            weights: of elements, from 0 on, broadcasting to x: (examples, 1) for those
                of examples. What has weight 0 is masked. Negative ones that are traced,
                and so not known, make the moments NaN.
            axis_name: mapped axis, or several, over whose devices `x` is split; each of
                them gets the moments of all, by one collective.

        Returns:
            A Standardizer; that of no data where nothing is valid.

        Raises:
            ValueError, TypeError: while tracing, for shapes, dtypes or axes that do not
                fit, and an `axis_name` that is not bound; for weights that are known to
                be negative or not finite.

        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, jnp.nan], [3.0, 5.0]])
        >>> inputs = jaxnorm.Standardizer.fit(x, mask=~jnp.isnan(x))
        >>> print(inputs.mean, inputs.size)
        [2. 5.] [2. 1.]
        """
        static = as_integers("axis", axis)
        sample = as_sample(x, static, mask, weights)
        return cls._fit_samples([sample], [static], axis_name)[0]

    @classmethod
    def _fit_samples(
        cls, samples: Sequence[Sample], axes: Sequence[Any], axis_name: Any
    ) -> list[Self]:
        """One of each of `samples`, by one collective."""
        return [
            functools.reduce(cls.merge, (cls(**part, axis=axis) for part in parts))
            for axis, parts in zip(axes, moments_of(samples, axis_name), strict=True)
        ]

    def update(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        decay: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of all data seen so far and of `x`.

            self.merge(Standardizer.fit(x, axis=self.axis, mask=mask, ...))

        With `decay`, for streams that drift, what has been seen is forgotten: before
        the merge, the size of self is multiplied by it. After several updates, these
        are the moments of all data with `weights * decay**age`, where the age is the
        number of updates since. An update that holds nothing of a feature leaves it as
        it is, and does not count for its age.

        Args:
            x, mask, weights, axis_name: as in `fit`. With `axis_name`, self is the same
                on all devices, and the result is too.
            decay: from 0, which forgets all, to 1, which is as None. May be traced.

        Returns:
            A new Standardizer.

        Raises:
            ValueError, TypeError: while tracing, as `fit` does, for features of another
                shape than those of self, and for a decay that is not from 0 to 1.

        >>> import jax.numpy as jnp, jaxnorm
        >>> inputs = jaxnorm.Standardizer.fit(jnp.zeros((6, 1)))
        >>> inputs = inputs.update(jnp.ones((6, 1)), decay=0.5)
        >>> print(inputs.mean.round(4), inputs.size)
        [0.6667] [9.]
        """
        sample = self._as_sample(x, mask, weights)
        (seen,) = self._fit_samples([sample], [self.axis], axis_name)
        return self._merge_newer(seen, optional(as_share)("decay", decay))

    def _as_sample(self, x: Any, mask: Any, weights: Any) -> Sample:
        """The arguments of an update, checked."""
        sample = as_sample(x, self.axis, mask, weights)
        self.axes(sample.axes.shape)
        return sample

    def _merge_newer(self, newer: Self, decay: Any) -> Self:
        if decay is None:
            return self.merge(newer)
        return dataclasses.replace(self, **faded(self, newer, decay)).merge(newer)

    @sharded_as("self")
    def merge(self, other: "Standardizer") -> Self:
        """The moments of the union of two disjoint parts of the data.

            size = self.size + other.size
            offset = other.mean - self.mean
            mean = self.mean + offset * other.size / size
            spread = self.var * self.size + other.var * other.size
            var = (spread + offset**2 * self.size * other.size / size) / size

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
        return dataclasses.replace(self, **union_of(self, other))

    def apply(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        clip: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """Standardizes each feature of `x`.

            y = (x - mean) / deviation, and 0 for constant features
            y = jnp.clip(y, -clip, clip)

        Args:
            x: array with these features on `axis`, of any other shape.
            mask: boolean, or 0 and 1, broadcasting to x; what it excludes, NaN or not,
                comes out as 0, which is the mean of the feature.
            clip: the largest deviation from 0 that comes out, a number over 0; None for
                no limit. May be traced.
            dtype: of y; by default that of x, float32 for integers and for what is read
                as two numbers. Computed in at least float32, and rounded once.

        Returns:
            y, of the shape of x; the moments get no gradient.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes that do not fit.
        """
        data = as_data(x)
        dtype = data.high.dtype if dtype is None else as_real_dtype(dtype)
        limit = optional(as_positive)("clip", clip)
        y = automatically(standardized, self, data, mask, dtype, like=data.high)
        if limit is None:
            return y
        limit = jnp.asarray(limit, y.dtype)
        return jnp.clip(y, -limit, limit)

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
        data = as_data(y)
        y = data.high if data.low is None else data.high + data.low
        if dtype is None:
            dtype = promote(y.dtype, self.mean.dtype)
        return automatically(restored, self, y, as_real_dtype(dtype), like=y)
