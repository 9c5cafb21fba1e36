"""Other sizes of tiles and grids than the kernels have, in Triton."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from gpu import clock
from gpu.plan import Plan, Settings, Shape
from gpu.times import arrays
from gpu.work import Item, Row
from jaxnorm._kernels import columns_triton, rows_triton, tiles

TILE_ROWS = (16, 32, 64)
SLABS_PER_SM = (2, 4, 8)


def items(settings: Settings) -> Iterator[Item]:
    plan = settings.plan
    if "triton" not in settings.backends:
        return
    few = 2 if settings.dry_run else None
    for shape in plan.sweep_rows:
        chosen = itertools.product((1, 2, 4), (4, 8, 16), (1, 2, 4))
        for setting in itertools.islice(chosen, few):
            yield _rows(settings, shape, *setting)
    for shape in plan.sweep_maps:
        chosen = itertools.product(TILE_ROWS, SLABS_PER_SM)
        for setting in itertools.islice(chosen, few):
            yield _columns(settings, shape, *setting)


def _rows(
    settings: Settings, shape: Shape, per_sm: int, warps: int, height: int
) -> Item:
    """`per_sm` programs in each multiprocessor, each of which takes `height` rows."""
    count, features = shape
    usual = rows_triton._block(count, features)
    block = usual._replace(height=height, warps=warps)
    programs = max(1, min(per_sm * tiles.MULTIPROCESSORS, count // height))

    def build() -> Any:
        with (
            mock.patch.object(rows_triton, "_block", lambda *_: block),
            mock.patch.object(tiles, "programs", lambda *_: programs),
        ):
            return _compiled(backward, shape)

    def backward(x: Any, dy: Any, scale: Any) -> Any:
        how = {"center": True, "wanted": ("scale", "bias")}
        how |= {"interpret": settings.dry_run}
        given = x[None], dy[None], None, scale[None], jnp.full((1,), 1e-6)
        return rows_triton.backward(*given, **how)

    row = {"pattern": "rows", "shape": list(shape)}
    row |= {"per_sm": per_sm, "warps": warps, "height": height}
    return _item(settings, row, build)


def _columns(settings: Settings, shape: Shape, height: int, per_sm: int) -> Item:
    """Tiles of `height` rows, `per_sm` slabs for each multiprocessor."""
    batch, *space, features = shape
    flat = batch, math.prod(space), features
    usual = columns_triton.slabs(*flat)
    count = max(1, per_sm * tiles.MULTIPROCESSORS // (batch * usual.columns))
    steps = max(1, -(-flat[1] // (count * height)))
    cut = usual._replace(height=height, steps=steps)

    def build() -> Any:
        with mock.patch.object(columns_triton, "slabs", lambda *_: cut):
            return _compiled(sums, flat)

    def sums(x: Any, dy: Any, scale: Any) -> Any:
        each = jnp.broadcast_to(scale, (batch, features))
        how = {"activation": "silu", "interpret": settings.dry_run}
        return columns_triton.gradient_sums(x, dy, each, each, each, **how)

    row = {"pattern": "columns", "shape": list(shape)}
    return _item(settings, row | {"per_sm": per_sm, "height": height}, build)


def _compiled(f: Callable[..., Any], shape: Shape) -> Any:
    """Within the patches, as tracing reads what is patched."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    args = arrays((x, x, jax.ShapeDtypeStruct(shape[-1:], jnp.float32)))
    return jax.jit(f).lower(*args).compile(), args


def _item(settings: Settings, row: Row, build: Callable[[], Any]) -> Item:
    plan: Plan = settings.plan

    def run() -> Iterator[Row]:
        start = time.perf_counter()
        compiled, args = build()
        compile_ms = (time.perf_counter() - start) * 1000
        call = clock.rotating(compiled, args, plan.cache)
        times = clock.kernel_times(call, plan)
        us = sum(times.values()) if times else clock.by_clock(call, plan)
        yield row | {"us": us, "compile_ms": compile_ms}

    return Item(f"sweep {row}", run)
