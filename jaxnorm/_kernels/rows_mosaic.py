"""Rows in Mosaic GPU: a warpgroup of 128 threads holds one row in its registers.

Features are a multiple of 128, as loads have no masks. Not timed on a GPU.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm._kernels import mosaic, tiles
from jaxnorm._kernels.tiles import SUMS


def forward(x, scale, bias, epsilon, *, center, dtype, interpret):
    """See `rows.forward`; `x` is (batch, rows, features)."""
    batch, rows, features = x.shape
    layout = mosaic.strided((features,), x.dtype, dtype)

    def rows_forward(refs):
        row = lax.axis_index("row")

        def own(name):
            """Parameters of the row's batch, or those that all share."""
            return refs[name].at[row // rows if refs[name].shape[0] > 1 else 0]

        x = mosaic.load(refs["x"].at[row], layout)
        if center:
            # About the first element, so that what is constant becomes exactly zero.
            pivot = refs["x"][row, 0].astype(SUMS)
            x = x - pivot
            offset = jnp.sum(x) / features
            x = x - offset
            refs["mean"][row] = pivot + offset
        rstd = lax.rsqrt(jnp.sum(x * x) / features + own("epsilon")[...])
        refs["rstd"][row] = rstd
        y = x * rstd
        if "scale" in refs:
            y = y * mosaic.load(own("scale"), layout)
        if "bias" in refs:
            y = y + mosaic.load(own("bias"), layout)
        refs["y"][row] = y.astype(dtype)

    per_row = tiles.result((batch * rows,), SUMS, x)
    operands = {"x": x.reshape(-1, features), "scale": scale, "bias": bias}
    results = {"y": tiles.result((batch * rows, features), dtype, x), "rstd": per_row}
    out = mosaic.call(
        rows_forward,
        operands | {"epsilon": epsilon},
        results | ({"mean": per_row} if center else {}),
        scratch={},
        grid=(batch * rows,),
        grid_names=("row",),
        interpret=interpret,
    )
    return out["y"].reshape(x.shape), out.get("mean"), out["rstd"]


def backward(x, dy, scale, mean, rstd, *, with_bias, interpret):
    """See `rows.backward`; the sums are parted, (batch, programs, features)."""
    batch, rows, features = x.shape
    layout = mosaic.strided((features,), x.dtype, dy.dtype)
    at_once = max(2, min(8, 8192 // features))  # as many rows fit in registers
    programs = tiles.programs(batch, rows, 1, at_once)
    wanted = {"dscale": scale is not None, "dbias": with_bias}
    wanted = [k for k, v in wanted.items() if v]

    def rows_backward(refs):
        program = lax.axis_index("program")
        batch, index = program // programs, program % programs
        zeros = plgpu.layout_cast(jnp.zeros((features,), SUMS), layout)
        for k in wanted:
            # Each thread adds to its own elements only, so that none waits.
            refs["sum_" + k][...] = zeros

        def add(step, _):
            row = batch * rows + step * programs + index
            rstd = refs["rstd"][row]
            x_hat = mosaic.load(refs["x"].at[row], layout)
            if "mean" in refs:
                x_hat = x_hat - refs["mean"][row]
            x_hat = x_hat * rstd
            dy = mosaic.load(refs["dy"].at[row], layout)
            parts = {"dscale": dy * x_hat, "dbias": dy} if wanted else {}
            for k in wanted:
                refs["sum_" + k][...] = mosaic.load(refs["sum_" + k], layout) + parts[k]
            if "scale" in refs:
                own = batch if refs["scale"].shape[0] > 1 else 0
                dy = dy * mosaic.load(refs["scale"].at[own], layout)
            dx = dy - x_hat * (jnp.sum(dy * x_hat) / features)
            if "mean" in refs:
                dx = dx - jnp.sum(dy) / features
            refs["dx"][row] = (dx * rstd).astype(refs["dx"].dtype)

        steps = (rows - index + programs - 1) // programs
        lax.fori_loop(0, steps, add, None)
        for k in wanted:
            refs[k][program] = mosaic.load(refs["sum_" + k], layout)

    parts = tiles.result((batch * programs, features), SUMS, x)
    out = mosaic.call(
        rows_backward,
        {
            "x": x.reshape(-1, features),
            "dy": dy.reshape(-1, features),
            "scale": scale,
            "mean": mean,
            "rstd": rstd,
        },
        {"dx": tiles.result((batch * rows, features), x.dtype, x)}
        | dict.fromkeys(wanted, parts),
        scratch={"sum_" + k: plgpu.SMEM((features,), SUMS) for k in wanted},
        grid=(batch * programs,),
        grid_names=("program",),
        interpret=interpret,
    )
    shape = (batch, programs, features)
    sums = (out[k].reshape(shape) if k in out else None for k in ("dscale", "dbias"))
    return out["dx"].reshape(x.shape), *sums
