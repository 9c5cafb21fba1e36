"""The derivative of a whole norm: statistics, and what they do to x, in one rule."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes
from jaxnorm._devices import Peers
from jaxnorm._moments import Moments
from jaxnorm._reduce import moments, moments_tangent, row_moments
from jaxnorm._standardize import Line, apply_line, standardize_tangent
from jaxnorm._working import from_working, to_working

T = TypeVar("T")


class Reduction(NamedTuple):
    """The static part of a normalization: axes, centering, and dtype of the result."""

    axes: Axes
    center: bool
    dtype: jnp.dtype  # of the result


class Operands(NamedTuple):
    """The arrays of a normalization, in their own shapes or broadcasting against `x` in
    its working shape. Their tangents are Operands, too."""

    x: Array
    mask: Array | None
    peers: Peers | None
    epsilon: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None

    def line(self, m: Moments, reduction: Reduction) -> Line:
        """The line that normalizes x by `m`."""
        # Without a mean there is nothing to be exact about.
        residue = m.residue if reduction.center else None
        return Line(m.mean, residue, m.rstd(self.epsilon), self.scale, self.bias)


def both_moments(reduction: Reduction, operands: Operands) -> tuple[Moments, Moments]:
    """The moments of `x`, and those pooled over devices."""
    axes, center, _ = reduction
    own = moments(operands.x, axes, mask=operands.mask, center=center)
    return own, devices.pooled(own, operands.peers)


def normalized(reduction: Reduction, operands: Operands, line: Line) -> Array:
    axes, _, dtype = reduction
    x, mask = operands.x, operands.mask
    return from_working(apply_line(x, mask, line, axes), mask, axes, dtype)


def recomputed(tangent: Callable[..., T]) -> Callable[..., T]:
    """`tangent`, computed again in the backward pass, which keeps its arguments alone:
    of the size of x, these are x in its own dtype."""
    return jax.checkpoint(tangent, prevent_cse=False)


def widened_tangent(reduction: Reduction, dx: Array, mask: Array | None) -> Array:
    """`dx` in the working shape, so wide that its uses are summed before rounding."""
    return recomputed(functools.partial(to_working, axes=reduction.axes))(dx, mask)


def line_change(line: Line, dmean: Array, dvar: Array, change: Operands) -> Line:
    """The tangent of `line`, from those of the moments: drstd = -rstd^3 / 2 * dvar."""
    drstd = -0.5 * line.rstd**3 * (dvar + change.epsilon)
    return Line(dmean, None, drstd, change.scale, change.bias)


def moments_change(m: Moments, dmean: Array, dvar: Array) -> Moments:
    return Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))


def pooled_moments_tangent(
    reduction: Reduction,
    operands: Operands,
    own: Moments,
    m: Moments,
    dx: Array,
    read: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Array]:
    """The tangents of the mean and variance, pooled; the sums take x as `read`."""

    def tangent(
        x: Array, mask: Array | None, own: Moments, dx: Array
    ) -> tuple[Array, Array]:
        return moments_tangent(reduction.axes, reduction.center, read(x), mask, own, dx)

    dmean, dvar = recomputed(tangent)(operands.x, operands.mask, own, dx)
    if operands.peers is None:
        return dmean, dvar
    # Not within what is computed again, where a collective may know no axis any more.
    offset = (own.mean - m.mean) + (own.residue - m.residue)
    return devices.pooled_tangent(operands.peers, offset, own.size, m.size, dmean, dvar)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def standardize_by_own(
    reduction: Reduction, operands: Operands
) -> tuple[Array, Moments]:
    """Standardizes x by its own moments, pooled over devices; returns both."""
    _, m = both_moments(reduction, operands)
    return normalized(reduction, operands, operands.line(m, reduction)), m


@standardize_by_own.defjvp
def _standardize_by_own_jvp(
    reduction: Reduction, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    (operands,), (change,) = primals, tangents
    axes, _, dtype = reduction
    own, m = both_moments(reduction, operands)
    line = operands.line(m, reduction)
    y = normalized(reduction, operands, line)
    dx = widened_tangent(reduction, change.x, operands.mask)
    if axes.of_rows and operands.mask is None and operands.peers is None:
        tangent = recomputed(functools.partial(_row_tangent, reduction))
        change = change._replace(x=dx, mask=None, peers=None)
        dy, dmean, dvar = tangent(operands.x, own, operands.epsilon, line, change)
    else:
        dmean, dvar = pooled_moments_tangent(reduction, operands, own, m, dx)
        dline = line_change(line, dmean, dvar, change)
        tangent = recomputed(functools.partial(standardize_tangent, axes, dtype))
        dy = tangent(operands.x, operands.mask, line, dx, dline)
    return (y, m), (dy, moments_change(m, dmean, dvar))


def _row_tangent(
    reduction: Reduction,
    x: Array,
    own: Moments,
    epsilon: Array,
    line: Line,
    change: Operands,
) -> tuple[Array, Array, Array]:
    """The tangents of y, mean and variance of rows: the chain rule, all in one."""
    axes, center, dtype = reduction
    x, m, rstd = _rows_again(reduction, x, own, line.rstd, epsilon)
    dmean, dvar = moments_tangent(axes, center, x, None, m, change.x)
    residue = m.residue if center else None
    line = line._replace(mean=m.mean, residue=residue, rstd=rstd)
    dline = line_change(line, dmean, dvar, change)
    dy = standardize_tangent(axes, dtype, x, None, line, change.x, dline)
    return dy, dmean, dvar


def _rows_again(
    reduction: Reduction, x: Array, own: Moments, rstd: Array, epsilon: Array
) -> tuple[Array, Moments, Array]:
    """On a GPU, the moments of rows once more, and about a pivot.

    The forward pass then is one kernel, which reads x once as nothing but its result
    leaves it; and the backward pass, which reads x anyway, takes all its sums along
    rows in one pass, as none of them needs another.
    """

    def again(x: Array) -> tuple[Array, Moments, Array]:
        x = lax.optimization_barrier(x)  # or they would be the forward pass's
        m = row_moments(x, reduction.axes, reduction.center)
        return x, m, m.rstd(epsilon)

    def same(x: Array) -> tuple[Array, Moments, Array]:
        return x, own, rstd

    return lax.platform_dependent(x, cuda=again, rocm=again, default=same)
