"""The network of example 01, in Linen and in NNX.

All else knows of either only its params, its batch_stats, and a pure function:

    apply(params, batch_stats, images, mask, train) -> logits, batch_stats
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxnorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx

WIDTHS, STRIDES = (16, 32, 64), (1, 2, 2)  # of the residual blocks


class LinenResNet(nn.Module):
    norm: jaxnorm.Norm
    classes: int

    @nn.compact
    def __call__(self, x, mask, train):
        def conv_norm(x, features, kernel=3, stride=1):
            x = nn.Conv(features, (kernel, kernel), stride, use_bias=False)(x)
            return jl.Norm(self.norm)(x, use_running_average=not train, mask=mask)

        x = nn.silu(conv_norm(x, WIDTHS[0]))
        for features, stride in zip(WIDTHS, STRIDES, strict=True):
            y = nn.silu(conv_norm(x, features, stride=stride))
            y = conv_norm(y, features)
            x = nn.silu(y + conv_norm(x, features, kernel=1, stride=stride))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def linen_model(norm, image_shape, classes: int, seed: int) -> tuple:
    network = LinenResNet(norm, classes)

    def apply(params, batch_stats, images, mask, train):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = network.apply(
            variables, images, mask, train, mutable=["batch_stats"]
        )
        return logits, changed.get("batch_stats", {})

    image, mask = jnp.zeros((1, *image_shape)), jnp.ones((1, 1, 1, 1), bool)
    init = jax.jit(partial(network.init, train=False))
    variables = init(jax.random.key(seed), image, mask)
    return variables["params"], variables.get("batch_stats", {}), apply


class NnxConvNorm(nnx.Module):
    def __init__(self, norm, inputs, features, kernel=3, stride=1, *, rngs):
        self.conv = nnx.Conv(
            inputs, features, (kernel, kernel), stride, use_bias=False, rngs=rngs
        )
        self.norm = jx.Norm(norm, features)

    def __call__(self, x, mask):
        return self.norm(self.conv(x), mask=mask)


class NnxBlock(nnx.Module):
    def __init__(self, norm, inputs, features, stride, *, rngs):
        conv_norm = partial(NnxConvNorm, norm, rngs=rngs)
        self.first = conv_norm(inputs, features, stride=stride)
        self.second = conv_norm(features, features)
        self.shortcut = conv_norm(inputs, features, kernel=1, stride=stride)

    def __call__(self, x, mask):
        y = nnx.silu(self.first(x, mask))
        return nnx.silu(self.second(y, mask) + self.shortcut(x, mask))


class NnxResNet(nnx.Module):
    def __init__(self, norm, channels, classes, *, rngs):
        self.stem = NnxConvNorm(norm, channels, WIDTHS[0], rngs=rngs)
        inputs = (WIDTHS[0], *WIDTHS[:-1])
        self.blocks = nnx.List(
            NnxBlock(norm, *sizes, rngs=rngs)
            for sizes in zip(inputs, WIDTHS, STRIDES, strict=True)
        )
        self.head = nnx.Linear(WIDTHS[-1], classes, rngs=rngs)

    def __call__(self, x, mask):
        x = nnx.silu(self.stem(x, mask))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x.mean(axis=(1, 2)))


def nnx_model(norm, image_shape, classes: int, seed: int) -> tuple:
    network = NnxResNet(norm, image_shape[-1], classes, rngs=nnx.Rngs(seed))
    graph, params, batch_stats = nnx.split(network, nnx.Param, nnx.BatchStat)

    def apply(params, batch_stats, images, mask, train):
        network = nnx.merge(graph, params, batch_stats)
        network.train() if train else network.eval()
        logits = network(images, mask)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), apply


MODELS = {"linen": linen_model, "nnx": nnx_model}
