"""Columns in Mosaic GPU: a warpgroup walks down a slab of rows, 8 x 128 at a time.

Sums stay apart for each place in the tile until the end. There are no masks, so that
tiles must fill the array. Not timed on a GPU.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm._kernels import mosaic, tiles
from jaxnorm._kernels.columns import activation_cotangent
from jaxnorm._kernels.tiles import SUMS

TILE = (tiles.MOSAIC_TILE_ROWS, tiles.LANES)
UNROLLED = 4  # tiles whose loads are under way together
COLUMN = plgpu.Layout.WG_STRIDED((tiles.LANES,), 1)


class Slab(NamedTuple):
    """The part of an array of (batch * space, features) that a program sees."""

    batch: Any
    index: Any  # among the slabs of all batches
    first: Any  # tile, counted from the top of the array
    steps: Any  # tiles
    features: Any

    def tile(self, ref, step, layout):
        rows = pl.ds((self.first + step) * TILE[0], TILE[0])
        return mosaic.load(ref.at[rows, self.features], layout)

    def walk(self, read, add, sums):
        """Folds `add(sums, *read(step))` over all tiles, reading several ahead."""

        def several(i, sums):
            ahead = [read(i * UNROLLED + k) for k in range(UNROLLED)]
            for tiles_read in ahead:
                sums = add(sums, *tiles_read)
            return sums

        whole = self.steps // UNROLLED
        sums = lax.fori_loop(0, whole, several, sums)
        rest = whole * UNROLLED, self.steps
        return lax.fori_loop(*rest, lambda i, sums: add(sums, *read(i)), sums)


def _count(shape) -> int:
    """The number of slabs that each batch of (batch, space, features) is cut into."""
    return tiles.slabs(shape[0], shape[2] // TILE[1], shape[1])


def _this_slab(shape) -> Slab:
    count, columns, tall = _count(shape), shape[2] // TILE[1], shape[1] // TILE[0]
    program = lax.axis_index("program")
    index, column = program // columns, program % columns
    batch, slab = index // count, index % count
    start, end = slab * tall // count, (slab + 1) * tall // count
    features = pl.ds(column * TILE[1], TILE[1])
    return Slab(batch, index, batch * tall + start, end - start, features)


def _zeros(layout):
    zeros = plgpu.layout_cast(jnp.zeros(TILE, SUMS), layout)
    return zeros, zeros


def _rows_of(ref):
    """The rows of a tile in shared memory, spread over all threads alike."""
    return [mosaic.load(ref.at[r], COLUMN) for r in range(TILE[0])]


def _call(body, operands, shape, names, scratch, interpret):
    """Runs `body` on every slab; results of (batch, slabs, features) for `names`."""
    batch, _, features = shape
    count = _count(shape)
    part = tiles.result((batch * count, features), SUMS, operands["x"])
    flat = {k: v.reshape(-1, features) for k, v in operands.items()}
    out = mosaic.call(
        body,
        flat,
        dict.fromkeys(names, part),
        scratch,
        grid=(batch * count * (features // TILE[1]),),
        grid_names=("program",),
        interpret=interpret,
    )
    return [out[k].reshape(batch, count, features) for k in names]


def moments(x, *, interpret):
    """Sizes of slabs, their pivots, their means and their summed squares about these.

    Means are less the pivots, so that they are exact where they differ by little.
    """
    layout = mosaic.strided(TILE, x.dtype)

    def columns_moments(refs):
        slab = _this_slab(x.shape)

        def read(step):
            return (slab.tile(refs["x"], step, layout),)

        def add(sums, values):
            values = values - pivot
            return sums[0] + values, sums[1] + values * values

        pivot = slab.tile(refs["x"], 0, layout)  # another one for each place
        total, square = slab.walk(read, add, _zeros(layout))
        steps = slab.steps.astype(SUMS)
        offset = total / steps
        tile = {"pivot": pivot, "offset": offset, "m2": square - total * offset}
        for k, v in tile.items():
            refs["all_" + k][...] = v
        plgpu.commit_smem()
        pivots, offsets, m2 = (_rows_of(refs["all_" + k]) for k in tile)
        means = [p - pivots[0] + m for p, m in zip(pivots, offsets, strict=True)]
        mean = sum(means) / TILE[0]
        m2 = sum(m2) + steps * sum((m - mean) * (m - mean) for m in means)
        slab_values = {"pivot": pivots[0], "offset": mean, "m2": jnp.maximum(m2, 0)}
        for k, v in slab_values.items():
            refs[k].at[slab.index, slab.features][...] = v

    names = ("pivot", "offset", "m2")
    scratch = {"all_" + k: plgpu.SMEM(TILE, SUMS) for k in names}
    parts = _call(columns_moments, {"x": x}, x.shape, names, scratch, interpret)
    count, tall = _count(x.shape), x.shape[1] // TILE[0]
    counts = jnp.diff(jnp.arange(count + 1) * tall // count) * TILE[0]
    return counts.astype(SUMS), *parts


def gradient_sums(x, dy, *vectors, activation, interpret):
    """See `columns.gradient_sums`; the sums are parted, (batch, slabs, features)."""
    layout = mosaic.strided(TILE, x.dtype, dy.dtype)
    per_feature = dict(zip(("mean", "slope", "shift"), vectors, strict=False))

    def columns_gradient_sums(refs):
        slab = _this_slab(x.shape)
        for name in per_feature:
            one = mosaic.load(refs[name].at[slab.batch, slab.features], COLUMN)
            for r in range(TILE[0]):
                refs["all_" + name].at[r][...] = one
        plgpu.commit_smem()
        known = {k: mosaic.load(refs["all_" + k], layout) for k in per_feature}

        def read(step):
            return [slab.tile(refs[k], step, layout) for k in ("x", "dy")]

        def add(sums, x, d):
            z = x * known["slope"] + known["shift"] if activation else None
            d = activation_cotangent(activation, z, d)
            return sums[0] + d, sums[1] + d * (x - known["mean"])

        names = ("sum_d", "sum_dx")
        for name, total in zip(
            names, slab.walk(read, add, _zeros(layout)), strict=True
        ):
            refs["all_" + name][...] = total
        plgpu.commit_smem()
        for name in names:
            total = sum(_rows_of(refs["all_" + name]))
            refs[name].at[slab.index, slab.features][...] = total

    names = ("sum_d", "sum_dx")
    tile = plgpu.SMEM(TILE, SUMS)
    scratch = {"all_" + k: tile for k in (*per_feature, *names)}
    operands = {"x": x, "dy": dy, **per_feature}
    return _call(columns_gradient_sums, operands, x.shape, names, scratch, interpret)
