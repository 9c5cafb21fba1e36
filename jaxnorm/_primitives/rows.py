"""Rows that are normalized by their own moments, in one pass, and their gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxnorm import _exact as exact
from jaxnorm._moments import Moments
from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives import affine
from jaxnorm._primitives._linear import Adjoint, Linear
from jaxnorm._primitives._operation import Operation, Reduction, Struct
from jaxnorm._primitives._views import RowView, row_view
from jaxnorm._primitives.affine import Change, Line, Stood
from jaxnorm._primitives.columns import any_moments_tangent
from jaxnorm._working import from_working, to_working


class Row(NamedTuple):
    """Rows, what they are normalized with, and their moments."""

    x: Array
    epsilon: Array
    scale: Array | None
    mean: Array
    var: Array
    residue: Array


class RowChange(NamedTuple):
    """The tangents of what the norm of rows is of, or their cotangents."""

    x: Any
    epsilon: Any
    scale: Any
    bias: Any


def norm(
    centered: Callable[..., Any],
    reduction: Reduction,
    x: Array,
    epsilon: Array,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, ...]:
    """The rows as they are, their norm, and their moments by the formula `centered`.

    What reads x beside the norm reads it from here, so that a kernel of the gradient
    can add that of the others.
    """
    axes, dtype = reduction.axes, reduction.dtype
    m = formulas.of_any(centered)(reduction, x, None, None)
    mean, var, residue = m
    residue = residue if reduction.center else None
    line = Line(mean, residue, exact.rstd(var, epsilon), scale, bias)
    y = affine.apply_line(x, None, line, axes)
    return x, from_working(y, None, axes, dtype), *m


def tangent(
    again: Callable[..., Row],
    rows: Callable[..., Array],
    reduction: Reduction,
    row: Row,
    change: RowChange,
) -> tuple[Array, ...]:
    """The tangents of x, y, mean and variance of rows: the chain rule, all in one."""
    axes, center, *_ = reduction
    x, epsilon, scale, mean, var, residue = again(reduction, row)
    dx, dmean, dvar = None, jnp.zeros_like(mean), jnp.zeros_like(var)
    same = jnp.zeros_like(x)
    if change.x is not None:
        # Once, so that all its uses are summed before they are rounded.
        dx = change.x.astype(mean.dtype)
        same = dx.astype(x.dtype)
        own = Moments(mean, var, axes.size, residue)
        working = to_working(dx, None, axes)
        dmean, dvar = formulas.tangent(axes, center, x, None, own, working)
    rstd = exact.rstd(var, epsilon)
    dsquare = dvar if change.epsilon is None else dvar + change.epsilon
    line = Line(mean, residue if center else None, rstd, scale, None)
    dline = Line(dmean, None, -0.5 * rstd**3 * dsquare, change.scale, change.bias)
    (dy,) = affine.tangent(rows, reduction, Stood(x, None, line), Change(dx, dline))
    return same, dy, dmean, dvar


def as_given(reduction: Reduction, row: Row) -> Row:
    return row


def kept_or_again(reduction: Reduction, row: Row) -> Row:
    """Whichever of the two the platform takes."""
    mean, var, residue = OWN_MOMENTS(reduction, row)
    return row._replace(mean=mean, var=var, residue=residue)


def moments_again(reduction: Reduction, row: Row) -> Row:
    """On a GPU, the moments of rows once more, and about a pivot.

    The forward pass then is one kernel, which reads x once as nothing but its result
    leaves it; and the backward pass, which reads x anyway, takes all its sums along
    rows in one pass, as none of them needs another.
    """
    x = lax.optimization_barrier(row.x)  # or they would be the forward pass's
    formula = formulas.of_any(formulas.about_a_pivot_apart)
    mean, var, residue = formula(reduction, x, None, None)
    return row._replace(x=x, mean=mean, var=var, residue=residue)


def moments_of_row(
    again: Callable[..., Row], reduction: Reduction, row: Row
) -> tuple[Array, ...]:
    moments = again(reduction, row)[3:]
    return tuple(jnp.broadcast_to(v, reduction.axes.stats_shape) for v in moments)


class _OwnMoments(Operation):
    """The moments of a row, kept or taken again: a function of x alone."""

    is_small = True

    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        (row,), (change,) = operands, changes
        zeros = [jnp.zeros_like(v) for v in out]
        if change.x is None:
            return zeros
        mean, var, residue = out
        own = Moments(mean, var, static.axes.size, residue)
        return [*any_moments_tangent(static, row.x, None, own, change.x), zeros[2]]


def _row_moments(reduction: Reduction, row: Row) -> list[Struct]:
    return [*formulas.results(reduction, row.x)]


OWN_MOMENTS = _OwnMoments(
    "own_moments", functools.partial(moments_of_row, as_given), _row_moments
)


def kept(reduction: Reduction, *moments: Array) -> tuple[Array, ...]:
    """What a forward pass keeps of the moments for where they are not taken again."""
    return tuple(jnp.broadcast_to(v, reduction.axes.stats_shape) for v in moments)


def kept_nothing(reduction: Reduction, *moments: Array) -> tuple[Array, ...]:
    """On a GPU, where the kernel of the forward pass would be parted to write them."""
    return tuple(jnp.zeros(reduction.axes.stats_shape, v.dtype) for v in moments)


class _Kept(Operation):
    is_small = True
    whole_operands = ()

    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        """None, as what is kept is a function of x, which `OWN_MOMENTS` knows."""
        return [jnp.zeros_like(v) for v in out]


KEPT = _Kept(
    "kept_moments",
    kept,
    lambda reduction, *moments: [
        Struct(reduction.axes.stats_shape, v.dtype) for v in moments
    ],
)


def why_no_gradient(adjoint: Adjoint, at: Any, dy: Any) -> str | None:
    """Why no kernel can give the gradient of a norm `at` its operands, for the
    cotangent of y; None if one may."""
    wanted: RowChange = adjoint.wanted
    if wanted.epsilon is not None or at.epsilon.ndim:
        return "the kernel takes one epsilon, and gives no gradient of it"
    if dy is None:
        return "y has no cotangent"
    if at.scale is None and wanted.scale is not None:
        return "there is a gradient of a scale that is None"
    return None


def why_no_row_gradient(adjoint: Adjoint, row: Row, dy: Any) -> str | None:
    """As `why_no_gradient`, of a kernel of rows."""
    problem = why_no_gradient(adjoint, row, dy)
    if problem is None and gradient_view(adjoint, row) is None:
        return "scale and bias are others for each row"
    return problem


def gradient_view(adjoint: Adjoint, row: Row) -> RowView | None:
    """Rows, of which the parameters and their gradients are the same; or None."""
    wanted: RowChange = adjoint.wanted
    return row_view(adjoint.axes, row.scale, wanted.scale, wanted.bias)


def _norm_results(reduction: Reduction, x: Any, *_: Any) -> list[Struct]:
    y = Struct(reduction.axes.shape, reduction.dtype)
    return [Struct(x.shape, x.dtype), y, *formulas.results(reduction, x)]


def _tangent_results(reduction: Reduction, row: Row, _: Any) -> list[Struct]:
    return _norm_results(reduction, row.x)[:4]


ROW_TANGENT = Linear(
    "row_tangent",
    "row_gradient",
    functools.partial(tangent, kept_or_again, affine.by_sums),
    _tangent_results,
    whole_results=2,
)


class _RowNorm(Operation):
    def tangent(
        self, static: Reduction, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        x, epsilon, scale, _ = operands
        row = Row(x, epsilon, scale, *KEPT(static, *out[2:]))
        found = ROW_TANGENT(static, row, RowChange(*changes))
        return [*found, jnp.zeros_like(row.residue)]


ROW_NORM = _RowNorm(
    "row_norm", functools.partial(norm, formulas.about_the_mean), _norm_results
)
