"""Moments of any axes, and the line through each element: `line` and `sums`, which are
each other's transposes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad

from jaxnorm._axes import Axes
from jaxnorm._moments import Moments
from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives._linear import Linear
from jaxnorm._primitives._operation import Operation, Reduction, Struct
from jaxnorm._primitives._parts import spread
from jaxnorm._working import from_working, to_working


class Centered(NamedTuple):
    """What a line is through: `x - mean`, and what its other array is multiplied by."""

    x: Array
    mask: Array | None
    mean: Array
    gain: Array | None


class Terms(NamedTuple):
    """What a line adds up; where it is transposed, their cotangents."""

    array: Any
    slope: Any
    shift: Any
    rest: Any = None  # of the array, that its dtype cannot hold


def _line(reduction: Reduction, centered: Centered, terms: Terms) -> tuple[Array, ...]:
    """`(x - mean) * slope + shift + array * gain`, and 0 where the mask is false."""
    axes, dtype = reduction.axes, reduction.dtype
    x, mask, mean, gain = centered
    parts = []
    if terms.slope is not None:
        parts.append((to_working(x, mask, axes) - mean) * terms.slope)
    if terms.shift is not None:
        parts.append(terms.shift)
    if terms.array is not None:
        array = to_working(terms.array, mask, axes)
        parts.append(array if gain is None else array * gain)
    if terms.rest is not None:
        parts.append(to_working(terms.rest, mask, axes))
    y = sum(parts[1:], start=parts[0])
    return (from_working(jnp.broadcast_to(y, axes.working_shape), mask, axes, dtype),)


def _line_results(reduction: Reduction, *_: Any) -> list[Struct]:
    return [Struct(reduction.axes.shape, reduction.dtype)]


class _Line(Linear):
    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        """In one line where nothing but `x` and the mean change what it is through."""
        (centered, terms), (moving, dterms) = operands, changes
        simple = terms.array is None and moving.gain is None
        if not simple or terms.slope is None:
            return super().tangent(static, operands, changes, out)
        shift = dterms.shift
        if moving.mean is not None:
            less = -terms.slope * moving.mean
            shift = less if shift is None else shift + less
        if moving.x is not None:
            centered = centered._replace(gain=terms.slope)
        return self(static, centered, Terms(moving.x, dterms.slope, shift))


LINE = _Line("line", "sums", _line, _line_results)


def line_in_parts(
    reduction: Reduction, centered: Centered, terms: Terms
) -> tuple[Array, ...]:
    """The same, of which the transpose sums in parts."""
    shape = reduction.axes.working_shape
    slope, shift = (
        None if v is None else spread(v, shape, busy=True)
        for v in (terms.slope, terms.shift)
    )
    return _line(reduction, centered, terms._replace(slope=slope, shift=shift))


def line(reduction: Reduction, centered: Centered, terms: Terms) -> Array:
    """`(x - mean) * slope + shift + array * gain` in the dtype of `reduction`.

    Its transpose is `sums`. All but `x` and `array` broadcast against `x` in its
    working shape, and are small.
    """
    smalls = *centered[2:], terms.slope, terms.shift
    shapes = [v.shape for v in smalls if v is not None]
    shape = jnp.broadcast_shapes(*shapes)
    shape = (*[1] * (len(reduction.axes.working_shape) - len(shape)), *shape)
    mean, gain, slope, shift = (
        None if v is None else jnp.broadcast_to(v, shape) for v in smalls
    )
    centered = centered._replace(mean=mean, gain=gain)
    return LINE(reduction, centered, terms._replace(slope=slope, shift=shift))[0]


def sums(reduction: Reduction, centered: Centered, array: Array) -> Terms:
    """`(array * gain, sum of array * (x - mean), sum of array)`.

    The first is in the dtype of `reduction`, or None if there is no gain; the sums are
    of the shape of the mean.
    """
    x, _, mean, gain = centered
    small = Struct(mean.shape, mean.dtype)
    spread = None if gain is None else Struct(x.shape, reduction.dtype)
    within = reduction._replace(dtype=array.dtype)
    found = LINE.pull_back(within, centered, [array], Terms(spread, small, small))
    if gain is None or reduction.dtype == gain.dtype:
        return found
    return found._replace(rest=REST(reduction, gain, array)[0])


def _rest(reduction: Reduction, gain: Array, array: Array) -> tuple[Array]:
    """What rounding cuts off `array * gain`."""
    axes, dtype = reduction.axes, reduction.dtype
    whole = to_working(array, None, axes) * gain
    return ((whole - whole.astype(dtype)).reshape(axes.shape),)


def _rest_results(reduction: Reduction, gain: Any, array: Any) -> list[Struct]:
    return [Struct(array.shape, gain.dtype)]


class _Rest(Operation):
    """Formally 0, as the rounded product formally is the product: it has no transpose,
    and in the forward mode it keeps the product from being rounded before the sum."""

    whole_operands = (1,)

    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        (gain, _), (_, change) = operands, changes
        return (
            [jnp.zeros_like(out[0])] if change is None else self(static, gain, change)
        )


REST = _Rest("rest", _rest, _rest_results)
ad.primitive_transposes[REST.primitive] = lambda _, *leaves, **__: [None] * len(leaves)


class _Moments(Operation):
    whole_operands = (0, 1)

    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        (x, mask, size), (dx, *_) = operands, changes
        mean, var, residue = out
        size = static.axes.size if size is None else size
        own = Moments(mean, var, size, residue)
        dmean, dvar = moments_tangent(static, x, mask, own, dx)
        return [dmean, dvar, jnp.zeros_like(residue)]


MOMENTS = _Moments(
    "moments", formulas.of_any(formulas.about_the_mean), formulas.results
)


def moments_tangent(
    reduction: Reduction, x: Array, mask: Array | None, own: Moments, dx: Array
) -> tuple[Array, Array]:
    """The tangents of the mean and the variance of `x`, whose moments are `own`."""
    if jnp.iscomplexobj(x):
        return any_moments_tangent(reduction, x, mask, own, dx)
    mean = jnp.broadcast_to(own.mean, each_feature(reduction.axes))
    found = sums(reduction, Centered(x, mask, mean, None), dx)
    return of_sums(reduction, own, found)


def any_moments_tangent(
    reduction: Reduction,
    x: Array,
    mask: Array | None,
    own: Moments,
    dx: Array,
    read: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Array]:
    """The same by XLA's formula alone, of complex numbers, too; it takes x as `read`.

    Computed again in the backward pass, which keeps of x's size x in its own dtype.
    """
    axes, center, *_ = reduction

    def tangent(x: Array, mask: Array | None, own: Moments, dx: Array) -> Any:
        dx = to_working(dx, mask, axes)
        return formulas.tangent(axes, center, read(x), mask, own, dx)

    return jax.checkpoint(tangent, prevent_cse=False)(x, mask, own, dx)


def each_feature(axes: Axes) -> tuple[int, ...]:
    """The shape of statistics taken without the reduction over features, if there is
    another; sums of these are then small."""
    plain, features = axes.reduce_in_order
    return axes._replace(reduce=plain or features).stats_shape


def of_sums(reduction: Reduction, own: Moments, found: Terms) -> tuple[Array, Array]:
    """The tangents of mean and variance, from the sums of those of x."""
    axes = reduction.axes
    shape = axes.stats_shape
    along = tuple(a for a, n in enumerate(found.shift.shape) if n != shape[a])
    count = formulas.count_of(axes, own.size, found.shift.dtype)
    both = found.shift, found.slope
    mean, half = (v.sum(along, keepdims=True) / count for v in both)
    dmean = mean if reduction.center else jnp.zeros_like(mean)
    return dmean, 2 * (half - own.residue * dmean)
