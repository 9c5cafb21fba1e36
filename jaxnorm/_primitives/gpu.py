"""The kernels for NVIDIA's GPUs: which arrays they serve, and how they are called."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxnorm._axes import Axes, Shape, is_known
from jaxnorm._kernels import columns, rows, support
from jaxnorm._primitives._linear import Adjoint
from jaxnorm._primitives._operation import Kernel
from jaxnorm._primitives._views import View, as_like, broadcasts, row_view, view
from jaxnorm._primitives.activated import Normed
from jaxnorm._primitives.columns import each_feature
from jaxnorm._primitives.rows import Row, RowChange, why_no_gradient

NAME = "a kernel for NVIDIA's GPUs"


def row_gradient(interpret: Any = False) -> Kernel:
    """The gradient of rows, which takes their moments again.

    `interpret` runs it without a GPU, as Pallas means it.
    """
    formula = functools.partial(_row_gradient, interpret)
    return Kernel(
        functools.partial(formula, True),
        functools.partial(_row_gradient_unfit, interpret),
        lambda: NAME,
        functools.partial(formula, False),
    )


def activated_gradient(interpret: Any = False) -> Kernel:
    """The gradient of an activated norm by one kernel of sums, which reads x and y's
    cotangent once; `interpret` as there."""
    formula = functools.partial(_activated_gradient, interpret)
    return Kernel(
        functools.partial(formula, True),
        functools.partial(_activated_gradient_unfit, interpret),
        lambda: NAME,
        functools.partial(formula, False),
    )


def _row_gradient_unfit(
    interpret: Any, adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> str | None:
    problem = _not_asked_for(adjoint) or why_no_gradient(adjoint, row, cotangents)
    if problem:
        return problem
    if any(v is not None for v in cotangents[2:]):
        return "the moments have cotangents"
    found = row_view(adjoint.axes, *_params(adjoint, row))
    assert found is not None
    shape = found.outer * found.rows, found.features
    return _unfit("rows", interpret, adjoint, shape, row.x, cotangents[1])


def _not_asked_for(adjoint: Adjoint) -> str | None:
    if adjoint.implementation in support.BACKENDS:
        return None
    return 'it runs only where implementation="triton" or "mosaic" asks for it'


def _unfit(
    pattern: str, interpret: Any, adjoint: Adjoint, shape: Shape, *arrays: Any
) -> str | None:
    """Why an array of `shape` is none for the kernels of `pattern`."""
    backend = adjoint.implementation
    assert backend is not None
    dtypes = (v.dtype for v in arrays)
    problem = support.why_unfit(pattern, backend, shape, *dtypes)
    return problem or (None if interpret else support.why_not_on_this_gpu(backend))


def _params(adjoint: Adjoint, row: Row) -> tuple[Any, ...]:
    like: RowChange = jax.tree.unflatten(adjoint.tree, adjoint.like)
    return row.scale, like.scale, like.bias


def _row_gradient(
    interpret: Any,
    one_device: bool,
    adjoint: Adjoint,
    row: Row,
    cotangents: Sequence[Any],
) -> tuple[Array, ...]:
    axes, like = adjoint.axes, jax.tree.unflatten(adjoint.tree, adjoint.like)
    found = row_view(axes, *_params(adjoint, row))
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
        with_scale=like.scale is not None,
        with_bias=like.bias is not None,
        backend=adjoint.implementation,
        interpret=interpret,
        one_device=one_device,
    )
    dparams = (None if v is None else v.reshape(found.params) for v in dparams)
    grads = dx.reshape(axes.shape), None, *dparams
    return tuple(
        as_like(v, struct)
        for v, struct in zip(grads, like, strict=True)
        if struct is not None
    )


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
    like: RowChange = jax.tree.unflatten(adjoint.tree, adjoint.like)
    dy, *dmoments = cotangents
    if like.epsilon is not None or normed.epsilon.ndim:
        return "the kernel takes one epsilon, and gives no gradient of it"
    if dy is None or any(v is not None for v in dmoments):
        return "not y alone has a cotangent"
    if normed.scale is None and like.scale is not None:
        return "there is a gradient of a scale that is None"
    if not is_known(*adjoint.axes.shape):
        return f"sizes are open in the shape {adjoint.axes.shape}"
    found, small = _columns(adjoint.axes), each_feature(adjoint.axes)
    if found is None:
        return f"the kernel does not reduce {adjoint.axes.reduce}"
    params = normed.scale, normed.bias, like.scale, like.bias
    if not all(v is None or broadcasts(v.shape, small) for v in params):
        return "scale and bias are others along what is reduced"
    shape = found.outer, found.length, found.kept
    return _unfit("columns", interpret, adjoint, shape, normed.x, dy)


def _activated_gradient(
    interpret: Any,
    one_device: bool,
    adjoint: Adjoint,
    normed: Normed,
    cotangents: Sequence[Any],
) -> tuple[Array, ...]:
    axes, like = adjoint.axes, jax.tree.unflatten(adjoint.tree, adjoint.like)
    activation, found = adjoint.static.activation, _columns(axes)
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
    grads = dx.reshape(axes.shape), None, *sums
    return tuple(
        as_like(v, struct)
        for v, struct in zip(grads, like, strict=True)
        if struct is not None
    )
