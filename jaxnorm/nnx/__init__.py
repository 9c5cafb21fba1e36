"""Flax NNX: norms under Flax's names, one for any method, wrappers, whole models."""

from jaxnorm.nnx.models import convert as convert
from jaxnorm.nnx.models import fold as fold
from jaxnorm.nnx.models import recalibrate as recalibrate
from jaxnorm.nnx.models import update as update
from jaxnorm.nnx.models import variables as variables
from jaxnorm.nnx.norms import BatchNorm as BatchNorm
from jaxnorm.nnx.norms import GroupNorm as GroupNorm
from jaxnorm.nnx.norms import InstanceNorm as InstanceNorm
from jaxnorm.nnx.norms import LayerNorm as LayerNorm
from jaxnorm.nnx.norms import Norm as Norm
from jaxnorm.nnx.norms import RMSNorm as RMSNorm
from jaxnorm.nnx.weights import SpectralNorm as SpectralNorm
from jaxnorm.nnx.weights import WeightNorm as WeightNorm
from jaxnorm.nnx.weights import WeightStandardization as WeightStandardization

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
    "convert",
    "fold",
    "recalibrate",
    "update",
    "variables",
]


def __dir__() -> list[str]:
    return __all__
