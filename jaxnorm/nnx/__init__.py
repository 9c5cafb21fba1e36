"""Flax NNX: norms under Flax's names, one for any method, wrappers, whole models."""

from jaxnorm.nnx._bake import bake as bake
from jaxnorm.nnx._convert import convert as convert
from jaxnorm.nnx._fold import fold as fold
from jaxnorm.nnx._fold_scales import fold_scales as fold_scales
from jaxnorm.nnx._init_from_batch import init_from_batch as init_from_batch
from jaxnorm.nnx._layer_norms import LayerNorm as LayerNorm
from jaxnorm.nnx._layer_norms import RMSNorm as RMSNorm
from jaxnorm.nnx._norm import Norm as Norm
from jaxnorm.nnx._norms import BatchNorm as BatchNorm
from jaxnorm.nnx._norms import GroupNorm as GroupNorm
from jaxnorm.nnx._norms import InstanceNorm as InstanceNorm
from jaxnorm.nnx._variables import recalibrate as recalibrate
from jaxnorm.nnx._variables import update as update
from jaxnorm.nnx._variables import variables as variables
from jaxnorm.nnx._weights import SpectralNorm as SpectralNorm
from jaxnorm.nnx._weights import WeightNorm as WeightNorm
from jaxnorm.nnx._weights import WeightStandardization as WeightStandardization

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
    "convert",
    "fold",
    "fold_scales",
    "init_from_batch",
    "recalibrate",
    "update",
    "variables",
]


def __dir__() -> list[str]:
    return __all__
