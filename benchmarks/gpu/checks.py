"""Whether kernels are right on the device: against float64, and against themselves.

All shapes of arrays, ragged ones among them; values far from 0, constant, infinite and
NaN; mapped, on a mesh, and with rematerialization; more than 2**31 elements. Each
program runs three times, after memory of its size has been filled with NaN, and has to
give the same bits.
"""

import functools
import itertools
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

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4}
KERNEL = "a kernel for NVIDIA's GPUs"
USUAL = "0.3 +- 1.5"
LAYER, RMS = jaxnorm.layer_norm, jaxnorm.rms_norm


def items(settings: Settings) -> Iterator[Item]:
    """For one backend."""
    jax.config.update("jax_enable_x64", True)  # for the references
    if settings.dry_run:
        interpret_kernels()
    plan = settings.plan
    (backend,) = settings.backends
    rows = functools.partial(_rows_item, backend)
    columns = functools.partial(_columns_item, backend)
    largest = max(plan.check_rows, key=math.prod)
    for shape in plan.check_rows:
        yield rows(shape, "bfloat16", skip=True)
        yield rows(shape, "float32", skip=False)
    for shape, activation in itertools.product(plan.check_columns, ("silu", "relu")):
        yield columns(shape, "bfloat16", activation)
    yield _many_rows_item(backend, plan.many_rows)
    middle = plan.check_rows[len(plan.check_rows) // 2]
    for values in plan.check_values:
        yield rows(middle, "float32", skip=True, values=values)
        yield columns(plan.check_columns[0], "float32", "relu", values=values)
    for way in WAYS:
        yield rows(middle, "bfloat16", skip=True, way=way)
    yield rows(largest, "float16", skip=True)
    yield rows(largest, "bfloat16", skip=True, norm=RMS)
    yield rows(middle, "bfloat16", skip=False, norm=RMS, scale=False)
    yield rows(middle, "bfloat16", skip=False, scale=False)
    yield rows(middle, "bfloat16", skip=True, wide=True)
    for shape, dtype in itertools.product(plan.check_columns, ("float32", "float16")):
        yield columns(shape, dtype, "silu")
        yield columns(shape, dtype, "relu")


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
    row = {"pattern": "rows", "backend": backend, "dtype": dtype, "case": case}
    row |= {"shape": list(shape)}
    names = ["scale"] * scale + ["bias"] * (scale and norm is LAYER)
    settings = {"implementation": backend, "epsilon": reference.EPSILON}
    of = reference.layer_norm if norm is LAYER else reference.rms_norm

    def layer(x, *params):
        s, y = norm(x, *params, residual=0, **settings)
        y = y.astype(jnp.float32) if wide else y
        return (s, y) if skip else y

    def exact(x, *params):
        y = of(x, *params, *[None] * (2 - len(params)))
        return (x, y) if skip else y

    def run() -> Iterator[Row]:
        x = _values(values, shape, dtype, 0)
        params = [_values(USUAL, shape[-1:], "float32", k) for k, _ in enumerate(names)]
        ds, dy = (_values(USUAL, shape, dtype, k) for k in (5, 6))
        dy = dy.astype(jnp.float32) if wide else dy
        program = functools.partial(reference.gradients, WAYS[way](layer))
        cotangents = (ds, dy) if skip else dy
        check = functools.partial(_check, row, values, ["x", *names])
        yield from check(program, exact, (x, *params), cotangents)

    return Item(f"{backend} {case} {dtype} {shape}", run)


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
    """More elements than 32 bits count: some rows against float64."""
    row = {"pattern": "rows", "backend": backend, "dtype": "bfloat16"}
    row |= {"shape": list(shape), "case": "many rows"}

    def run() -> Iterator[Row]:
        x, dy = (_values(USUAL, shape, "bfloat16", k) for k in (0, 6))
        some = jnp.linspace(0, shape[0] - 1, 64).astype(jnp.int32)

        def gradient(x, dy):
            layer = functools.partial(LAYER, implementation=backend)
            return reference.gradients(layer, (x,), dy)[1][0]

        by_kernel = KERNEL in str(models.implementations(gradient, x, dy))
        got = jax.jit(lambda x, dy: gradient(x, dy)[some])(x, dy)
        args = x[some].astype(jnp.float64), dy[some].astype(jnp.float64)
        layer = functools.partial(reference.layer_norm, scale=None, bias=None)
        want = reference.gradients(layer, args[:1], args[1])[1][0]
        error, limit = _error(got, want), _limit("bfloat16", got.size)
        yield row | {
            "quantity": "dx",
            "by_kernel": by_kernel,
            "error": error,
            "limit": limit,
            "repeatable": True,
            "ok": error <= limit,
        }

    return Item(f"{backend} many rows {shape}", run)


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
    row = {"pattern": "columns", "backend": backend, "dtype": dtype, "case": case}
    row |= {"shape": list(shape)}
    settings = {"num_groups": groups, "activation": activation}
    given = {"implementation": backend, "epsilon": reference.EPSILON}
    ours = functools.partial(jaxnorm.group_norm, **settings, **given)
    exact = functools.partial(reference.group_norm, **settings)

    def run() -> Iterator[Row]:
        params = [_values(USUAL, shape[-1:], "float32", k) for k in (1, 2)]
        x, dy = _values(values, shape, dtype, 0), _values(USUAL, shape, dtype, 6)
        program = functools.partial(reference.gradients, ours)
        check = functools.partial(_check, row, values, ["x", "scale", "bias"])
        yield from check(program, exact, (x, *params), dy)

    return Item(f"{backend} {case} {dtype} {shape}", run)


# ---- Both --------------------------------------------------------------------------


def _check(
    row: Row,
    values: str,
    names: list[str],
    program: Callable[..., Any],
    exact: Callable[..., Any],
    args: tuple[Array, ...],
    cotangents: Any,
) -> Iterator[Row]:
    """A row for the result and for each gradient.

    Where an example is not finite, what is summed over the examples is not, either:
    then the others' results and gradients have to be right.
    """
    wide = jax.tree.map(lambda v: v.astype(jnp.float64), (args, cotangents))
    want = jax.jit(functools.partial(reference.gradients, exact))(*wide)
    by_kernel = KERNEL in str(models.implementations(program, args, cotangents))
    run = jax.jit(program)
    found = []
    for _ in range(3):
        _poison(args[0])
        found.append(jax.block_until_ready(run(args, cotangents)))
    bad = values in ("nan", "inf")
    for name, got, ref, *again in zip(
        ["y", *(f"d{name}" for name in names)],
        *(_of_interest(v) for v in (found[0], want, *found[1:])),
        strict=True,
    ):
        if bad and got.shape != args[0].shape:
            continue
        same = all(np.array_equal(got, v, equal_nan=True) for v in again)
        got, ref = (v[1:] if bad else v for v in (got, ref))
        error, limit = _error(got, ref), _limit(row["dtype"], got.size)
        yield row | {
            "quantity": name,
            "by_kernel": by_kernel,
            "error": error,
            "limit": limit,
            "repeatable": same,
            "ok": error <= limit and same,
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
        x = jnp.full(shape, 3.0) + jnp.arange(shape[0]).reshape(
            -1, *[1] * (len(shape) - 1)
        )
    elif kind == "outlier":
        # In each column, and where each row begins.
        x = (normal + 1e4).at[(slice(None), 0)].set(0.0)
    else:
        x = normal.at[0].set(float(kind))
    return x.astype(dtype)


def _error(got: Array, want: Array) -> float:
    """||got - want|| / ||want||, which NaN in either of them makes infinite."""
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    norm, off = np.linalg.norm(want), np.linalg.norm(got - want)
    error = off / norm if norm else off
    return float(error) if np.isfinite(error) else math.inf


def _limit(dtype: str, size: int) -> float:
    return LIMITS[dtype] * (
        max(1.0, math.sqrt(size / 1e6)) if dtype == "float32" else 1
    )


def _poison(x: Array) -> None:
    """Leaves NaN in the memory that the allocator hands out next."""
    for _ in range(3):
        jax.block_until_ready(jnp.full(x.shape, jnp.nan, x.dtype)).delete()
