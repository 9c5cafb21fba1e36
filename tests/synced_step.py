"""A masked, synchronized batch norm step, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm


def arrays():
    """Eight rows, of which a mask leaves 2, 1, 0 and 2 in each pair."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 3)).astype(np.float32) + 3
    mask = np.array([1, 1, 1, 0, 0, 0, 1, 1], bool)[:, None]
    weights = rng.normal(size=(8, 3)).astype(np.float32)
    return x, mask, weights


def step(mesh, x, mask, weights):
    """Outputs, statistics and gradients with the rows spread over `mesh`."""
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    place = jax.make_array_from_callback
    x, mask, weights = (
        place(v.shape, rows, lambda index, v=v: v[index]) for v in (x, mask, weights)
    )
    norm = jaxnorm.BatchNorm(axis_name="data")
    params = {"scale": jnp.arange(1.0, 4.0), "bias": jnp.ones(3)}
    params = {
        k: place(v.shape, whole, lambda index, v=v: np.asarray(v)[index])
        for k, v in params.items()
    }
    stats = norm.init_stats((3,))

    def loss(x, params, mask, weights):
        y, new = norm(x, params, stats, mask=mask)
        return jax.lax.psum((y**2 * weights).sum(), "data"), (y, new)

    @jax.jit
    def run(x, params, mask, weights):
        mapped = jax.shard_map(
            loss,
            mesh=mesh,
            in_specs=(P("data"), P(), P("data"), P("data")),
            out_specs=(P(), (P("data"), P())),
        )
        grad = jax.value_and_grad(mapped, (0, 1), has_aux=True)
        (value, (y, new)), (dx, dparams) = grad(x, params, mask, weights)
        return {"loss": value, "y": y, "dx": dx, **new, **dparams}

    return run(x, params, mask, weights)
