"""Step 1: which elements share statistics, and which axes carry the parameters."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.export import is_symbolic_dim

from jaxnorm._arguments import as_integer, as_integers, as_shape

Shape = tuple[int, ...]


class Axes(NamedTuple):
    """How an array is split for normalization: static, and free of arrays.

    An array is reduced in its working shape, in which at most one axis of its own is
    split into two (the features into groups, or the batch into virtual batches).
    Splitting an axis moves no data. Axes are non-negative and ascending.
    """

    shape: Shape  # the array's own shape
    working_shape: Shape  # the shape it is reduced in
    origin: tuple[int, ...]  # the axis of `shape` that each working axis is of
    reduce: tuple[int, ...]  # working axes that share one mean and variance
    feature: tuple[int, ...]  # axes of `shape` that carry scale and bias

    @property
    def size(self) -> int:
        """How many elements each statistic is taken over."""
        return math.prod(self.working_shape[a] for a in self.reduce)

    @property
    def size_is_known(self) -> bool:
        """Whether `size` is a number, and not symbolic."""
        return is_known(*(self.working_shape[a] for a in self.reduce))

    @property
    def feature_shape(self) -> Shape:
        """The shape of scale, bias and running statistics."""
        return tuple(self.shape[a] for a in self.feature)

    @property
    def stats_shape(self) -> Shape:
        """`working_shape`, with 1 for every reduced axis."""
        return tuple(
            1 if a in self.reduce else n for a, n in enumerate(self.working_shape)
        )

    def param_shape(self, *leading: int) -> Shape:
        """`working_shape`, with 1 for every axis but the features and those named."""
        kept = {*self.feature, *leading}
        pairs = zip(self.working_shape, self.origin, strict=True)
        return tuple(n if a in kept else 1 for n, a in pairs)

    @property
    def of_rows(self) -> bool:
        """Whether each statistic is of a run of consecutive features in memory."""
        return (
            self.reduce == (len(self.working_shape) - 1,)
            and not self.reduce_in_order[0]
        )

    @property
    def as_rows(self) -> "Axes | None":
        """These axes with those that are reduced as one, if each statistic is of a run
        of consecutive features in memory; else None."""
        first = len(self.working_shape) - len(self.reduce)
        trailing = self.reduce == tuple(range(first, len(self.working_shape)))
        if not self.reduce or not trailing or self.reduce_in_order[0]:
            return None
        kept, reduced = self.working_shape[:first], self.working_shape[first:]
        working = (*kept, math.prod(reduced))
        origin = (*self.origin[:first], self.origin[-1])
        return Axes(self.shape, working, origin, (first,), self.feature)

    @property
    def per_feature(self) -> "Axes":
        """These axes without the reduction over features, if there is another, too."""
        plain, features = self.reduce_in_order
        if not (plain and features):
            return self
        reduce = tuple(self.origin[a] for a in plain)
        return _unfolded(self.shape, reduce, self.feature)

    def with_leading(self, size: int) -> "Axes":
        """These axes of arrays with another axis before, which is kept."""
        return Axes(
            (size, *self.shape),
            (size, *self.working_shape),
            (0, *(a + 1 for a in self.origin)),
            tuple(a + 1 for a in self.reduce),
            tuple(a + 1 for a in self.feature),
        )

    @property
    def reduce_in_order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The reduced axes in two parts: those without features, then those with.

        Sums over the first leave one number per parameter, which the gradients of the
        parameters need anyway; the second then reduces a small array.
        """
        plain = tuple(a for a in self.reduce if self.origin[a] not in self.feature)
        return plain, tuple(a for a in self.reduce if a not in plain)

    @staticmethod
    def keep(shape: Shape, axis: int | Sequence[int]) -> "Axes":
        """Reduces every axis but `axis` (batch norm)."""
        shape = as_shape("shape", shape)
        feature = canonicalize(axis, len(shape))
        reduce = tuple(a for a in range(len(shape)) if a not in feature)
        return _unfolded(shape, reduce, feature)

    @staticmethod
    def over(
        shape: Shape,
        reduction_axes: int | Sequence[int],
        feature_axes: int | Sequence[int],
    ) -> "Axes":
        """Reduces `reduction_axes`; `feature_axes` carry parameters (layer norm)."""
        shape = as_shape("shape", shape)
        reduce = canonicalize(reduction_axes, len(shape), "reduction_axes")
        feature = canonicalize(feature_axes, len(shape), "feature_axes")
        return _unfolded(shape, reduce, feature)

    @staticmethod
    def per_example(shape: Shape, axis: int | Sequence[int]) -> "Axes":
        """Reduces every axis but the leading one and `axis` (instance norm)."""
        shape = as_shape("shape", shape)
        feature = _not_leading(shape, axis)
        reduce = tuple(a for a in range(1, len(shape)) if a not in feature)
        return _unfolded(shape, reduce, feature)

    @staticmethod
    def groups(
        shape: Shape,
        axis: int,
        *,
        num_groups: int | None = None,
        group_size: int | None = None,
        reduction_axes: int | Sequence[int] | None = None,
    ) -> "Axes":
        """Reduces every axis but the leading one, with the features split into groups.

        Groups are of consecutive features; exactly one of `num_groups` and `group_size`
        is given. `reduction_axes` names the axes to reduce instead, the features among
        them.
        """
        shape = as_shape("shape", shape)
        if reduction_axes is None:
            feature = _not_leading(shape, axis)
            reduced = tuple(range(1, len(shape)))
        else:
            feature = canonicalize(axis, len(shape))
            reduced = canonicalize(reduction_axes, len(shape), "reduction_axes")
        if len(feature) != 1 or feature[0] not in reduced:
            raise ValueError(
                f"group norm needs one feature axis, among those it reduces: got "
                f"axis={axis}, reduction_axes={reduction_axes} for an array of shape "
                f"{shape}"
            )
        at = feature[0]
        count, size = _groups(shape[at], num_groups, group_size)
        split = _split(shape, at, count, size)
        moved = tuple(a + (a >= at) for a in reduced)
        return split._replace(reduce=moved, feature=feature)

    @staticmethod
    def virtual_batches(shape: Shape, axis: int | Sequence[int], size: int) -> "Axes":
        """As `keep`, but within each run of `size` consecutive examples.

        Raises ValueError where `size` does not divide the leading axis.
        """
        shape, size = as_shape("shape", shape), as_integer("size", size)
        feature = _not_leading(shape, axis)
        if size < 1 or shape[0] % size:
            raise ValueError(
                f"size={size} does not divide the batch of {shape[0]} examples of an "
                f"array of shape {shape}: choose a divisor, or pad the batch and mask "
                "the padding"
            )
        split = _split(shape, 0, shape[0] // size, size)
        reduce = tuple(i for i, a in enumerate(split.origin) if i and a not in feature)
        return split._replace(reduce=reduce, feature=feature)


def is_known(*sizes: Any) -> bool:
    """Whether all these sizes are numbers, and none symbolic, as for `jax.export`.

    Symbolic sizes can be computed with, but not compared: they need formulas without a
    decision. One equals a number only if it always does.
    """
    return not any(map(is_symbolic_dim, sizes))


def canonicalize(axis: int | Sequence[int], ndim: int, name: str = "axis") -> Shape:
    """`axis` as ascending, distinct, non-negative integers.

    Raises TypeError for what is not an integer, ValueError for one out of range.
    """
    given = as_integers(name, axis)
    given = (given,) if isinstance(given, int) else given
    if given and not ndim:
        raise ValueError(
            f"{name}={axis} is out of range for a scalar, which has no axes: pass an "
            "array with at least one axis"
        )
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{name}={axis} is out of range for an array of rank {ndim}: use axes "
                f"from {-ndim} to {ndim - 1}"
            )
    return tuple(sorted({a % ndim for a in given}))


def _unfolded(shape: Shape, reduce: Shape, feature: Shape) -> Axes:
    return Axes(shape, shape, tuple(range(len(shape))), reduce, feature)


def _split(shape: Shape, axis: int, *parts: int) -> Axes:
    """`shape` with `axis` split into two `parts`; nothing reduced yet."""
    working = (*shape[:axis], *parts, *shape[axis + 1 :])
    origin = (*range(axis + 1), *range(axis, len(shape)))
    return Axes(shape, working, origin, (), ())


def _not_leading(shape: Shape, axis: int | Sequence[int]) -> Shape:
    feature = canonicalize(axis, len(shape))
    if 0 in feature:
        raise ValueError(
            f"axis={axis} names the leading axis of an array of shape {shape}, which "
            "holds the examples of the batch: name a feature axis"
        )
    return feature


def _groups(
    features: int, num_groups: int | None, group_size: int | None
) -> tuple[int, int]:
    """How many groups there are, and of how many features."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "exactly one of num_groups and group_size must be given, got num_groups="
            f"{num_groups} and group_size={group_size}: pass num_groups=None to choose "
            "the size of the groups"
        )
    name, value = (
        ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    )
    value = as_integer(name, value)
    if value < 1 or features % value:
        by = "choose a divisor"
        if not is_known(features):
            by = f"give them a shape such as {value}*k in jax.export.symbolic_shape"
        raise ValueError(
            f"{name}={value} does not divide the {features} features: {by}"
        )
    other = features // value
    return (value, other) if group_size is None else (other, value)
