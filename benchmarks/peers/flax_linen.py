"""flax.linen: its norms, and the models that jaxnorm runs with its own norms."""

from functools import partial
from typing import Any

import cases
import jax
import jax.numpy as jnp
import models
import optax
from flax import linen as nn

from peers import Peer, Program, Unsupported
from peers.jax_program import AXIS, compiled, program


def batch_norm(case, evaluation=False, **options):
    module = nn.BatchNorm(
        use_running_average=evaluation,
        axis=case.axis,
        momentum=cases.MOMENTUM,
        epsilon=cases.EPSILON,
        dtype=case.dtype,
        **options,
    )

    def apply(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, changed = module.apply(variables, x, mutable=["batch_stats"])
        return y, changed.get("batch_stats", stats)

    return apply


def stateless(cls, case, **options):
    module = cls(epsilon=cases.EPSILON, dtype=case.dtype, **options)

    def apply(params, stats, x):
        return module.apply({"params": params}, x), {}

    return apply


def group_norm(case):
    if case.layout == "first":
        raise Unsupported("its group norm has channels last only")
    return stateless(nn.GroupNorm, case, num_groups=cases.GROUPS)


def instance_norm(case):
    return stateless(nn.InstanceNorm, case, feature_axes=case.axis)


class ResNet(nn.Module):
    norms: Any

    @nn.compact
    def __call__(self, x):
        sizes = iter(models.convolutions(x.shape[-1]))

        def conv_norm(x):
            _, outputs, kernel, stride = next(sizes)
            window, padding = (kernel, kernel), kernel // 2
            x = nn.Conv(outputs, window, stride, padding, use_bias=False)(x)
            return self.norms.BatchNorm(False, momentum=cases.MOMENTUM)(x)

        x = models.resnet_forward(x, conv_norm, nn.relu)
        return nn.Dense(models.CLASSES)(x.mean((1, 2)))


class Transformer(nn.Module):
    norms: Any

    @nn.compact
    def __call__(self, x):
        batch, length, features = x.shape

        def dense(features, name):
            return nn.Dense(features, use_bias=False, name=name)

        y = self.norms.LayerNorm()(x)
        qkv = dense(3 * features, "qkv")(y).reshape(batch, length, 3, models.HEADS, -1)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + dense(features, "out")(y.reshape(x.shape))
        y = nn.gelu(dense(models.MLP * features, "up")(self.norms.LayerNorm()(x)))
        return x + dense(features, "down")(y)


def resnet(case, norms=nn) -> Program:
    kernels, head = models.resnet_weights(case)
    convs = {f"Conv_{i}": {"kernel": k} for i, k in enumerate(kernels)}
    weights = convs | {"Dense_0": {"kernel": head, "bias": jnp.zeros(models.CLASSES)}}

    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return train(ResNet(norms), weights, models.resnet_batch(case), loss)


def transformer(case, norms=nn) -> Program:
    kernels = models.transformer_weights(case)
    weights = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    batch = models.transformer_batch(case)
    return train(Transformer(norms), weights, batch, models.squared_error)


def train(model, weights, batch, loss) -> Program:
    inputs, targets = map(jnp.asarray, batch)
    optimizer = optax.sgd(models.RATE, models.SGD_MOMENTUM)

    def step(state, inputs, targets):
        params, stats, opt_state = state

        def loss_and_stats(params):
            variables = {"params": params, "batch_stats": stats}
            y, changed = model.apply(variables, inputs, mutable=["batch_stats"])
            return loss(y, targets), changed.get("batch_stats", {})

        (value, stats), grads = jax.value_and_grad(loss_and_stats, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    step = jax.jit(step, donate_argnums=0)

    def start():
        variables = jax.jit(model.init)(jax.random.key(0), inputs)
        params = variables["params"] | jax.tree.map(jnp.array, weights)
        state = (params, variables.get("batch_stats", {}), optimizer.init(params))

        def call():
            nonlocal state
            state, value = step(state, inputs, targets)
            return value

        return state, call

    facts = compiled(step, start()[0], inputs, targets)
    return models.training(lambda: start()[1], facts)


PEER = Peer(
    "flax.linen",
    "flax",
    "from flax import linen",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: partial(batch_norm, axis_name=AXIS),
        cases.LAYER: partial(stateless, nn.LayerNorm),
        cases.RMS: partial(stateless, nn.RMSNorm),
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    program,
    {cases.RESNET: resnet, cases.TRANSFORMER: transformer},
)
