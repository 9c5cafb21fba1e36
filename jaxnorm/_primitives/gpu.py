"""The kernels for NVIDIA's GPUs: which arrays they serve, and how they are called."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._axes import Axes, Shape
from jaxnorm._kernels import columns, rows, support
from jaxnorm._primitives._linear import Adjoint
from jaxnorm._primitives._operation import Formula, Kernel, asks_for_gpu_kernels
from jaxnorm._primitives._views import View, as_likes, broadcasts, view
from jaxnorm._primitives.activated import Normed
from jaxnorm._primitives.columns import each_feature
from jaxnorm._primitives.rows import (
    Row,
    gradient_view,
    why_no_gradient,
    why_no_row_gradient,
)

NAME = "a kernel for NVIDIA's GPUs"


def row_gradient(interpret: Any = False) -> Kernel:
    """The gradient of rows, which takes their moments again.

    `interpret` runs it without a GPU, as Pallas means it.
    """
    return _kernel(_row_gradient, _row_gradient_unfit, interpret)


def activated_gradient(interpret: Any = False) -> Kernel:
    """The gradient of an activated norm by one kernel of sums, which reads x and y's
    cotangent once; `interpret` as there."""
    return _kernel(_activated_gradient, _activated_gradient_unfit, interpret)


def _kernel(formula: Formula, unfit: Callable[..., Any], interpret: Any) -> Kernel:
    return Kernel(
        functools.partial(formula, interpret, True),
        functools.partial(unfit, interpret),
        lambda: NAME,
        functools.partial(formula, interpret, False),
    )


def _why_not_at_all(adjoint: Adjoint, dmoments: Sequence[Any]) -> str | None:
    """Why no kernel of any pattern is to run."""
    if not asks_for_gpu_kernels(adjoint):
        return 'it runs only where implementation="triton" or "mosaic" asks for it'
    if any(v is not None for v in dmoments):
        return "the moments have cotangents"
    return None


def _why_unfit(
    pattern: str, interpret: Any, adjoint: Adjoint, shape: Shape, *arrays: Any
) -> str | None:
    """Why an array of `shape` is none for the kernels of `pattern`."""
    backend = adjoint.implementation
    assert backend is not None
    dtypes = (v.dtype for v in arrays)
    problem = support.why_unfit(pattern, backend, shape, *dtypes)
    return problem or (None if interpret else support.why_not_on_this_gpu(backend))


def _row_gradient_unfit(
    interpret: Any, adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> str | None:
    _, dy, *dmoments = cotangents
    problem = _why_not_at_all(adjoint, dmoments) or why_no_row_gradient(
        adjoint, row, dy
    )
    if problem:
        return problem
    found = gradient_view(adjoint, row)
    assert found is not None
    shape = found.outer * found.rows, found.features
    return _why_unfit("rows", interpret, adjoint, shape, row.x, dy)


def _row_gradient(
    interpret: Any,
    one_device: bool,
    adjoint: Adjoint,
    row: Row,
    cotangents: Sequence[Any],
) -> tuple[Array, ...]:
    wanted, found = adjoint.wanted, gradient_view(adjoint, row)
    assert found is not None and adjoint.implementation is not None
    skip, dy, *_ = cotangents
    shape = found.outer, found.rows, found.features
    scale = row.scale
    if scale is not None:
        scale = jnp.broadcast_to(scale, found.params).reshape(-1, found.features)
    dx, *dparams = rows.backward(
        row.x.reshape(shape),
        dy.reshape(shape),
        None if skip is None else skip.reshape(shape),
        scale,
        row.epsilon,
        center=adjoint.static.center,
        with_scale=wanted.scale is not None,
        with_bias=wanted.bias is not None,
        backend=adjoint.implementation,
        interpret=interpret,
        one_device=one_device,
    )
    dparams = (None if v is None else v.reshape(found.params) for v in dparams)
    return as_likes((dx.reshape(adjoint.axes.shape), None, *dparams), wanted)


def _columns(axes: Axes) -> View | None:
    """An array as (batch, 1, space, features), reduced over space and, where these are
    in groups, over the features of a group."""
    each, last = axes.per_feature, len(axes.shape) - 1
    found = view(each.working_shape, each.reduce)
    if found is None or found.inner != 1 or each.reduce[-1:] != (last - 1,):
        return None
    return found


def _activated_gradient_unfit(
    interpret: Any, adjoint: Adjoint, normed: Normed, cotangents: Sequence[Any]
) -> str | None:
    dy, *dmoments = cotangents
    problem = _why_not_at_all(adjoint, dmoments) or why_no_gradient(adjoint, normed, dy)
    if problem:
        return problem
    found, small = _columns(adjoint.axes), each_feature(adjoint.axes)
    if found is None:
        return f"the kernel does not reduce {adjoint.axes.reduce}"
    wanted = adjoint.wanted
    params = normed.scale, normed.bias, wanted.scale, wanted.bias
    if not all(v is None or broadcasts(v.shape, small) for v in params):
        return "scale and bias are others along what is reduced"
    shape = found.outer, found.length, found.kept
    return _why_unfit("columns", interpret, adjoint, shape, normed.x, dy)


def _activated_gradient(
    interpret: Any,
    one_device: bool,
    adjoint: Adjoint,
    normed: Normed,
    cotangents: Sequence[Any],
) -> tuple[Array, ...]:
    axes, activation = adjoint.axes, adjoint.static.activation
    found = _columns(axes)
    assert found is not None and adjoint.implementation is not None
    small = each_feature(axes)

    def flat(v: Array) -> Array:
        return jnp.broadcast_to(v, small).reshape(found.outer, found.kept)

    line = normed.line
    line = line._replace(scale=jnp.ones(()) if line.scale is None else line.scale)
    mean, residue, rstd, gain, slope = map(flat, (*line[:4], line.slope))
    shift = flat(jnp.zeros(()) if line.shift is None else line.shift)
    shape = found.outer, found.length, found.kept
    x, dy = normed.x.reshape(shape), cotangents[0].reshape(shape)
    dbias, along = columns.gradient_sums(
        x,
        dy,
        mean,
        slope,
        shift,
        activation=activation,
        backend=adjoint.implementation,
        interpret=interpret,
        one_device=one_device,
    )
    dscale = (along - residue * dbias) * rstd

    def mean_of_group(v: Array) -> Array:
        groups = v.reshape(found.outer, math.prod(axes.stats_shape) // found.outer, -1)
        means = groups.mean(-1, keepdims=True) / found.length
        return jnp.broadcast_to(means, groups.shape).reshape(v.shape)

    level, tilt = mean_of_group(dbias * gain), mean_of_group(dscale * gain)
    level = level if adjoint.static.reduction.center else jnp.zeros_like(level)
    # Or XLA would take them for parts of one program, and write d to memory.
    x, dy, level, tilt = lax.optimization_barrier((x, dy, level, tilt))
    offset, d = columns.cotangent(activation, x, dy, mean, slope, shift)
    x_hat = (offset - residue[:, None]) * rstd[:, None]
    dx = (d * gain[:, None] - level[:, None] - x_hat * tilt[:, None]) * rstd[:, None]
    sums = dscale.reshape(small), dbias.reshape(small)
    return as_likes((dx.reshape(axes.shape), None, *sums), adjoint.wanted)
