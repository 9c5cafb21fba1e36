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


def _forward(x_ref, scale_ref, bias_ref, epsilon_ref, *outs, block, blocks):
    y_ref, mean_ref, rstd_ref = outs
    batch, index = pl.program_id(0) // blocks, pl.program_id(0) % blocks
    rows, in_rows = block.at(batch, index * block.height)
    x = _load_tile(x_ref, rows, in_rows, block)
    if mean_ref is not None:
        # About the first element, so that what is constant becomes exactly zero.
        pivot = plgpu.load(x_ref.at[rows, 0], mask=in_rows, other=0).astype(SUMS)
        x = jnp.where(block.in_width[None, :], x - pivot[:, None], 0)
        offset = jnp.sum(x, axis=1) / block.features
        x = jnp.where(block.in_width[None, :], x - offset[:, None], 0)
        plgpu.store(mean_ref.at[rows], pivot + offset, mask=in_rows)
    epsilon = epsilon_ref[batch if epsilon_ref.shape[0] > 1 else 0]
    rstd = lax.rsqrt(jnp.sum(x * x, axis=1) / block.features + epsilon)
    plgpu.store(rstd_ref.at[rows], rstd, mask=in_rows)
    y = x * rstd[:, None]
    if scale_ref is not None:
        y = y * _load_vector(scale_ref, batch, block)
    if bias_ref is not None:
        y = y + _load_vector(bias_ref, batch, block)
    _store_tile(y_ref, rows, in_rows, block, y)


def forward(x, scale, bias, epsilon, *, center, dtype, interpret):
    """See `rows.forward`; `x` is (batch, rows, features)."""
    batch, rows, features = x.shape
    tile = _block(rows, features)
    blocks = pl.cdiv(rows, tile.height)
    per_row = tiles.result((batch * rows,), SUMS, x)
    y, mean, rstd = pl.pallas_call(
        functools.partial(_forward, block=tile, blocks=blocks),
        grid=(batch * blocks,),
        out_shape=(
            tiles.result((batch * rows, features), dtype, x),
            per_row if center else None,
            per_row,
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps),
        interpret=interpret,
        name="rows_forward",
    )(x.reshape(-1, features), scale, bias, epsilon)
    return y.reshape(x.shape), mean, rstd


def _backward(x_ref, dy_ref, scale_ref, mean_ref, rstd_ref, *outs, block, programs):
    dx_ref, dscale_ref, dbias_ref = outs
    batch, index = pl.program_id(0) // programs, pl.program_id(0) % programs
    scale = 1 if scale_ref is None else _load_vector(scale_ref, batch, block)

    def add(step, sums):
        # Neighbouring programs read neighbouring rows.
        first = (jnp.int32(step) * programs + index) * block.height
        rows, in_rows = block.at(batch, first)
        load = functools.partial(plgpu.load, mask=in_rows, other=0)
        x = _load_tile(x_ref, rows, in_rows, block)
        dy = _load_tile(dy_ref, rows, in_rows, block)
        rstd = load(rstd_ref.at[rows])[:, None]
        if mean_ref is not None:
            x = x - load(mean_ref.at[rows])[:, None]
        x_hat = x * rstd
        d = dy * scale
        along = jnp.sum(d * x_hat, axis=1, keepdims=True) / block.features
        dx = d - x_hat * along
        if mean_ref is not None:
            dx = dx - jnp.sum(d, axis=1, keepdims=True) / block.features
        _store_tile(dx_ref, rows, in_rows, block, dx * rstd)
        parts = {"scale": dy * x_hat, "bias": dy}
        return {k: v + parts[k] for k, v in sums.items()}

    refs = {"scale": dscale_ref, "bias": dbias_ref}
    refs = {k: ref for k, ref in refs.items() if ref is not None}
    zeros = {k: jnp.zeros((block.height, block.width), SUMS) for k in refs}
    steps = pl.cdiv(block.rows, programs * block.height)
    for k, v in lax.fori_loop(0, steps, add, zeros).items():
        at = refs[k].at[pl.program_id(0), block.columns]
        plgpu.store(at, jnp.sum(v, axis=0), mask=block.in_width)


def backward(x, dy, scale, mean, rstd, *, with_bias, interpret):
    """See `rows.backward`; the sums are parted, (batch, programs, features)."""
    batch, rows, features = x.shape
    tile = _block(rows, features)
    programs = tiles.programs(batch, rows, tile.height, 16 // tile.warps)
    parts = tiles.result((batch * programs, features), SUMS, x)
    flat = [v.reshape(-1, features) for v in (x, dy)]
    dx, *sums = pl.pallas_call(
        functools.partial(_backward, block=tile, programs=programs),
        grid=(batch * programs,),
        out_shape=(
            tiles.result((batch * rows, features), x.dtype, x),
            None if scale is None else parts,
            parts if with_bias else None,
        ),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
        name="rows_backward",
    )(*flat, scale, mean, rstd)
    return dx.reshape(x.shape), *(
        s if s is None else s.reshape(batch, programs, features) for s in sums
    )
