"""Flax Linen: one generic module for any norm, the classes that Flax has, and `bake`.

The named classes inherit their constructors and defaults from the Flax that is
installed, so that they follow it; what they compute is jaxnorm's.
"""

from jaxnorm.linen._bake import bake as bake
from jaxnorm.linen._norms import BatchNorm as BatchNorm
from jaxnorm.linen._norms import GroupNorm as GroupNorm
from jaxnorm.linen._norms import InstanceNorm as InstanceNorm
from jaxnorm.linen._norms import LayerNorm as LayerNorm
from jaxnorm.linen._norms import Norm as Norm
from jaxnorm.linen._norms import RMSNorm as RMSNorm
from jaxnorm.linen._weights import SpectralNorm as SpectralNorm
from jaxnorm.linen._weights import WeightNorm as WeightNorm
from jaxnorm.linen._weights import WeightStandardization as WeightStandardization

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
    "WeightStandardization",
    "bake",
]


def __dir__() -> list[str]:
    return __all__
