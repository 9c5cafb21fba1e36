"""Rows in Triton: a program holds whole rows in registers, padded to a power of two.

Not timed on a GPU: the sizes of the tiles are those that spill no registers.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxnorm._kernels import tiles
from jaxnorm._kernels.tiles import SUMS


class Block(NamedTuple):
    """What one program sees at a time: `height` rows of one batch, in full width."""

    rows: int  # of each batch
    features: int
    height: int
    width: int
    warps: int

    def at(self, batch, first):
        """The rows from `first` of a batch, and which of them exist."""
        inner = first + tiles.indices(self.height)
        return batch * self.rows + inner, inner < self.rows

    @property
    def columns(self):
        return tiles.indices(self.width)

    @property
    def in_width(self):
        return self.columns < self.features


def _block(rows: int, features: int) -> Block:
    """A block of about `ROW_ELEMENTS`, of as many rows as that is."""
    width = pl.next_power_of_2(features)
    height = max(1, min(tiles.ROW_ELEMENTS // width, pl.next_power_of_2(rows)))
    warps = max(4, min(16, height * width // tiles.ELEMENTS_PER_WARP))
    return Block(rows, features, height, width, warps)


def _load_tile(ref, rows, in_rows, block):
    """A block in float32, 0 outside."""
    mask = in_rows[:, None] & block.in_width[None, :]
    at = ref.at[rows[:, None], block.columns[None, :]]
    return plgpu.load(at, mask=mask, other=0).astype(SUMS)


def _store_tile(ref, rows, in_rows, block, values):
    mask = in_rows[:, None] & block.in_width[None, :]
    at = ref.at[rows[:, None], block.columns[None, :]]
    plgpu.store(at, values.astype(ref.dtype), mask=mask)


def _load_vector(ref, batch, block):
    """A row of parameters, those of `batch` if each batch has its own."""
    at = ref.at[batch if ref.shape[0] > 1 else 0, block.columns]
    return plgpu.load(at, mask=block.in_width, other=0).astype(SUMS)[None, :]


def _centered(x, x_ref, rows, in_rows, block):
    """Rows less their means: about the first element, so that what is constant becomes
    exactly zero."""
    inside = block.in_width[None, :]
    pivot = plgpu.load(x_ref.at[rows, 0], mask=in_rows, other=0).astype(SUMS)
    x = jnp.where(inside, x - pivot[:, None], 0)
    return jnp.where(inside, x - jnp.sum(x, axis=1)[:, None] / block.features, 0)


def _backward(
    x_ref,
    dy_ref,
    skip_ref,
    scale_ref,
    epsilon_ref,
    dx_ref,
    sums_ref,
    *,
    block,
    programs,
    center,
    wanted,
):
    batch, index = pl.program_id(0) // programs, pl.program_id(0) % programs
    scale = 1 if scale_ref is None else _load_vector(scale_ref, batch, block)
    epsilon = epsilon_ref[batch if epsilon_ref.shape[0] > 1 else 0]

    def mean(v):
        return jnp.sum(v, axis=1, keepdims=True) / block.features

    def add(step, sums):
        # Neighbouring programs read neighbouring rows.
        first = (jnp.int32(step) * programs + index) * block.height
        rows, in_rows = block.at(batch, first)
        x = _load_tile(x_ref, rows, in_rows, block)
        dy = _load_tile(dy_ref, rows, in_rows, block)
        x = _centered(x, x_ref, rows, in_rows, block) if center else x
        # Of rows that are not there it is infinite where epsilon is 0.
        rstd = jnp.where(in_rows[:, None], lax.rsqrt(mean(x * x) + epsilon), 0)
        x_hat = x * rstd
        d = dy * scale
        dx = d - x_hat * mean(d * x_hat)
        dx = dx - mean(d) if center else dx
        dx = dx * rstd
        if skip_ref is not None:  # loaded last, so that it holds no registers before
            dx = dx + _load_tile(skip_ref, rows, in_rows, block)
        _store_tile(dx_ref, rows, in_rows, block, dx)
        parts = {"scale": dy * x_hat, "bias": dy}
        return tuple(v + parts[k] for k, v in zip(wanted, sums, strict=True))

    zeros = (jnp.zeros((block.height, block.width), SUMS),) * len(wanted)
    steps = pl.cdiv(block.rows, programs * block.height)
    for k, v in enumerate(lax.fori_loop(0, steps, add, zeros)):
        at = sums_ref.at[pl.program_id(0), k, block.columns]
        plgpu.store(at, jnp.sum(v, axis=0), mask=block.in_width)


def backward(x, dy, skip, scale, epsilon, *, center, wanted, interpret):
    """See `rows.backward`; returns dx and the sums of what is wanted, in parts of
    (batch, programs, sums, features)."""
    batch, rows, features = x.shape
    tile = _block(rows, features)
    programs = tiles.programs(batch, rows, tile.height, 16 // tile.warps)
    parts = (batch * programs, len(wanted), features)
    flat = [v if v is None else v.reshape(-1, features) for v in (x, dy, skip)]
    settings = {"block": tile, "programs": programs, "center": center, "wanted": wanted}
    dx, *sums = pl.pallas_call(
        functools.partial(_backward, **settings),
        grid=(batch * programs,),
        out_shape=(
            tiles.result((batch * rows, features), x.dtype, x),
            tiles.result(parts, SUMS, x) if wanted else None,
        ),
        # In the place of the other gradient, which nothing else reads.
        input_output_aliases={} if skip is None else {2: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps),
        interpret=interpret,
        name="rows_backward",
    )(*flat, scale, epsilon)
    shape = (batch, programs, len(wanted), features)
    return dx.reshape(x.shape), sums[0].reshape(shape) if wanted else None
