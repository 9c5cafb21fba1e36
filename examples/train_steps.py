"""The steps of example 01, data-parallel over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"  # the mesh axis that batches are split along


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


class Job(NamedTuple):
    state: State  # to begin with
    train_step: Callable[[State, dict], tuple[State, dict]]
    eval_step: Callable[[State, dict], dict]


def make_job(model: tuple, optimizer, devices: list) -> Job:
    """The jitted steps; state is replicated over the devices, batches are split."""
    params, batch_stats, apply = model
    mesh, specs = Mesh(np.array(devices), (AXIS,)), (P(), P(AXIS))
    replicated, split = (NamedSharding(mesh, spec) for spec in specs)

    def over_devices(step):
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(step, in_shardings=(replicated, split))

    state = State(params, batch_stats, optimizer.init(params))
    state = jax.device_put(state, replicated)
    return Job(state, *map(over_devices, device_steps(apply, optimizer)))


def device_steps(apply: Callable, optimizer) -> tuple[Callable, Callable]:
    """What each device does in a training step and in an evaluation step."""

    def loss_fn(params, batch_stats, batch, train):
        labels, valid = batch["label"], batch["valid"]
        mask = valid[:, None, None, None]
        logits, batch_stats = apply(params, batch_stats, batch["image"], mask, train)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        sums = {
            "loss": jnp.sum(losses, where=valid),
            "correct": jnp.sum(logits.argmax(-1) == labels, where=valid),
            "count": jnp.sum(valid),
        }
        # A device may hold few valid rows, or none: first sum over all, then divide.
        sums = jax.lax.psum(sums, AXIS)
        return sums["loss"] / sums["count"], (sums, batch_stats)

    def train_step(state, batch):
        # The parameters are replicated and the loss is a sum over the devices, so
        # jax.shard_map sums the gradient over the devices, too.
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (sums, batch_stats) = grad_fn(
            state.params, state.batch_stats, batch, train=True
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), sums

    def eval_step(state, batch):
        _, (sums, _) = loss_fn(state.params, state.batch_stats, batch, train=False)
        return sums

    return train_step, eval_step


def mean_loss(sums: dict) -> float:
    return float(sums["loss"]) / float(sums["count"])


def differences(many: Job, one: Job, batch: dict) -> dict[str, float]:
    """How far a step on many devices and on one are from each other."""
    (new, sums), (new_on_one, sums_on_one) = (
        jax.device_get(job.train_step(job.state, batch)) for job in (many, one)
    )
    return {
        "parameters": largest_gap(new.params, new_on_one.params),
        "batch statistics": largest_gap(new.batch_stats, new_on_one.batch_stats),
        "loss": abs(mean_loss(sums) - mean_loss(sums_on_one)),
    }


def largest_gap(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), a, b)
    return float(np.max(jax.tree.leaves(gaps), initial=0))
