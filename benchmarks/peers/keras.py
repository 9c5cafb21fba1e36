"""Keras on JAX: `stateless_call` of its layers, under its `mixed_bfloat16` policy."""

import os
from functools import partial

import cases

os.environ["KERAS_BACKEND"] = "jax"  # read at the import

import keras  # noqa: E402

from peers import Peer  # noqa: E402
from peers.jax_program import program  # noqa: E402

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def ordered(params):
    return [params[name] for name in ("scale", "bias") if name in params]


def stateless(cls, case, **options):
    settings = {"epsilon": cases.EPSILON, "dtype": POLICIES[case.dtype], **options}
    layer = cls(**settings)
    layer.build(case.array_shape)

    def apply(params, stats, x):
        return layer.stateless_call(ordered(params), [], x)[0], {}

    return apply


def batch_norm(case, evaluation=False):
    layer = keras.layers.BatchNormalization(
        axis=case.axis,
        momentum=cases.MOMENTUM,
        epsilon=cases.EPSILON,
        dtype=POLICIES[case.dtype],
    )
    layer.build(case.array_shape)

    def apply(params, stats, x):
        weights = ordered(params), [stats["mean"], stats["var"]]
        y, held = layer.stateless_call(*weights, x, training=not evaluation)[:2]
        return y, dict(zip(("mean", "var"), held, strict=True))

    return apply


def group_norm(case, groups=cases.GROUPS):
    options = {"groups": groups, "axis": case.axis}
    return stateless(keras.layers.GroupNormalization, case, **options)


PEER = Peer(
    "keras",
    "keras",
    "import keras",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: "does not synchronize on JAX",
        cases.LAYER: partial(stateless, keras.layers.LayerNormalization),
        cases.RMS: partial(stateless, keras.layers.RMSNormalization),
        cases.GROUP: group_norm,
        cases.INSTANCE: partial(group_norm, groups=-1),
    },
    program,
)
