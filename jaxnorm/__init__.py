"""Normalization for JAX: pure functions over arrays and plain pytrees of statistics."""

import typing

from jaxnorm.accumulate import accumulate as accumulate
from jaxnorm.accumulate import commit as commit
from jaxnorm.accumulate import discard as discard
from jaxnorm.axes import Axes as Axes
from jaxnorm.base import Norm as Norm
from jaxnorm.base import RunningNorm as RunningNorm
from jaxnorm.base import StatefulNorm as StatefulNorm
from jaxnorm.base import StatelessNorm as StatelessNorm
from jaxnorm.base import method as method
from jaxnorm.checkpoints.conventions import norm_settings as norm_settings
from jaxnorm.checkpoints.read import from_checkpoint as from_checkpoint
from jaxnorm.checkpoints.write import to_checkpoint as to_checkpoint
from jaxnorm.combine import blend_stats as blend_stats
from jaxnorm.combine import join_norms as join_norms
from jaxnorm.combine import merge_stats as merge_stats
from jaxnorm.combine import reset_stats as reset_stats
from jaxnorm.combine import split_norms as split_norms
from jaxnorm.combine import swap_stats as swap_stats
from jaxnorm.control import control_labels as control_labels
from jaxnorm.convert import convert as convert
from jaxnorm.devices import sync as sync
from jaxnorm.ema import ema as ema
from jaxnorm.folding.fold import Pair as Pair
from jaxnorm.folding.fold import affine_form as affine_form
from jaxnorm.folding.fold import fold as fold
from jaxnorm.folding.fold import fold_input as fold_input
from jaxnorm.folding.fold import fold_output as fold_output
from jaxnorm.folding.pairs import find_pairs as find_pairs
from jaxnorm.freeze import decay_mask as decay_mask
from jaxnorm.freeze import freeze as freeze
from jaxnorm.freeze import frozen as frozen
from jaxnorm.freeze import frozen_labels as frozen_labels
from jaxnorm.freeze import unfreeze as unfreeze
from jaxnorm.health import Finding as Finding
from jaxnorm.health import Health as Health
from jaxnorm.health import LayerHealth as LayerHealth
from jaxnorm.health import health as health
from jaxnorm.inputs import Standardize as Standardize
from jaxnorm.layers import layers as layers
from jaxnorm.methods.batch_norm import BatchNorm as BatchNorm
from jaxnorm.methods.batch_norm import batch_norm as batch_norm
from jaxnorm.methods.batch_renorm import BatchRenorm as BatchRenorm
from jaxnorm.methods.batch_renorm import batch_renorm as batch_renorm
from jaxnorm.methods.cross_iteration_batch_norm import (
    CrossIterationBatchNorm as CrossIterationBatchNorm,
)
from jaxnorm.methods.cross_iteration_batch_norm import (
    cross_iteration_batch_norm as cross_iteration_batch_norm,
)
from jaxnorm.methods.divisive_norm import DivisiveNorm as DivisiveNorm
from jaxnorm.methods.divisive_norm import divisive_norm as divisive_norm
from jaxnorm.methods.domain_batch_norm import DomainBatchNorm as DomainBatchNorm
from jaxnorm.methods.domain_batch_norm import domain_batch_norm as domain_batch_norm
from jaxnorm.methods.dynamic_tanh import DynamicTanh as DynamicTanh
from jaxnorm.methods.dynamic_tanh import dynamic_tanh as dynamic_tanh
from jaxnorm.methods.eval_norm import EvalNorm as EvalNorm
from jaxnorm.methods.eval_norm import eval_norm as eval_norm
from jaxnorm.methods.evo_norm_b0 import EvoNormB0 as EvoNormB0
from jaxnorm.methods.evo_norm_b0 import evo_norm_b0 as evo_norm_b0
from jaxnorm.methods.evo_norm_s0 import EvoNormS0 as EvoNormS0
from jaxnorm.methods.evo_norm_s0 import evo_norm_s0 as evo_norm_s0
from jaxnorm.methods.filter_response_norm import (
    FilterResponseNorm as FilterResponseNorm,
)
from jaxnorm.methods.filter_response_norm import (
    filter_response_norm as filter_response_norm,
)
from jaxnorm.methods.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from jaxnorm.methods.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from jaxnorm.methods.global_response_norm import (
    GlobalResponseNorm as GlobalResponseNorm,
)
from jaxnorm.methods.global_response_norm import (
    global_response_norm as global_response_norm,
)
from jaxnorm.methods.group_norm import GroupNorm as GroupNorm
from jaxnorm.methods.group_norm import group_norm as group_norm
from jaxnorm.methods.instance_norm import InstanceNorm as InstanceNorm
from jaxnorm.methods.instance_norm import instance_norm as instance_norm
from jaxnorm.methods.iter_norm import IterNorm as IterNorm
from jaxnorm.methods.iter_norm import iter_norm as iter_norm
from jaxnorm.methods.l1_batch_norm import L1BatchNorm as L1BatchNorm
from jaxnorm.methods.l1_batch_norm import l1_batch_norm as l1_batch_norm
from jaxnorm.methods.layer_norm import LayerNorm as LayerNorm
from jaxnorm.methods.layer_norm import layer_norm as layer_norm
from jaxnorm.methods.local_response_norm import LocalResponseNorm as LocalResponseNorm
from jaxnorm.methods.local_response_norm import (
    local_response_norm as local_response_norm,
)
from jaxnorm.methods.moving_average_batch_norm import (
    MovingAverageBatchNorm as MovingAverageBatchNorm,
)
from jaxnorm.methods.moving_average_batch_norm import (
    moving_average_batch_norm as moving_average_batch_norm,
)
from jaxnorm.methods.online_norm import OnlineNorm as OnlineNorm
from jaxnorm.methods.online_norm import online_norm as online_norm
from jaxnorm.methods.positional_norm import PositionalNorm as PositionalNorm
from jaxnorm.methods.positional_norm import positional_norm as positional_norm
from jaxnorm.methods.power_norm import PowerNorm as PowerNorm
from jaxnorm.methods.power_norm import power_norm as power_norm
from jaxnorm.methods.range_batch_norm import RangeBatchNorm as RangeBatchNorm
from jaxnorm.methods.range_batch_norm import range_batch_norm as range_batch_norm
from jaxnorm.methods.recurrent_batch_norm import (
    RecurrentBatchNorm as RecurrentBatchNorm,
)
from jaxnorm.methods.recurrent_batch_norm import (
    recurrent_batch_norm as recurrent_batch_norm,
)
from jaxnorm.methods.rms_norm import RMSNorm as RMSNorm
from jaxnorm.methods.rms_norm import rms_norm as rms_norm
from jaxnorm.methods.running_instance_norm import (
    RunningInstanceNorm as RunningInstanceNorm,
)
from jaxnorm.methods.running_instance_norm import (
    running_instance_norm as running_instance_norm,
)
from jaxnorm.methods.scale_norm import ScaleNorm as ScaleNorm
from jaxnorm.methods.scale_norm import scale_norm as scale_norm
from jaxnorm.methods.switchable_norm import SwitchableNorm as SwitchableNorm
from jaxnorm.methods.switchable_norm import switchable_norm as switchable_norm
from jaxnorm.methods.virtual_batch_norm import VirtualBatchNorm as VirtualBatchNorm
from jaxnorm.methods.virtual_batch_norm import virtual_batch_norm as virtual_batch_norm
from jaxnorm.moments import Moments as Moments
from jaxnorm.moments import moments as moments
from jaxnorm.moments import pool as pool
from jaxnorm.normalize import normalize as normalize
from jaxnorm.quantize import quantization_aware_layer as quantization_aware_layer
from jaxnorm.recalibrate import recalibrate as recalibrate
from jaxnorm.running import init_stats as init_stats
from jaxnorm.running import update_stats as update_stats
from jaxnorm.standardize import standardize as standardize
from jaxnorm.weights.spectral_norm import spectral_norm as spectral_norm
from jaxnorm.weights.weight_norm import weight_norm as weight_norm
from jaxnorm.weights.weight_standardize import weight_standardize as weight_standardize

__all__ = [
    "Axes",
    "BatchNorm",
    "BatchRenorm",
    "CrossIterationBatchNorm",
    "DivisiveNorm",
    "DomainBatchNorm",
    "DynamicTanh",
    "EvalNorm",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "Finding",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "Health",
    "InstanceNorm",
    "IterNorm",
    "L1BatchNorm",
    "LayerHealth",
    "LayerNorm",
    "LocalResponseNorm",
    "Moments",
    "MovingAverageBatchNorm",
    "Norm",
    "OnlineNorm",
    "Pair",
    "PositionalNorm",
    "PowerNorm",
    "RMSNorm",
    "RangeBatchNorm",
    "RecurrentBatchNorm",
    "RunningInstanceNorm",
    "RunningNorm",
    "ScaleNorm",
    "Standardize",
    "StatefulNorm",
    "StatelessNorm",
    "SwitchableNorm",
    "VirtualBatchNorm",
    "accumulate",
    "affine_form",
    "batch_norm",
    "batch_renorm",
    "blend_stats",
    "commit",
    "control_labels",
    "convert",
    "cross_iteration_batch_norm",
    "decay_mask",
    "discard",
    "divisive_norm",
    "domain_batch_norm",
    "dynamic_tanh",
    "ema",
    "eval_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "filter_response_norm",
    "find_pairs",
    "fold",
    "fold_input",
    "fold_output",
    "freeze",
    "from_checkpoint",
    "frozen",
    "frozen_labels",
    "ghost_batch_norm",
    "global_response_norm",
    "group_norm",
    "health",
    "init_stats",
    "instance_norm",
    "iter_norm",
    "join_norms",
    "l1_batch_norm",
    "layer_norm",
    "layers",
    "local_response_norm",
    "merge_stats",
    "method",
    "moments",
    "moving_average_batch_norm",
    "norm_settings",
    "normalize",
    "online_norm",
    "pool",
    "positional_norm",
    "power_norm",
    "quantization_aware_layer",
    "range_batch_norm",
    "recalibrate",
    "recurrent_batch_norm",
    "reset_stats",
    "rms_norm",
    "running_instance_norm",
    "scale_norm",
    "spectral_norm",
    "split_norms",
    "standardize",
    "swap_stats",
    "switchable_norm",
    "sync",
    "to_checkpoint",
    "unfreeze",
    "update_stats",
    "virtual_batch_norm",
    "weight_norm",
    "weight_standardize",
]


def __dir__() -> list[str]:
    return __all__


if typing.TYPE_CHECKING:
    __version__: str
else:  # a type checker would take any name for one that this function knows

    def __getattr__(name: str) -> str:
        """The version that is installed; it is stated in pyproject.toml alone."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib.metadata

        return importlib.metadata.version(__name__)
