"""jaxnorm: the pure functions, and its Linen classes in the models."""

from functools import partial

import cases

import jaxnorm
import jaxnorm.linen
from peers import Peer, flax_linen
from peers.jax_program import AXIS, program


def batch_norm(case, evaluation=False, **options):
    settings = {"axis": case.axis, "momentum": cases.MOMENTUM} | options
    settings |= {"epsilon": cases.EPSILON, "use_running_average": evaluation}

    def apply(params, stats, x):
        return jaxnorm.batch_norm(x, stats, **params, **settings)

    return apply


def stateless(function, case, **options):
    def apply(params, stats, x):
        return function(x, **params, epsilon=cases.EPSILON, **options), {}

    return apply


def group_norm(case):
    options = {"num_groups": cases.GROUPS, "axis": case.axis}
    return stateless(jaxnorm.group_norm, case, **options)


def instance_norm(case):
    return stateless(jaxnorm.instance_norm, case, axis=case.axis)


PEER = Peer(
    "jaxnorm",
    "jaxnorm",
    "import jaxnorm",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: partial(batch_norm, axis_name=AXIS),
        cases.LAYER: partial(stateless, jaxnorm.layer_norm),
        cases.RMS: partial(stateless, jaxnorm.rms_norm),
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    program,
    {
        cases.RESNET: partial(flax_linen.resnet, norms=jaxnorm.linen),
        cases.TRANSFORMER: partial(flax_linen.transformer, norms=jaxnorm.linen),
    },
)
