"""A whole norm, statistics and what they do to x, as one rule of derivatives."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import zero_from_primal

from jaxnorm import _devices as devices
from jaxnorm._axes import Axes
from jaxnorm._devices import Peers
from jaxnorm._dtypes import at_least_float32
from jaxnorm._moments import Moments
from jaxnorm._primitives import affine, columns
from jaxnorm._primitives._operation import Reduction
from jaxnorm._primitives.activated import ACTIVATED_NORM, Activated
from jaxnorm._primitives.affine import TANGENT, Change, Line, Stood, without_bias
from jaxnorm._primitives.columns import Centered, Terms
from jaxnorm._primitives.rows import ROW_NORM
from jaxnorm._reduce import moments_of
from jaxnorm._standardize import is_of_columns, standardized


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


def standardize_by_own(
    reduction: Reduction, operands: Operands
) -> tuple[Array, Array, Moments]:
    """Standardizes x by its own moments, pooled over devices.

    Returns x, the result and the moments. What else reads x may read it from there: the
    norm's gradient then takes its own along.
    """
    rows = reduction.axes.as_rows
    if rows is None or operands.mask is not None or operands.peers is not None:
        return operands.x, *_by_moments(reduction, operands)
    return _of_rows(reduction, rows, operands)


def _of_rows(
    reduction: Reduction, rows: Axes, operands: Operands
) -> tuple[Array, Array, Moments]:
    axes = reduction.axes
    scale, bias = (
        None if v is None else v.reshape(*v.shape[: len(rows.working_shape) - 1], -1)
        for v in (operands.scale, operands.bias)
    )
    reduction = reduction._replace(axes=rows)
    x, y, *m = ROW_NORM(reduction, operands.x, operands.epsilon, scale, bias)
    mean, var, residue = (v.reshape(axes.stats_shape) for v in m)
    return x, y, Moments(mean, var, axes.size, residue)


def activated_by_own(
    reduction: Reduction, activation: str, operands: Operands
) -> tuple[Array, Moments]:
    """x standardized by its own moments and activated, as one operation; and these."""
    static = Activated(reduction, activation)
    x, _, _, epsilon, scale, bias, _ = operands
    y, mean, var, residue = ACTIVATED_NORM(static, x, epsilon, scale, bias)
    return y, Moments(mean, var, reduction.axes.size, residue)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_moments(reduction: Reduction, operands: Operands) -> tuple[Array, Moments]:
    _, m = both_moments(reduction, operands)
    line = operands.line(m, reduction)
    return standardized(reduction, operands.x, operands.mask, line), m


@_by_moments.defjvp
def _by_moments_jvp(
    reduction: Reduction, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    (operands,), (change,) = primals, tangents
    own, m = both_moments(reduction, operands)
    line = operands.line(m, reduction)
    y = standardized(reduction, operands.x, operands.mask, line)
    small = is_of_columns(reduction.axes, operands.x, line)
    tangent = _column_tangent if small else _any_tangent
    dy, dmean, dvar = tangent(reduction, operands, own, m, line, change)
    return (y, m), (dy, moments_change(m, dmean, dvar))


def both_moments(reduction: Reduction, operands: Operands) -> tuple[Moments, Moments]:
    """The moments of `x`, and those pooled over devices."""
    own = moments_of(reduction, operands.x, operands.mask)
    return own, devices.pooled(own, operands.peers)


def _column_tangent(
    reduction: Reduction,
    operands: Operands,
    own: Moments,
    m: Moments,
    line: Line,
    change: Operands,
) -> tuple[Array, Array, Array]:
    """By two sums and a line, which in the transpose are two sums and a line, too.

    The tangent of x goes through the sums to the line, and is multiplied there: so
    that, transposed, y's cotangent goes as it is to the line that makes that of x.
    """
    x, mask = operands.x, operands.mask
    each = columns.each_feature(reduction.axes)
    smalls = [v.shape for v in (line.scale, line.bias) if v is not None]
    shape = jnp.broadcast_shapes(each, *smalls)
    mean, gain = (jnp.broadcast_to(v, shape) for v in (own.mean, line.slope))
    found = columns.sums(reduction, Centered(x, mask, mean, gain), change.x)
    dmean, dvar = columns.of_sums(reduction, own, found)
    dmean, dvar = _pooled(operands, own, m, dmean, dvar)
    dline = line_change(line, dmean, dvar, change)
    terms = Terms(found.array, *affine.line_tangent(line, dline), found.rest)
    dy = columns.line(reduction, Centered(x, mask, m.mean, None), terms)
    return dy, dmean, dvar


def _any_tangent(
    reduction: Reduction,
    operands: Operands,
    own: Moments,
    m: Moments,
    line: Line,
    change: Operands,
) -> tuple[Array, Array, Array]:
    """With the tangent of x widened once, so that its uses are summed before they are
    rounded."""
    dx = widened_tangent(change)
    dmean, dvar = pooled_moments_tangent(reduction, operands, own, m, dx)
    dline = line_change(line, dmean, dvar, change)
    stood = without_bias(Stood(operands.x, operands.mask, line))
    (dy,) = TANGENT(reduction, stood, Change(dx, dline))
    return dy, dmean, dvar


def widened_tangent(change: Operands) -> Array:
    """The tangent of x, so wide that its uses are summed before they are rounded."""
    return change.x.astype(at_least_float32(change.x.dtype))


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
    x, mask = operands.x, operands.mask
    dmean, dvar = columns.any_moments_tangent(reduction, x, mask, own, dx, read)
    return _pooled(operands, own, m, dmean, dvar)


def _pooled(
    operands: Operands, own: Moments, m: Moments, dmean: Array, dvar: Array
) -> tuple[Array, Array]:
    if operands.peers is None:
        return dmean, dvar
    # Not within what is computed again, where a collective may know no axis any more.
    offset = (own.mean - m.mean) + (own.residue - m.residue)
    return devices.pooled_tangent(operands.peers, offset, own.size, m.size, dmean, dvar)
