"""Rows in Mosaic GPU: a warpgroup of 128 threads holds one row in its registers.

Features are a multiple of 128, as loads have no masks. Not timed on a GPU.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm._kernels import mosaic, tiles
from jaxnorm._kernels.tiles import SUMS


def backward(x, dy, skip, scale, epsilon, *, center, wanted, interpret):
    """See `rows.backward`; returns dx and the sums of what is wanted, in parts of
    (batch, programs, sums, features)."""
    batch, rows, features = x.shape
    layout = mosaic.strided((features,), x.dtype, dy.dtype)
    at_once = max(2, min(8, 8192 // features))  # as many rows fit in registers
    programs = tiles.programs(batch, rows, 1, at_once)

    def rows_backward(refs):
        program = lax.axis_index("program")
        batch, index = program // programs, program % programs
        zeros = plgpu.layout_cast(jnp.zeros((features,), SUMS), layout)
        for k in wanted:
            # Each thread adds to its own elements only, so that none waits.
            refs["sum_" + k][...] = zeros

        def own(name):
            """Parameters of the batch, or those that all share."""
            return refs[name].at[batch if refs[name].shape[0] > 1 else 0]

        def add(step, _):
            row = batch * rows + step * programs + index
            x_hat = mosaic.load(refs["x"].at[row], layout)
            if center:
                # About the first element, so that what is constant becomes zero.
                x_hat = x_hat - refs["x"][row, 0].astype(SUMS)
                x_hat = x_hat - jnp.sum(x_hat) / features
            square = jnp.sum(x_hat * x_hat) / features
            rstd = lax.rsqrt(square + own("epsilon")[...])
            x_hat = x_hat * rstd
            dy = mosaic.load(refs["dy"].at[row], layout)
            parts = {"scale": dy * x_hat, "bias": dy} if wanted else {}
            for k in wanted:
                refs["sum_" + k][...] = mosaic.load(refs["sum_" + k], layout) + parts[k]
            if "scale" in refs:
                dy = dy * mosaic.load(own("scale"), layout)
            dx = dy - x_hat * (jnp.sum(dy * x_hat) / features)
            if center:
                dx = dx - jnp.sum(dy) / features
            dx = dx * rstd
            if "skip" in refs:
                dx = dx + mosaic.load(refs["skip"].at[row], layout)
            refs["dx"][row] = dx.astype(refs["dx"].dtype)

        steps = (rows - index + programs - 1) // programs
        lax.fori_loop(0, steps, add, None)
        for k, name in enumerate(wanted):
            refs["sums"][program, k] = mosaic.load(refs["sum_" + name], layout)

    flat = {"x": x, "dy": dy, "skip": skip}
    flat = {k: v if v is None else v.reshape(-1, features) for k, v in flat.items()}
    parts = (batch * programs, len(wanted), features)
    sums = {"sums": tiles.result(parts, SUMS, x)} if wanted else {}
    out = mosaic.call(
        rows_backward,
        {**flat, "scale": scale, "epsilon": epsilon},
        {"dx": tiles.result((batch * rows, features), x.dtype, x)} | sums,
        scratch={"sum_" + k: plgpu.SMEM((features,), SUMS) for k in wanted},
        grid=(batch * programs,),
        grid_names=("program",),
        interpret=interpret,
    )
    shape = (batch, programs, len(wanted), features)
    sums = out["sums"].reshape(shape) if wanted else None
    return out["dx"].reshape(x.shape), sums
