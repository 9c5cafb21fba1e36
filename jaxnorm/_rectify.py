"""A norm and the relu after it in one rule, which keeps a bit for each element."""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._activation import pack, unpack
from jaxnorm._axes import Axes, Shape
from jaxnorm._fused import (
    Operands,
    both_moments,
    line_change,
    moments_change,
    pooled_moments_tangent,
    widened_tangent,
)
from jaxnorm._moments import Moments
from jaxnorm._primitives._operation import Reduction
from jaxnorm._primitives._parts import spread
from jaxnorm._primitives.affine import Line, affine, apply_line, line_tangent
from jaxnorm._sharding import vary_together
from jaxnorm._working import from_working, to_working

T = TypeVar("T")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def rectify(reduction: Reduction, operands: Operands) -> tuple[Array, Moments]:
    """Normalizes, adds the residual, and sets what is negative to 0."""
    _, m = both_moments(reduction, operands)
    return _rectified(reduction, operands, operands.line(m, reduction)), m


def _rectified(reduction: Reduction, operands: Operands, line: Line) -> Array:
    axes, _, dtype, _ = reduction
    x, mask, residual = operands.x, operands.mask, operands.residual
    y = apply_line(x, mask, line, axes)
    y = y if residual is None else y + to_working(residual, mask, axes)
    return from_working(jnp.maximum(y, 0), mask, axes, dtype)


@rectify.defjvp
def _rectify_jvp(
    reduction: Reduction, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[tuple[Array, Moments], tuple[Array, Moments]]:
    (operands,), (change,) = primals, tangents
    own, m = both_moments(reduction, operands)
    line = operands.line(m, reduction)
    y = _rectified(reduction, operands, line)
    signs = Signs(pack(y > 0), None if operands.residual is None else y)
    dx = widened_tangent(change)
    dmean, dvar = pooled_moments_tangent(
        reduction, operands, own, m, dx, _barrier_on_gpu
    )
    dline = line_change(line, dmean, dvar, change)
    # Computed again in the backward pass, which keeps its arguments alone.
    tangent = functools.partial(_rectify_tangent, reduction)
    tangent = jax.checkpoint(tangent, prevent_cse=False)
    changes = dx, dline, change.residual
    dy = tangent(operands.x, operands.mask, signs, line, *changes)
    return (y, m), (dy, moments_change(m, dmean, dvar))


class Signs(NamedTuple):
    """Where y is positive.

    On a TPU unpacking the bits would move data between lanes: there it is what y says,
    which the next layer keeps after a residual, or else x again.
    """

    bits: Array
    y: Array | None


def _rectify_tangent(
    reduction: Reduction,
    x: Array,
    mask: Array | None,
    signs: Signs,
    line: Line,
    dx: Array,
    dline: Line,
    dresidual: Array | None,
) -> Array:
    """The rest of the chain rule, with a barrier between its transpose and that of
    `pooled_moments_tangent`.

    The sums take x and the cotangent before it, the rest after it: a compiler that saw
    both together would write the gated cotangent to memory to share it.
    """
    axes, _, dtype, _ = reduction
    positive = _positive(axes, x, mask, signs, line)

    def gated(v: Array) -> Array:
        v = from_working(v, mask, axes, dtype)
        return jnp.where(positive, v, jnp.zeros((), v.dtype))

    line = line._replace(rstd=line.rstd.astype(line.mean.dtype))
    changes = vary_together(x, *line_tangent(line, dline))
    direct = affine(line.rstd, line.scale, None) * to_working(dx, mask, axes)
    if dresidual is not None:
        direct = direct + to_working(dresidual, mask, axes)
    direct, *changes = _barrier_on_gpu((gated(direct), *changes))
    dslope, dshift = (_spread_on_gpu(v, axes.working_shape) for v in changes)
    centered = to_working(x, mask, axes) - line.mean
    return direct + gated(centered * dslope + dshift)


def _barrier_on_gpu(values: T) -> T:
    """`values` as they are; a compiler for GPUs does not see that they are the same."""
    barrier = lax.optimization_barrier
    return lax.platform_dependent(
        values, cuda=barrier, rocm=barrier, default=lambda same: same
    )


def _spread_on_gpu(v: Array, shape: Shape) -> Array:
    """`v` for an array of `shape`, of which the transpose sums in parts on a GPU."""
    in_parts = functools.partial(spread, shape=shape)
    wide = jax.eval_shape(in_parts, v).shape
    if wide == v.shape:
        return v
    return lax.platform_dependent(
        v,
        cuda=in_parts,
        rocm=in_parts,
        default=lambda v: jnp.broadcast_to(v, wide),
    )


def _positive(
    axes: Axes, x: Array, mask: Array | None, signs: Signs, line: Line
) -> Array:
    def again() -> Array:
        if signs.y is not None:
            return signs.y > 0
        return apply_line(x, mask, line, axes).reshape(x.shape) > 0

    return lax.platform_dependent(tpu=again, default=lambda: unpack(signs.bits))
