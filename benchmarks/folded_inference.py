"""Times a small ResNet with batch norm beside itself with the norms folded.

    python benchmarks/folded_inference.py

Both run in one process, in an order drawn anew each round, so that what else the
machine does hits both alike. Prints the lower quartile of each, in milliseconds, and
the ratio; forward pass, jitted, float32. Checks that the results are the same.
"""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from timing import milliseconds

import jaxnorm
from jaxnorm.linen import BatchNorm

ROUNDS = 60
SIDE, STAGES = 32, (16, 16, 32, 32, 64, 64)
NETS = {"3x3 convolutions": False, "depthwise, inverted": True}


class ResNet(nn.Module):
    """Blocks of two 3x3 convolutions, or of a depthwise one between two of 1x1."""

    depthwise: bool
    norms: bool = True

    @nn.compact
    def __call__(self, x):
        def layer(x, features, size, **kwargs):
            x = nn.Conv(features, (size, size), use_bias=not self.norms, **kwargs)(x)
            return BatchNorm(use_running_average=True)(x) if self.norms else x

        x = nn.relu(layer(x, STAGES[0], 3))
        for before, features in zip(STAGES[:1] + STAGES, STAGES, strict=False):
            stride = features // before
            if self.depthwise:
                wide = 4 * before
                y = nn.relu(layer(x, wide, 1))
                groups = {"feature_group_count": wide, "strides": stride}
                y = nn.relu(layer(y, wide, 3, **groups))
                y = layer(y, features, 1)
            else:
                y = nn.relu(layer(x, features, 3, strides=stride))
                y = layer(y, features, 3)
            if stride > 1:
                x = layer(x, features, 1, strides=stride)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def main():
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    print(f"{versions} on {jax.devices()[0].device_kind}; milliseconds")
    print(f"{'':22}{'norms':>7}{'batch':>7}{'with':>9}{'folded':>9}{'ratio':>7}")
    for name, depthwise in NETS.items():
        net, without = ResNet(depthwise), ResNet(depthwise, norms=False)
        for batch in (1, 8):
            x = jax.random.normal(jax.random.key(0), (batch, SIDE, SIDE, 3))
            variables = jax.jit(net.init)(jax.random.key(1), x)
            pairs = jaxnorm.models.find_pairs(net.apply, variables, x)
            folded = jaxnorm.models.fold(variables, pairs)
            a, b = jax.jit(net.apply)(variables, x), jax.jit(without.apply)(folded, x)
            assert jnp.abs(a - b).max() < 1e-4 * jnp.abs(a).max()
            calls = {
                "with": functools.partial(jax.jit(net.apply), variables, x),
                "folded": functools.partial(jax.jit(without.apply), folded, x),
            }
            before, after = milliseconds(calls, ROUNDS).values()
            row = f"{name:22}{len(pairs):7}{batch:7}{before:9.2f}{after:9.2f}"
            print(f"{row}{after / before:7.2f}")


if __name__ == "__main__":
    main()
