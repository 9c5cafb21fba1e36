"""What is done with a whole model: its norms, their parameters and statistics."""

from jaxnorm.models._accumulate import accumulate as accumulate
from jaxnorm.models._accumulate import commit as commit
from jaxnorm.models._accumulate import discard as discard
from jaxnorm.models._checkpoints.conventions import norm_settings as norm_settings
from jaxnorm.models._checkpoints.read import from_checkpoint as from_checkpoint
from jaxnorm.models._checkpoints.write import to_checkpoint as to_checkpoint
from jaxnorm.models._combine import blend as blend
from jaxnorm.models._combine import merge as merge
from jaxnorm.models._combine import reset as reset
from jaxnorm.models._combine import swap as swap
from jaxnorm.models._control_labels import control_labels as control_labels
from jaxnorm.models._convert import convert as convert
from jaxnorm.models._ema import ema as ema
from jaxnorm.models._folding.fold import fold as fold
from jaxnorm.models._folding.layer import fold_input as fold_input
from jaxnorm.models._folding.layer import fold_output as fold_output
from jaxnorm.models._folding.norm import affine_form as affine_form
from jaxnorm.models._folding.pair import Pair as Pair
from jaxnorm.models._folding.pairs import find_pairs as find_pairs
from jaxnorm.models._folding.scales import fold_scales as fold_scales
from jaxnorm.models._freeze import decay_mask as decay_mask
from jaxnorm.models._freeze import freeze as freeze
from jaxnorm.models._freeze import frozen as frozen
from jaxnorm.models._freeze import frozen_labels as frozen_labels
from jaxnorm.models._freeze import unfreeze as unfreeze
from jaxnorm.models._health.health import Health as Health
from jaxnorm.models._health.health import health as health
from jaxnorm.models._health.records import Finding as Finding
from jaxnorm.models._health.records import LayerHealth as LayerHealth
from jaxnorm.models._implementations import Implementation as Implementation
from jaxnorm.models._implementations import implementations as implementations
from jaxnorm.models._init_from_batch import init_from_batch as init_from_batch
from jaxnorm.models._paths import layers as layers
from jaxnorm.models._quantize import (
    quantization_aware_layer as quantization_aware_layer,
)
from jaxnorm.models._recalibrate import recalibrate as recalibrate
from jaxnorm.models._split import join as join
from jaxnorm.models._split import split as split

__all__ = [
    "Finding",
    "Health",
    "Implementation",
    "LayerHealth",
    "Pair",
    "accumulate",
    "affine_form",
    "blend",
    "commit",
    "control_labels",
    "convert",
    "decay_mask",
    "discard",
    "ema",
    "find_pairs",
    "fold",
    "fold_input",
    "fold_output",
    "fold_scales",
    "freeze",
    "from_checkpoint",
    "frozen",
    "frozen_labels",
    "health",
    "implementations",
    "init_from_batch",
    "join",
    "layers",
    "merge",
    "norm_settings",
    "quantization_aware_layer",
    "recalibrate",
    "reset",
    "split",
    "swap",
    "to_checkpoint",
    "unfreeze",
]


def __dir__() -> list[str]:
    return __all__
