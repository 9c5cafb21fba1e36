"""Haiku. In bfloat16, its norms are given float32 and their result is cast back, as
its mixed precision policy `params=float32,compute=float32,output=bfloat16` does."""

from functools import partial

import cases
import haiku as hk
import jax
import jax.numpy as jnp

from peers import Peer
from peers.jax_program import AXIS, program

NAMES = {"scale": "scale", "bias": "offset"}
MANY = 10**6  # batches seen, so that the running averages are not corrected any more
AFFINE = {"create_scale": True, "create_offset": True}


def layout(case):
    return {"data_format": f"channels_{case.layout}"}


def as_variables(params, specs):
    """The one module's parameters under Haiku's names, in its shapes."""
    [(module, shapes)] = specs.items()
    named = {NAMES[k]: v for k, v in params.items()}
    return {module: {k: v.reshape(shapes[k].shape) for k, v in named.items()}}


def stateless(make, case):
    def call(x):
        return make()(x.astype(jnp.float32)).astype(x.dtype)

    net = hk.without_apply_rng(hk.transform(call))

    def apply(params, stats, x):
        specs = jax.eval_shape(net.init, None, x)
        return net.apply(as_variables(params, specs), x), {}

    return apply


def batch_norm(case, evaluation=False, **options):
    options |= layout(case) | AFFINE
    options |= {"decay_rate": cases.MOMENTUM, "eps": cases.EPSILON}

    def call(x, is_training):
        y = hk.BatchNorm(**options)(x.astype(jnp.float32), is_training)
        return y.astype(x.dtype)

    net = hk.without_apply_rng(hk.transform_with_state(call))

    def apply(params, stats, x):
        init = partial(net.init, is_training=True)
        specs, state_specs = jax.eval_shape(init, None, x)
        state = as_state(stats, state_specs)
        y, state = net.apply(as_variables(params, specs), state, x, not evaluation)
        held = {kept(module): v["hidden"] for module, v in state.items()}
        return y, {k: v.reshape(-1) for k, v in held.items()}

    return apply


def as_state(stats, specs):
    """Each running average is a module of its own, `mean_ema` and `var_ema`."""

    def average(value, spec):
        held = value.reshape(spec["hidden"].shape)
        return {"counter": jnp.int32(MANY), "hidden": held, "average": held}

    return {module: average(stats[kept(module)], v) for module, v in specs.items()}


def kept(module):
    """`mean` for the module `batch_norm/~/mean_ema`."""
    return module.split("/")[-1].removesuffix("_ema")


def layer_norm(case):
    make = partial(hk.LayerNorm, -1, **AFFINE, eps=cases.EPSILON)
    return stateless(make, case)


def rms_norm(case):
    return stateless(partial(hk.RMSNorm, -1, eps=cases.EPSILON), case)


def group_norm(case):
    options = AFFINE | layout(case)
    make = partial(hk.GroupNorm, cases.GROUPS, eps=cases.EPSILON, **options)
    return stateless(make, case)


def instance_norm(case):
    options = AFFINE | layout(case)
    return stateless(partial(hk.InstanceNorm, eps=cases.EPSILON, **options), case)


PEER = Peer(
    "haiku",
    "dm-haiku",
    "import haiku",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: partial(batch_norm, cross_replica_axis=AXIS),
        cases.LAYER: layer_norm,
        cases.RMS: rms_norm,
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    program,
)
