"""The ResNets of torchvision and timm in Flax: a number after "_" is a list's index."""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

import jaxnorm
from jaxnorm.linen import BatchNorm

SETTINGS = jaxnorm.models.norm_settings("torch")


def torch_name(path):
    """ "layer1_0/downsample_1" is "layer1.0.downsample.1" in torch."""
    return re.sub(r"_(\d)", r".\1", path).replace("/", ".")


def conv(features, size, stride=1, *, groups=1, name):
    padding = [(size // 2, size // 2)] * 2
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=False,
        name=name,
    )


def norm(name):
    return BatchNorm(use_running_average=True, name=name, **SETTINGS)


class Block(nn.Module):
    """A basic block, or a bottleneck."""

    width: int
    stride: int
    bottleneck: bool
    groups: int
    group_width: int
    average: bool

    @nn.compact
    def __call__(self, x):
        y, width, stride, groups = x, self.width, self.stride, self.groups
        if self.bottleneck:
            inner, out = width * self.group_width // 64 * groups, 4 * width
            y = nn.relu(norm("bn1")(conv(inner, 1, name="conv1")(y)))
            y = conv(inner, 3, stride, groups=groups, name="conv2")(y)
            y = conv(out, 1, name="conv3")(nn.relu(norm("bn2")(y)))
            y = norm("bn3")(y)
        else:
            out = width
            y = nn.relu(norm("bn1")(conv(width, 3, stride, name="conv1")(y)))
            y = norm("bn2")(conv(width, 3, name="conv2")(y))
        if stride > 1 or x.shape[-1] != out:
            x = self.shortcut(x, out)
        return nn.relu(x + y)

    def shortcut(self, x, out):
        stride, first = self.stride, int(self.average)
        if self.average:
            x = nn.avg_pool(x, (stride, stride), (stride, stride))
            stride = 1
        x = conv(out, 1, stride, name=f"downsample_{first}")(x)
        return norm(f"downsample_{first + 1}")(x)


class ResNet(nn.Module):
    depths: Sequence[int]
    bottleneck: bool = False
    widths: Sequence[int] = (64, 128, 256, 512)
    groups: int = 1
    group_width: int = 64
    deep_stem: bool = False  # and averages in the shortcuts, as in a ResNet-D

    @nn.compact
    def __call__(self, x):
        if self.deep_stem:
            x = nn.relu(norm("conv1_1")(conv(32, 3, 2, name="conv1_0")(x)))
            x = nn.relu(norm("conv1_4")(conv(32, 3, name="conv1_3")(x)))
            x = conv(64, 3, name="conv1_6")(x)
        else:
            x = conv(64, 7, 2, name="conv1")(x)
        x = nn.relu(norm("bn1")(x))
        around: Any = ((1, 1), (1, 1))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=around)
        for stage, (depth, width) in enumerate(
            zip(self.depths, self.widths, strict=True)
        ):
            for i in range(depth):
                x = Block(
                    width,
                    2 if stage and not i else 1,
                    self.bottleneck,
                    self.groups,
                    self.group_width,
                    self.deep_stem,
                    name=f"layer{stage + 1}_{i}",
                )(x)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))
