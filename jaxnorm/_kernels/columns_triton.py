"""Columns in Triton: a program walks down a slab of rows, a tile at a time.

Sums stay apart for each place in the tile until the end. Not timed on a GPU: the sizes
of the tiles are those that spill no registers.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxnorm._kernels import tiles
from jaxnorm._kernels.columns import activation_cotangent
from jaxnorm._kernels.tiles import SUMS


class Slabs(NamedTuple):
    """How each batch of (space, features) is cut into slabs, and these into tiles."""

    space: int
    features: int
    height: int  # of a tile
    width: int
    steps: int  # tiles in a slab

    @property
    def rows(self) -> int:
        """Of a slab; the last one may have fewer."""
        return self.steps * self.height

    @property
    def per_batch(self) -> int:
        return pl.cdiv(self.space, self.rows)

    @property
    def columns(self) -> int:
        return pl.cdiv(self.features, self.width)

    def here(self):
        """The batch, its slab and the features of this program."""
        program = pl.program_id(0)
        index, column = program // self.columns, program % self.columns
        batch, slab = index // self.per_batch, index % self.per_batch
        return batch, slab, column * self.width + tiles.indices(self.width)


def slabs(batch: int, space: int, features: int) -> Slabs:
    width = tiles.column_width(features)
    height = min(tiles.COLUMN_ELEMENTS // width, pl.next_power_of_2(space))
    count = tiles.slabs(batch, pl.cdiv(features, width), space)
    steps = pl.cdiv(pl.cdiv(space, count), height)
    return Slabs(space, features, height, width, steps)


def _load(ref, batch, rows, features, cut):
    """A tile in float32, 0 outside."""
    inside = (rows < cut.space)[:, None] & (features < cut.features)[None, :]
    at = ref.at[batch, rows[:, None], features[None, :]]
    return plgpu.load(at, mask=inside, other=0).astype(SUMS)


def _load_vector(ref, index, features, cut):
    at = ref.at[(*index, features)]
    return plgpu.load(at, mask=features < cut.features, other=0).astype(SUMS)[None, :]


def _store(ref, index, features, cut, part):
    plgpu.store(ref.at[(*index, features)], part, mask=features < cut.features)


def _gradient_sums(x_ref, dy_ref, *refs, cut, activation):
    *vectors, d_ref, dx_ref = refs
    batch, slab, features = cut.here()
    first = slab * cut.rows
    mean, slope, shift = (_load_vector(v, (batch,), features, cut) for v in vectors)

    def add(step, sums):
        rows = first + jnp.int32(step) * cut.height + tiles.indices(cut.height)
        offset = _load(x_ref, batch, rows, features, cut) - mean
        d = _load(dy_ref, batch, rows, features, cut)
        d = activation_cotangent(activation, offset * slope + shift, d)
        return sums[0] + d, sums[1] + d * offset

    zeros = jnp.zeros((cut.height, cut.width), SUMS)
    totals = lax.fori_loop(0, cut.steps, add, (zeros, zeros))
    for ref, total in zip((d_ref, dx_ref), totals, strict=True):
        _store(ref, (batch, slab), features, cut, jnp.sum(total, axis=0))


def gradient_sums(x, dy, *vectors, activation, interpret):
    """See `columns.gradient_sums`; the sums are parted, (batch, slabs, features)."""
    cut = slabs(*x.shape)
    part = tiles.result((x.shape[0], cut.per_batch, cut.features), SUMS, x)
    return pl.pallas_call(
        functools.partial(_gradient_sums, cut=cut, activation=activation),
        grid=(x.shape[0] * cut.per_batch * cut.columns,),
        out_shape=(part, part),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="columns_gradient_sums",
    )(x, dy, *vectors)
