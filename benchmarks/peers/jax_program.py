"""Runs a norm of any library on JAX: `apply(params, stats, x) -> y, stats`."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from cases import SYNCED
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peers import Problem, Program

AXIS = "devices"


def program(apply, problem: Problem, mapped: bool = True) -> Program:
    """Everything is jitted, and the gradient program returns the result, too.

    On several devices, the batch is split over them, and `apply` runs under
    `jax.shard_map` if `mapped`; else XLA partitions it.
    """
    case = problem.case
    x, dy = (jnp.asarray(v, case.dtype) for v in (problem.x, problem.dy))
    params, stats = jax.tree.map(jnp.asarray, (problem.params, problem.stats))
    if case.op == SYNCED:
        mesh = Mesh(np.array(jax.devices()[: case.devices]), (AXIS,))
        if mapped:
            specs = {"in_specs": (P(), P(), P(AXIS)), "out_specs": (P(AXIS), P())}
            apply = jax.shard_map(apply, mesh=mesh, **specs)
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, P(AXIS)))
        params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))

    def pull_back(params, stats, x):
        return jax.vjp(lambda p, x: apply(p, stats, x), params, x, has_aux=True)

    def with_gradient(params, stats, x, dy):
        y, pull, stats = pull_back(params, stats, x)
        return y, stats, pull(dy)

    forward, gradient = jax.jit(apply), jax.jit(with_gradient)
    pull = jax.eval_shape(lambda *args: pull_back(*args)[1], params, stats, x)
    residuals = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(pull))
    facts = compiled(gradient, params, stats, x, dy) | {"residual_bytes": residuals}

    def results():
        y, stats_, (dparams, dx) = gradient(params, stats, x, dy)
        y_forward, _ = forward(params, stats, x)
        found = {"y": y_forward, "y with gradient": y, "gradient of x": dx}
        found |= {f"gradient of {k}": v for k, v in dparams.items()}
        found |= {f"running {k}": v for k, v in stats_.items()}
        return {k: np.asarray(v, np.float64) for k, v in found.items()}

    calls = {
        "forward": partial(forward, params, stats, x),
        "forward and gradient": partial(gradient, params, stats, x, dy),
    }
    return Program(calls, results, facts)


def compiled(function, *args) -> dict[str, float]:
    """How long a jitted function takes to compile, and the memory it needs to run."""
    start = time.perf_counter()
    executable = function.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    return {"compile_seconds": seconds, "temp_bytes": memory.temp_size_in_bytes}
