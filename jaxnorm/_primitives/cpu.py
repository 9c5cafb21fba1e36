"""The operations by the kernels for CPUs, and what these do not serve."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jaxnorm._axes import Axes, Shape, is_known
from jaxnorm._cpu import library
from jaxnorm._dtypes import at_least_float32
from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives._operation import Adjoint, Kernel, Reduction
from jaxnorm._primitives.columns import Centered, Terms
from jaxnorm._primitives.rows import Row, RowChange

Struct = jax.ShapeDtypeStruct
HALVES = ("bfloat16", "float16")
DTYPES = ("float32", *HALVES, "float64")


class View(NamedTuple):
    """An array as (outer, length, kept, inner), reduced over length and inner."""

    outer: int
    length: int
    kept: int
    inner: int

    @property
    def attributes(self) -> dict[str, np.int64]:
        return {k: np.int64(v) for k, v in self._asdict().items()}


def view(shape: Shape, reduce: Sequence[int]) -> View | None:
    """An array of `shape`, reduced over the axes `reduce`; None where it is no view."""
    runs: list[tuple[bool, int]] = []
    for a, n in enumerate(shape):
        if n == 1:
            continue
        is_reduced = a in reduce
        if runs and runs[-1][0] == is_reduced:
            runs[-1] = is_reduced, runs[-1][1] * n
        else:
            runs.append((is_reduced, n))
    found = View(1, 1, 1, 1)
    if runs and runs[-1][0]:
        found = found._replace(inner=runs.pop()[1])
    for name, is_reduced in (("kept", False), ("length", True), ("outer", False)):
        if runs and runs[-1][0] == is_reduced:
            found = found._replace(**{name: runs.pop()[1]})
    return None if runs else found


def _reduced(shape: Shape, small: Shape) -> tuple[int, ...]:
    """The axes along which an array of `small` shape is broadcast to `shape`."""
    return tuple(a for a, (n, m) in enumerate(zip(shape, small, strict=True)) if n != m)


def _name() -> str:
    return f"a kernel for {library.name()}"


def _broadcasts(shape: Shape, to: Shape) -> bool:
    return all(m in (1, n) for m, n in zip(shape, to, strict=True))


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
    mean, var, residue = formulas.feature_by_feature(axes, x, each_of)
    zero = jnp.zeros_like(mean)
    return (mean, var, residue) if center else (zero, var, zero)


MOMENTS = Kernel(_moments, _moments_unfit, _name)


def _sums_unfit(
    adjoint: Adjoint, centered: Centered, cotangents: Sequence[Any]
) -> str | None:
    axes = adjoint.axes
    (array,) = cotangents
    like = jax.tree.unflatten(adjoint.tree, adjoint.like)
    if like.slope is None and like.shift is None:
        return "nothing is summed"
    shapes = {v.shape for v in (like.slope, like.shift) if v is not None}
    small = shapes.pop()
    if shapes or not _broadcasts(centered.mean.shape, small):
        return "the sums and the mean are of several shapes"
    reduce = _reduced(axes.working_shape, small)
    if view(axes.working_shape, reduce) is None:
        return _no_view(axes, reduce)
    return _why_unfit(axes, centered.mask, centered.x, array)


def _sums(
    adjoint: Adjoint, centered: Centered, cotangents: Sequence[Any]
) -> tuple[Array, ...]:
    axes = adjoint.axes
    x, _, mean, gain = centered
    (array,) = cotangents
    like = jax.tree.unflatten(adjoint.tree, adjoint.like)
    shape = (like.shift if like.slope is None else like.slope).shape
    found = view(axes.working_shape, _reduced(axes.working_shape, shape))
    assert found is not None
    mean, small = jnp.broadcast_to(mean, shape), Struct(shape, mean.dtype)
    call = jax.ffi.ffi_call("jaxnorm_sums", (small, small))
    shift, slope = call(x, array, mean, **found.attributes)
    spread = None
    if like.array is not None:
        wide = array.astype(mean.dtype).reshape(axes.working_shape)
        wide = wide if gain is None else wide * gain
        spread = wide.reshape(axes.shape).astype(like.array.dtype)
    rest = None if like.rest is None else array.astype(like.rest.dtype)
    found = Terms(spread, slope, shift, rest)
    return tuple(v for v, wanted in zip(found, like, strict=True) if wanted is not None)


SUMS = Kernel(_sums, _sums_unfit, _name)


class RowView(NamedTuple):
    """Rows as (outer, rows, features), where parameters differ along outer alone."""

    outer: int
    rows: int
    features: int
    params: Shape  # of parameters in the working shape

    @property
    def param_outer(self) -> int:
        return math.prod(self.params[:-1])

    def attributes(self, center: bool, scale: Any, bias: Any) -> dict[str, Any]:
        sizes = self._asdict() | {"param_outer": self.param_outer}
        del sizes["params"]
        flags = {"has_scale": scale is not None, "has_bias": bias is not None}
        return {k: np.int64(v) for k, v in sizes.items()} | flags | {"center": center}


def row_view(axes: Axes, *params: Any) -> RowView | None:
    """Rows with these parameters; None where these differ along inner axes alone."""
    *rows, features = axes.working_shape
    shapes = [v.shape for v in params if v is not None]
    varying = [a for a in range(len(rows)) if any(s[a] != 1 for s in shapes)]
    split = max(varying, default=-1) + 1
    if varying and math.prod(rows[split:]) == 1:
        return None
    shape = (*rows[:split], *[1] * (len(rows) - split), features)
    return RowView(math.prod(rows[:split]), math.prod(rows[split:]), features, shape)


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
    return tuple(call(x, epsilon.astype(wide), *params, **attributes))


def _params(found: RowView, dtype: DTypeLike, *params: Any) -> list[Array]:
    return [
        jnp.broadcast_to(v, found.params).astype(dtype) for v in params if v is not None
    ]


ROW_NORM = Kernel(_row_norm, _row_norm_unfit, _name)


def _row_gradient_unfit(
    adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> str | None:
    like: RowChange = jax.tree.unflatten(adjoint.tree, adjoint.like)
    if like.epsilon is not None or row.epsilon.ndim:
        return "the kernel of rows takes one epsilon, and gives no gradient of it"
    dy, *_ = cotangents
    if dy is None:
        return "y has no cotangent"
    if row.scale is None and like.scale is not None:
        return "there is a gradient of a scale that is None"
    if row_view(adjoint.axes, row.scale, like.scale, like.bias) is None:
        return "scale and bias are others for each row"
    if dy.dtype not in (row.x.dtype, jnp.float32):
        return f"the kernel of rows does not mix {dy.dtype} and {row.x.dtype}"
    return _why_unfit(adjoint.axes, None, row.x, dy)


def _row_gradient(
    adjoint: Adjoint, row: Row, cotangents: Sequence[Any]
) -> tuple[Array, ...]:
    axes, like = adjoint.axes, jax.tree.unflatten(adjoint.tree, adjoint.like)
    x, epsilon, scale, mean, var, residue = row
    wide = mean.dtype
    found = row_view(axes, scale, like.scale, like.bias)
    assert found is not None
    dy, *dmoments = cotangents
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
    dscale = None if scale is None else dparams.pop(0)
    dbias = dparams.pop(0) if dparams else None
    return tuple(
        _as_like(v, struct)
        for v, struct in zip((dx, None, dscale, dbias), like, strict=True)
        if struct is not None
    )


def _as_like(v: Any, struct: Struct) -> Array:
    """A gradient summed over the axes along which its parameter is the same."""
    if v.shape != struct.shape:
        v = v.sum(_reduced(v.shape, struct.shape), keepdims=True)
    return v.astype(struct.dtype)


ROW_GRADIENT = Kernel(_row_gradient, _row_gradient_unfit, _name)
