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


def gradient_sums(x, dy, *vectors, activation, interpret):
    """See `columns.gradient_sums`; the sums are parted, (batch, slabs, features)."""
    layout = mosaic.strided(TILE, x.dtype, dy.dtype)
    per_feature = dict(zip(("mean", "slope", "shift"), vectors, strict=True))

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
            offset = x - known["mean"]
            z = offset * known["slope"] + known["shift"]
            d = activation_cotangent(activation, z, d)
            return sums[0] + d, sums[1] + d * offset

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
    batch, _, features = x.shape
    count = _count(x.shape)
    part = tiles.result((batch * count, features), SUMS, x)
    flat = {"x": x.reshape(-1, features), "dy": dy.reshape(-1, features)}
    out = mosaic.call(
        columns_gradient_sums,
        {**flat, **per_feature},
        dict.fromkeys(names, part),
        scratch,
        grid=(batch * count * (features // TILE[1]),),
        grid_names=("program",),
        interpret=interpret,
    )
    return [out[k].reshape(batch, count, features) for k in names]
