"""Whether kernels are right on the device: against float64, and against themselves.

All shapes of arrays, ragged ones among them; values far from 0, constant, infinite and
NaN; mapped, on a mesh, and with rematerialization; more than 2**31 elements. Each
program runs three times, after memory of its size has been filled with NaN, and has to
give the same bits.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from gpu import reference
from gpu.interpreted import interpret_kernels
from gpu.plan import Settings, Shape
from gpu.work import Item, Row
from jaxnorm import models
from jaxnorm._kernels import support

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4}
# An outlier in each sum magnifies the rounding of all other terms, in any formula.
OUTLIER = 10
KERNEL = "a kernel for NVIDIA's GPUs"
USUAL = "0.3 +- 1.5"
LAYER, RMS = jaxnorm.layer_norm, jaxnorm.rms_norm


def items(settings: Settings) -> Iterator[Item]:
    """For one backend, in order of value."""
    jax.config.update("jax_enable_x64", True)  # for the references
    if settings.dry_run:
        interpret_kernels()
    plan = settings.plan
    (backend,) = settings.backends
    rows = functools.partial(_rows_item, backend)
    columns = functools.partial(_columns_item, backend)
    special, maps = plan.special_rows, plan.special_columns
    for shape in plan.check_rows:
        yield rows(shape, "bfloat16", skip=True)
    for shape in plan.check_columns:
        yield columns(shape, "bfloat16", "silu")
    yield _many_rows_item(backend, plan.many_rows)
    for values in plan.check_values:
        yield rows(special, "float32", skip=True, values=values)
        yield columns(maps, "float32", "relu", values=values)
    for way in list(WAYS)[1:]:
        yield rows(special, "bfloat16", skip=True, way=way)
    for shape in plan.check_rows[:4]:
        yield rows(shape, "float32", skip=False)
    for shape in plan.check_columns[:2]:
        yield columns(shape, "float32", "silu")
    yield rows(special, "float16", skip=True)
    yield columns(maps, "float16", "silu")
    yield rows(special, "bfloat16", skip=True, norm=RMS)
    yield rows(special, "bfloat16", skip=False, norm=RMS, scale=False)
    yield rows(special, "bfloat16", skip=False, scale=False)
    yield rows(special, "bfloat16", skip=False, wide=True)


# ---- Rows --------------------------------------------------------------------------


def _rows_item(
    backend: str,
    shape: Shape,
    dtype: str,
    *,
    skip: bool,
    norm: Callable[..., Any] = LAYER,
    scale: bool = True,
    values: str = USUAL,
    way: str = "jit",
    wide: bool = False,
) -> Item:
    """A norm of rows, of a sum that is handed on with `skip`; its result is float32
    where it is `wide`."""
    marks = [way, values, "skip" * skip, "no scale" * (not scale), "wide" * wide]
    case = ", ".join([norm.__name__, *filter(None, marks)])
    names = ["scale"] * scale + ["bias"] * (scale and norm is LAYER)
    settings = {"implementation": backend, "epsilon": reference.EPSILON}
    of = reference.layer_norm if norm is LAYER else reference.rms_norm

    def layer(x, *params):
        if wide:
            given = dict(zip(names, params, strict=True))
            of_wide = jaxnorm.LayerNorm(**settings)
            return of_wide(x, given, {}, dtype=jnp.float32)[0]
        s, y = norm(x, *params, residual=0, **settings)
        return (s, y) if skip else y

    def exact(x, *params):
        y = of(x, *params, *[None] * (2 - len(params)))
        return (x, y) if skip else y

    def given() -> tuple[Any, Any]:
        x = _values(values, shape, dtype, 0)
        params = [
            _values(USUAL, shape[-1:], "float32", 10 + k) for k in range(len(names))
        ]
        ds, dy = (_values(USUAL, shape, dtype, k) for k in (5, 6))
        dy = _values(USUAL, shape, "float32", 6) if wide else dy
        return (x, *params), (ds, dy) if skip else dy

    row = _row("rows", backend, shape, dtype, case)
    row["fits"] &= way != "vmap, scale too"
    return _item(row, values, names, WAYS[way](layer), exact, given)


def _mapped(f: Callable[..., Any]) -> Callable[..., Any]:
    """Each row by itself."""
    return lambda x, *params: jax.vmap(lambda row: f(row[None], *params))(x)


def _mapped_with_parameters(f: Callable[..., Any]) -> Callable[..., Any]:
    def mapped(x, *params):
        each = [jnp.broadcast_to(v, (x.shape[0], *v.shape)) for v in params]
        return jax.vmap(lambda row, *params: f(row[None], *params))(x, *each)

    return mapped


def _on_a_mesh(f: Callable[..., Any]) -> Callable[..., Any]:
    def on_it(x, *params):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P("data"))
        return f(jax.lax.with_sharding_constraint(x, sharding), *params)

    return on_it


WAYS: dict[str, Callable[..., Any]] = {
    "jit": lambda f: f,
    "vmap": lambda f: _flat(_mapped(f)),
    "vmap, scale too": lambda f: _flat(_mapped_with_parameters(f)),
    "mesh": _on_a_mesh,
    "remat": jax.checkpoint,
}


def _flat(f: Callable[..., Any]) -> Callable[..., Any]:
    """Without the axis of one row in each example."""
    return lambda x, *params: jax.tree.map(lambda v: v[:, 0], f(x, *params))


def _many_rows_item(backend: str, shape: Shape) -> Item:
    """More elements than 32 bits count: some rows against float64, twice."""
    row = _row("rows", backend, shape, "bfloat16", "many rows") | {"quantity": "dx"}

    def run() -> Iterator[Row]:
        x, dy = (_values(USUAL, shape, "bfloat16", k) for k in (0, 6))
        some = jnp.linspace(0, shape[0] - 1, 64).astype(jnp.int32)

        def gradient(x, dy):
            layer = functools.partial(LAYER, implementation=backend)
            return reference.gradients(layer, (x,), dy)[1][0]

        by_kernel = KERNEL in str(models.implementations(gradient, x, dy))
        of_some = jax.jit(lambda x, dy: gradient(x, dy)[some])
        got, again = of_some(x, dy), of_some(x, dy)
        args = x[some].astype(jnp.float64), dy[some].astype(jnp.float64)
        layer = functools.partial(reference.layer_norm, scale=None, bias=None)
        want = reference.gradients(layer, args[:1], args[1])[1][0]
        yield row | _verdict(row, got, want, [again], by_kernel)

    return Item(f"{backend} rows, many: {shape}", run)


# ---- Columns -----------------------------------------------------------------------


def _columns_item(
    backend: str,
    shape: Shape,
    dtype: str,
    activation: str,
    values: str = USUAL,
) -> Item:
    """Group norm of (batch, space, features) and its activation."""
    groups = next(n for n in (32, 8, 1) if shape[-1] % n == 0)
    case = f"group_norm + {activation}, {values}"
    settings = {"num_groups": groups, "activation": activation}
    own = {"implementation": backend, "epsilon": reference.EPSILON}
    ours = functools.partial(jaxnorm.group_norm, **settings, **own)
    exact = functools.partial(reference.group_norm, **settings)

    def given() -> tuple[Any, Any]:
        params = [_values(USUAL, shape[-1:], "float32", k) for k in (11, 12)]
        x, dy = _values(values, shape, dtype, 0), _values(USUAL, shape, dtype, 6)
        if activation == "relu":
            # Where rounding decides about the sign, both gradients are right.
            wide = (v.astype(jnp.float64) for v in (x, *params))
            z = reference.group_norm(*wide, num_groups=groups, activation="none")
            dy = jnp.where(abs(z) < 1e-5, jnp.zeros_like(dy), dy)
        return (x, *params), dy

    row = _row("columns", backend, shape, dtype, case)
    return _item(row, values, ["scale", "bias"], ours, exact, given)


# ---- Both --------------------------------------------------------------------------


def _row(pattern: str, backend: str, shape: Shape, dtype: str, case: str) -> Row:
    """What is known of a check before it runs; whether the kernel is to serve."""
    return {
        "pattern": pattern,
        "backend": backend,
        "dtype": dtype,
        "case": case,
        "shape": list(shape),
        "fits": not support.why_unfit(pattern, backend, shape, dtype),
    }


def _item(
    row: Row,
    values: str,
    names: list[str],
    ours: Callable[..., Any],
    exact: Callable[..., Any],
    given: Callable[[], tuple[Any, Any]],
) -> Item:
    """Both are compiled in threads; the arrays are made where they are used."""
    program, reference_of = (
        functools.partial(reference.gradients, f) for f in (ours, exact)
    )

    def compiled(f: Callable[..., Any], given: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: jax.jit(f).lower(*jax.eval_shape(given)).compile()

    def widened() -> Any:
        return _widened(given())

    def run(ours: Any, exact: Any) -> Iterator[Row]:
        arrays = given()
        by_kernel = KERNEL in str(models.implementations(program, *arrays))
        yield from _check(row, values, names, ours, exact, arrays, by_kernel)

    name = "{backend} {pattern}, {case}, {dtype} {shape}".format(**row)
    builds = compiled(program, given), compiled(reference_of, widened)
    return Item(name, run, builds)


def _widened(arrays: Any) -> Any:
    return jax.tree.map(lambda v: v.astype(jnp.float64), arrays)


def _check(
    row: Row,
    values: str,
    names: list[str],
    program: Callable[..., Any],
    exact: Callable[..., Any],
    arrays: tuple[Any, Any],
    by_kernel: bool,
) -> Iterator[Row]:
    """A row for the result and for each gradient.

    Where an example is not finite, what is summed over the examples is not, either:
    then the others' results and gradients have to be right.
    """
    want = exact(*_widened(arrays))
    x = arrays[0][0]
    found = []
    for _ in range(3):
        _poison(x)
        found.append(jax.block_until_ready(program(*arrays)))
    bad = values in ("nan", "inf")
    slack = OUTLIER if values == "outlier" else 1
    for name, got, ref, *again in zip(
        ["y", "dx", *(f"d{name}" for name in names)],
        *(_of_interest(v) for v in (found[0], want, *found[1:])),
        strict=True,
    ):
        if bad and got.shape != x.shape:
            continue
        if bad:
            got, ref, *again = (v[1:] for v in (got, ref, *again))
        verdict = _verdict(row, got, ref, again, by_kernel, x.size, slack)
        yield row | {"quantity": name} | verdict


def _verdict(
    row: Row,
    got: Array,
    want: Array,
    again: list[Array],
    by_kernel: bool,
    summed: int = 1,
    slack: float = 1,
) -> Row:
    """What is right: near the reference, the same bits each time, and by a kernel where
    one fits."""
    limit = slack * _limit(got.dtype.name, max(summed, got.size))
    error = _error(got, want)
    same = all(np.asarray(v).tobytes() == np.asarray(got).tobytes() for v in again)
    return {
        "by_kernel": by_kernel,
        "error": error,
        "limit": limit,
        "repeatable": same,
        "ok": error <= limit and same and by_kernel == row["fits"],
    }


def _of_interest(found: Any) -> list[Array]:
    """y and the gradients."""
    result, gradients = found
    y = result[-1] if isinstance(result, tuple | list) else result
    return [y, *gradients]


def _values(kind: str, shape: Shape, dtype: str, seed: int) -> Array:
    """Random numbers; of the special kinds, the first row or example is special."""
    normal = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
    mean, _, std = kind.partition(" +- ")
    if std:
        x = normal * float(std) + float(mean)
    elif kind == "constant":
        each = jnp.arange(3.0, 3 + shape[0])
        x = jnp.broadcast_to(each.reshape(-1, *[1] * (len(shape) - 1)), shape)
    elif kind == "outlier":
        # In each column, and where each row begins.
        x = (normal + 1e4).at[(slice(None), 0)].set(0.0)
    else:
        x = normal.at[0].set(float(kind))
    return x.astype(dtype)


def _error(got: Array, want: Array) -> float:
    """||got - want|| / ||want||, which NaN in either of them makes infinite; of what
    should be 0, its size beside 1e-6."""
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    least = 1e-6 * math.sqrt(want.size)
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), least)
    return float(error) if np.isfinite(error) else math.inf


def _limit(dtype: str, size: int) -> float:
    grows = max(1.0, math.sqrt(size / 1e6)) if dtype == "float32" else 1.0
    return LIMITS[dtype] * grows


def _poison(x: Array) -> None:
    """Leaves NaN in the memory that the allocator hands out next."""
    sizes = [x.size, x.size, x.size, x.size // 2 + 1, x.shape[-1], x.shape[-1]]
    held = [jnp.full(n, jnp.nan, x.dtype) for n in sizes]
    for v in jax.block_until_ready(held):
        v.delete()
