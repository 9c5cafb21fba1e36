"""The operations by the kernels for CPUs, and what these do not serve."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxnorm._axes import Axes, is_known
from jaxnorm._cpu import library
from jaxnorm._dtypes import at_least_float32
from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives._linear import Adjoint
from jaxnorm._primitives._operation import Kernel, Reduction, Struct
from jaxnorm._primitives._views import (
    RowView,
    as_likes,
    broadcasts,
    reduced,
    row_view,
    view,
)
from jaxnorm._primitives.affine import affine
from jaxnorm._primitives.columns import Centered, Terms
from jaxnorm._primitives.rows import Row, gradient_view, why_no_row_gradient
from jaxnorm._working import from_working, to_working

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _name() -> str:
    return f"a kernel for {library.name()}"


def _why_unfit(axes: Axes, mask: Any, *arrays: Any) -> str | None:
    names = {jnp.dtype(v.dtype).name for v in arrays if v is not None}
    unknown = sorted(names - {*DTYPES})
    if unknown:
        return f"the kernels take {', '.join(DTYPES)}, not {unknown[0]}"
    if "float64" in names and len(names) > 1:
        return f"the kernels do not mix {' and '.join(sorted(names))}"
    if mask is not None:
        return "the kernels take no mask"
    if not is_known(*axes.shape):
        return f"sizes are open in the shape {axes.shape}"
    return library.problem()


def _no_view(axes: Axes, reduce: Sequence[int]) -> str:
    return (
        f"no kernel reduces the axes {tuple(reduce)} of an array of shape "
        f"{axes.working_shape}"
    )


def _moments_unfit(reduction: Reduction, x: Any, mask: Any, size: Any) -> str | None:
    each = reduction.axes.per_feature
    if view(each.working_shape, each.reduce) is None:
        return _no_view(each, each.reduce)
    return _why_unfit(each, mask, x)


def _moments(
    reduction: Reduction, x: Array, mask: None, size: None
) -> tuple[Array, ...]:
    axes, center = reduction.axes, reduction.center

    def each_of(axes: Axes, x: Array) -> formulas.MeanVarResidue:
        found = view(axes.working_shape, axes.reduce)
        assert found is not None
        small = Struct(axes.stats_shape, at_least_float32(x.dtype))
        call = jax.ffi.ffi_call("jaxnorm_moments", (small, small, small))
        mean, var, residue = call(x, center=center, **found.attributes)
        return mean, var, residue

    if axes.per_feature == axes:
        return each_of(axes, x)
    return formulas.feature_by_feature(axes, x, each_of)


MOMENTS = Kernel(_moments, _moments_unfit, _name)


def _sums_unfit(
    adjoint: Adjoint, centered: Centered, cotangents: Sequence[Any]
) -> str | None:
    axes = adjoint.axes
    (array,) = cotangents
    like = adjoint.wanted
    if like.slope is None and like.shift is None:
        return "nothing is summed"
    shapes = {v.shape for v in (like.slope, like.shift) if v is not None}
    small = shapes.pop()
    if shapes or not broadcasts(centered.mean.shape, small):
        return "the sums and the mean are of several shapes"
    reduce = reduced(axes.working_shape, small)
    if view(axes.working_shape, reduce) is None:
        return _no_view(axes, reduce)
    return _why_unfit(axes, centered.mask, centered.x, array)


def _sums(
    adjoint: Adjoint, centered: Centered, cotangents: Sequence[Any]
) -> tuple[Array, ...]:
    axes = adjoint.axes
    x, _, mean, gain = centered
    (array,) = cotangents
    like = adjoint.wanted
    shape = (like.shift if like.slope is None else like.slope).shape
    found = view(axes.working_shape, reduced(axes.working_shape, shape))
    assert found is not None
    mean, small = jnp.broadcast_to(mean, shape), Struct(shape, mean.dtype)
    call = jax.ffi.ffi_call("jaxnorm_sums", (small, small))
    shift, slope = call(x, array, mean, **found.attributes)
    spread = None
    if like.array is not None:
        wide = affine(to_working(array, None, axes), gain, None)
        spread = from_working(wide, None, axes, like.array.dtype)
    rest = None if like.rest is None else array.astype(like.rest.dtype)
    found = Terms(spread, slope, shift, rest)
    return tuple(v for v, wanted in zip(found, like, strict=True) if wanted is not None)


SUMS = Kernel(_sums, _sums_unfit, _name)


def _row_norm_unfit(
    reduction: Reduction, x: Any, epsilon: Any, scale: Any, bias: Any
) -> str | None:
    if row_view(reduction.axes, scale, bias) is None:
        return "scale and bias are others for each row"
    if epsilon.ndim:
        return "there are several epsilons"
    if reduction.dtype != x.dtype:
        return f"the kernel of rows does not make {reduction.dtype} of {x.dtype}"
    return _why_unfit(reduction.axes, None, x)


def _row_norm(
    reduction: Reduction, x: Array, epsilon: Array, scale: Any, bias: Any
) -> tuple[Array, ...]:
    axes, center = reduction.axes, reduction.center
    found = row_view(axes, scale, bias)
    assert found is not None
    wide = at_least_float32(x.dtype)
    small = Struct(axes.stats_shape, wide)
    call = jax.ffi.ffi_call(
        "jaxnorm_row_norm", (Struct(axes.shape, x.dtype), small, small, small)
    )
    params = _params(found, wide, scale, bias)
    attributes = found.attributes(center, scale, bias)
    return x, *call(x, epsilon.astype(wide), *params, **attributes)


def _params(found: RowView, dtype: DTypeLike, *params: Any) -> list[Array]:
    return [
        jnp.broadcast_to(v, found.params).astype(dtype) for v in params if v is not None
    ]


ROW_NORM = Kernel(_row_norm, _row_norm_unfit, _name)


def _row_gradient_unfit(
    adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> str | None:
    dy = cotangents[1]
    problem = why_no_row_gradient(adjoint, row, dy)
    if problem:
        return problem
    if dy.dtype not in (row.x.dtype, jnp.float32):
        return f"the kernel of rows does not mix {dy.dtype} and {row.x.dtype}"
    return _why_unfit(adjoint.axes, None, row.x, dy)


def _row_gradient(
    adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> tuple[Array, ...]:
    axes, like = adjoint.axes, adjoint.wanted
    x, epsilon, scale, mean, var, residue = row
    wide = mean.dtype
    found = gradient_view(adjoint, row)
    assert found is not None
    skip, dy, *dmoments = cotangents
    has_moments = any(v is not None for v in dmoments)
    dmoments = [jnp.zeros((), wide) if v is None else v for v in dmoments]
    given = mean, var, residue, *dmoments
    mean, var, residue, *dmoments = (
        jnp.broadcast_to(v, axes.stats_shape) for v in given
    )
    wanted = [Struct(found.params, wide) for v in (scale, like.bias) if v is not None]
    call = jax.ffi.ffi_call(
        "jaxnorm_row_gradient", (Struct(axes.shape, x.dtype), *wanted)
    )
    attributes = found.attributes(adjoint.static.center, scale, like.bias)
    dx, *dparams = call(
        x,
        dy,
        epsilon.astype(wide),
        mean,
        var,
        residue,
        *_params(found, wide, scale),
        *(dmoments if has_moments else ()),
        has_moments=has_moments,
        **attributes,
    )
    dx = dx if skip is None else dx + skip
    dscale = None if scale is None else dparams.pop(0)
    dbias = dparams.pop(0) if dparams else None
    return as_likes((dx, None, dscale, dbias), like)


ROW_GRADIENT = Kernel(_row_gradient, _row_gradient_unfit, _name)
