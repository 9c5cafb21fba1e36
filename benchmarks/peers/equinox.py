"""Equinox: layers of one example, channels first, under `jax.vmap`. In bfloat16, its
batch norm, which does not do so itself, is given float32 and its result cast back."""

from functools import partial

import cases
import equinox as eqx
import jax
import jax.numpy as jnp

from peers import Peer, Unsupported
from peers.jax_program import program

MANY = 10**6  # batches seen, so that the running averages are not corrected any more


def with_params(layer, params):
    if "bias" not in params:
        return eqx.tree_at(lambda m: m.weight, layer, params["scale"])
    values = (params["scale"], params["bias"])
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, values)


def channels_first(case):
    if len(case.shape) > 2 and case.layout == "last":
        raise Unsupported("has channels first only")


def stateless(make, case):
    def apply(params, stats, x):
        return jax.vmap(with_params(make(), params))(x), {}

    return apply


def batch_norm(case, evaluation=False):
    channels_first(case)

    def apply(params, stats, x):
        layer = eqx.nn.BatchNorm(
            case.channels,
            axis_name="batch",
            eps=cases.EPSILON,
            momentum=cases.MOMENTUM,
            inference=evaluation,
            mode="batch",
        )
        layer = with_params(layer, params)
        state = eqx.nn.State(layer)
        state = state.set(layer.batch_counter, jnp.array(MANY))
        state = state.set(layer.batch_state_index, (stats["mean"], stats["var"]))
        batched = jax.vmap(layer, (0, None), (0, None), axis_name="batch")
        y, state = batched(x.astype(jnp.float32), state)
        mean, var = state.get(layer.batch_state_index)
        return y.astype(x.dtype), {"mean": mean, "var": var}

    return apply


def layer_norm(case):
    return stateless(partial(eqx.nn.LayerNorm, case.channels, cases.EPSILON), case)


def rms_norm(case):
    options = {"eps": cases.EPSILON, "use_bias": False}
    return stateless(partial(eqx.nn.RMSNorm, case.channels, **options), case)


def group_norm(case, groups=cases.GROUPS):
    channels_first(case)
    make = partial(eqx.nn.GroupNorm, groups, case.channels, cases.EPSILON)
    return stateless(make, case)


def instance_norm(case):
    """A group norm with a group for each channel, as its documentation says."""
    return group_norm(case, groups=case.channels)


PEER = Peer(
    "equinox",
    "equinox",
    "import equinox",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: batch_norm,
        cases.LAYER: layer_norm,
        cases.RMS: rms_norm,
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    # On several devices as in its documentation: one vmap over the whole batch, split
    # over the devices by its sharding.
    partial(program, mapped=False),
)
