"""flax.nnx: its norms, and models trained with `nnx.jit` and `nnx.Optimizer`."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import models
import optax
from flax import nnx

from peers import Peer, Program, Unsupported
from peers.jax_program import AXIS, program


def set_up(cls, case, params, **options):
    """The module, made where it is used, as its variables belong to one trace."""
    rngs = nnx.Rngs(0)
    settings = {"epsilon": cases.EPSILON, "dtype": jnp.dtype(case.dtype), "rngs": rngs}
    module = cls(case.channels, **settings, **options)
    for name, value in params.items():
        setattr(module, name, nnx.Param(value))
    return module


def batch_norm(case, evaluation=False, **options):
    options |= {"use_running_average": evaluation, "axis": case.axis}

    def apply(params, stats, x):
        module = set_up(nnx.BatchNorm, case, params, momentum=cases.MOMENTUM, **options)
        for name, value in stats.items():
            setattr(module, name, nnx.BatchStat(value))
        y = module(x)
        return y, {name: getattr(module, name)[...] for name in stats}

    return apply


def stateless(cls, case, **options):
    def apply(params, stats, x):
        return set_up(cls, case, params, **options)(x), {}

    return apply


def group_norm(case):
    if case.layout == "first":
        raise Unsupported("its group norm has channels last only")
    return stateless(nnx.GroupNorm, case, num_groups=cases.GROUPS)


def instance_norm(case):
    return stateless(nnx.InstanceNorm, case, feature_axes=case.axis)


class ResNet(nnx.Module):
    def __init__(self, colors, kernels, head, rngs):
        self.convs = nnx.List()
        self.norms = nnx.List()
        for size, weights in zip(models.convolutions(colors), kernels, strict=True):
            inputs, outputs, kernel, stride = size
            conv = nnx.Conv(
                inputs,
                outputs,
                (kernel, kernel),
                stride,
                padding=kernel // 2,
                use_bias=False,
                rngs=rngs,
            )
            conv.kernel = nnx.Param(jnp.array(weights))
            self.convs.append(conv)
            norm = nnx.BatchNorm(outputs, momentum=cases.MOMENTUM, rngs=rngs)
            self.norms.append(norm)
        self.head = nnx.Linear(*head.shape, rngs=rngs)
        self.head.kernel = nnx.Param(jnp.array(head))

    def __call__(self, x):
        layers = iter(zip(self.convs, self.norms, strict=True))

        def conv_norm(x):
            conv, norm = next(layers)
            return norm(conv(x))

        return self.head(models.resnet_forward(x, conv_norm, nnx.relu).mean((1, 2)))


class Transformer(nnx.Module):
    def __init__(self, kernels, rngs):
        def linear(kernel):
            layer = nnx.Linear(*kernel.shape, use_bias=False, rngs=rngs)
            layer.kernel = nnx.Param(jnp.array(kernel))
            return layer

        self.qkv, self.out = linear(kernels["qkv"]), linear(kernels["out"])
        self.up, self.down = linear(kernels["up"]), linear(kernels["down"])
        features = len(kernels["qkv"])
        self.norms = nnx.List(nnx.LayerNorm(features, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        qkv = self.qkv(self.norms[0](x))
        qkv = qkv.reshape(*x.shape[:2], 3, models.HEADS, -1)
        y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


def resnet(case) -> Program:
    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    weights = models.resnet_weights(case)
    model = partial(ResNet, case.channels, *weights)
    return train(model, models.resnet_batch(case), loss)


def transformer(case) -> Program:
    model = partial(Transformer, models.transformer_weights(case))
    return train(model, models.transformer_batch(case), models.squared_error)


def train(make, batch, loss) -> Program:
    inputs, targets = map(jnp.asarray, batch)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, inputs, targets):
        def loss_of(model):
            return loss(model(inputs), targets)

        value, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return value

    def start():
        model = make(rngs=nnx.Rngs(0))
        sgd = optax.sgd(models.RATE, models.SGD_MOMENTUM)
        optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)
        return lambda: step(model, optimizer, inputs, targets)

    return models.training(start)


PEER = Peer(
    "flax.nnx",
    "flax",
    "from flax import nnx",
    {
        cases.BATCH: batch_norm,
        cases.EVALUATION: partial(batch_norm, evaluation=True),
        cases.SYNCED: partial(batch_norm, axis_name=AXIS),
        cases.LAYER: partial(stateless, nnx.LayerNorm),
        cases.RMS: partial(stateless, nnx.RMSNorm),
        cases.GROUP: group_norm,
        cases.INSTANCE: instance_norm,
    },
    program,
    {cases.RESNET: resnet, cases.TRANSFORMER: transformer},
)
