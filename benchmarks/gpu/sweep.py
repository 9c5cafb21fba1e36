"""Other sizes of tiles and grids than the kernels have, in Triton: per multiprocessor
programs and their warps for rows, slabs and the rows of a tile for columns."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from gpu import clock
from gpu.plan import Plan, Settings, Shape
from gpu.times import arrays
from gpu.work import Item, Row
from jaxnorm._kernels import columns, columns_triton, rows, rows_triton, tiles

ROWS = tuple(itertools.product((1, 2, 4), (4, 8, 16)))  # programs per SM, warps
COLUMNS = tuple(itertools.product((2, 4, 8), (16, 32, 64)))  # slabs per SM, rows

Patches = dict[tuple[Any, str], Callable[..., Any]]  # by module and name


def items(settings: Settings) -> Iterator[Item]:
    """The sizes that the kernels have first, then all others at each shape in turn."""
    plan = settings.plan
    if "triton" not in settings.backends:
        return
    few = 1 if settings.dry_run else None
    for setting in (None, *ROWS[:few]):
        for shape in plan.sweep_rows:
            yield _rows(settings, shape, setting)
    for setting in (None, *COLUMNS[:few]):
        for shape in plan.sweep_maps:
            yield _columns(settings, shape, setting)


def _rows(settings: Settings, shape: Shape, setting: tuple[int, int] | None) -> Item:
    """The gradient of layer norm, its partial sums summed."""
    usual = rows_triton._block

    def backward(x: Any, dy: Any, scale: Any) -> Any:
        how = {"center": True, "with_scale": True, "with_bias": True}
        how |= {"backend": "triton", "interpret": settings.dry_run, "one_device": True}
        f = rows.backward.__wrapped__
        return f(x[None], dy[None], None, scale[None], jnp.float32(1e-6), **how)

    row = {"pattern": "rows", "shape": list(shape), "setting": setting}
    patches: Patches = {}
    if setting is not None:
        per_sm, warps = setting

        def programs(batch: int, rows: int, height: int, _: int) -> int:
            return max(1, min(per_sm * tiles.MULTIPROCESSORS, rows // height))

        patches = {
            (rows_triton, "_block"): lambda *sizes: usual(*sizes)._replace(warps=warps),
            (tiles, "programs"): programs,
        }
    return _item(settings, row, backward, shape, patches)


def _columns(settings: Settings, shape: Shape, setting: tuple[int, int] | None) -> Item:
    """The sums of the gradient of group norm and SiLU, whose parts are summed."""
    batch, *space, features = shape
    usual = columns_triton.slabs

    def sums(x: Any, dy: Any, scale: Any) -> Any:
        each = jnp.broadcast_to(scale, (batch, features))
        how = {"activation": "silu", "interpret": settings.dry_run}
        f = columns.gradient_sums.__wrapped__
        return f(x, dy, each, each, each, backend="triton", one_device=True, **how)

    flat = batch, math.prod(space), features
    row = {"pattern": "columns", "shape": list(shape), "setting": setting}
    patches: Patches = {}
    if setting is not None:
        per_sm, height = setting

        def cut(batch: int, space: int, features: int) -> Any:
            found = usual(batch, space, features)
            count = max(1, per_sm * tiles.MULTIPROCESSORS // (batch * found.columns))
            return found._replace(height=height, steps=-(-space // (count * height)))

        patches = {(columns_triton, "slabs"): cut}
    return _item(settings, row, sums, flat, patches)


@contextlib.contextmanager
def _patched(values: Patches) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for (module, name), value in values.items():
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def _item(
    settings: Settings,
    row: Row,
    f: Callable[..., Any],
    shape: Shape,
    patches: Patches,
) -> Item:
    """One after the other, as tracing reads what is patched."""
    plan: Plan = settings.plan

    def run() -> Iterator[Row]:
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        args = arrays((x, x, jax.ShapeDtypeStruct(shape[-1:], jnp.float32)))
        with _patched(patches):
            compiled = jax.jit(lambda *args: f(*args)).lower(*args).compile()
        call = clock.rotating(compiled, args, plan.cache)
        yield row | {"us": clock.microseconds(call, plan)}

    return Item(f"sweep {row}", run)
