"""Normalization for JAX: pure functions over arrays and plain pytrees of statistics."""

import typing

from jaxnorm._axes import Axes as Axes
from jaxnorm._base import Norm as Norm
from jaxnorm._devices import sync as sync
from jaxnorm._float8 import to_float8 as to_float8
from jaxnorm._methods.act_norm import ActNorm as ActNorm
from jaxnorm._methods.act_norm import act_norm as act_norm
from jaxnorm._methods.batch_norm import BatchNorm as BatchNorm
from jaxnorm._methods.batch_norm import batch_norm as batch_norm
from jaxnorm._methods.batch_renorm import BatchRenorm as BatchRenorm
from jaxnorm._methods.batch_renorm import batch_renorm as batch_renorm
from jaxnorm._methods.cross_iteration_batch_norm import (
    CrossIterationBatchNorm as CrossIterationBatchNorm,
)
from jaxnorm._methods.cross_iteration_batch_norm import (
    cross_iteration_batch_norm as cross_iteration_batch_norm,
)
from jaxnorm._methods.divisive_norm import DivisiveNorm as DivisiveNorm
from jaxnorm._methods.divisive_norm import divisive_norm as divisive_norm
from jaxnorm._methods.domain_batch_norm import DomainBatchNorm as DomainBatchNorm
from jaxnorm._methods.domain_batch_norm import domain_batch_norm as domain_batch_norm
from jaxnorm._methods.dynamic_tanh import DynamicTanh as DynamicTanh
from jaxnorm._methods.dynamic_tanh import dynamic_tanh as dynamic_tanh
from jaxnorm._methods.eval_norm import EvalNorm as EvalNorm
from jaxnorm._methods.eval_norm import eval_norm as eval_norm
from jaxnorm._methods.evo_norm_b0 import EvoNormB0 as EvoNormB0
from jaxnorm._methods.evo_norm_b0 import evo_norm_b0 as evo_norm_b0
from jaxnorm._methods.evo_norm_s0 import EvoNormS0 as EvoNormS0
from jaxnorm._methods.evo_norm_s0 import evo_norm_s0 as evo_norm_s0
from jaxnorm._methods.filter_response_norm import (
    FilterResponseNorm as FilterResponseNorm,
)
from jaxnorm._methods.filter_response_norm import (
    filter_response_norm as filter_response_norm,
)
from jaxnorm._methods.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from jaxnorm._methods.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from jaxnorm._methods.global_response_norm import (
    GlobalResponseNorm as GlobalResponseNorm,
)
from jaxnorm._methods.global_response_norm import (
    global_response_norm as global_response_norm,
)
from jaxnorm._methods.graph_norm import GraphNorm as GraphNorm
from jaxnorm._methods.graph_norm import graph_norm as graph_norm
from jaxnorm._methods.group_norm import GroupNorm as GroupNorm
from jaxnorm._methods.group_norm import group_norm as group_norm
from jaxnorm._methods.instance_norm import InstanceNorm as InstanceNorm
from jaxnorm._methods.instance_norm import instance_norm as instance_norm
from jaxnorm._methods.iter_norm import IterNorm as IterNorm
from jaxnorm._methods.iter_norm import iter_norm as iter_norm
from jaxnorm._methods.l1_batch_norm import L1BatchNorm as L1BatchNorm
from jaxnorm._methods.l1_batch_norm import l1_batch_norm as l1_batch_norm
from jaxnorm._methods.layer_norm import LayerNorm as LayerNorm
from jaxnorm._methods.layer_norm import layer_norm as layer_norm
from jaxnorm._methods.local_response_norm import LocalResponseNorm as LocalResponseNorm
from jaxnorm._methods.local_response_norm import (
    local_response_norm as local_response_norm,
)
from jaxnorm._methods.moving_average_batch_norm import (
    MovingAverageBatchNorm as MovingAverageBatchNorm,
)
from jaxnorm._methods.moving_average_batch_norm import (
    moving_average_batch_norm as moving_average_batch_norm,
)
from jaxnorm._methods.online_norm import OnlineNorm as OnlineNorm
from jaxnorm._methods.online_norm import online_norm as online_norm
from jaxnorm._methods.pair_norm import PairNorm as PairNorm
from jaxnorm._methods.pair_norm import pair_norm as pair_norm
from jaxnorm._methods.positional_norm import PositionalNorm as PositionalNorm
from jaxnorm._methods.positional_norm import positional_norm as positional_norm
from jaxnorm._methods.power_norm import PowerNorm as PowerNorm
from jaxnorm._methods.power_norm import power_norm as power_norm
from jaxnorm._methods.range_batch_norm import RangeBatchNorm as RangeBatchNorm
from jaxnorm._methods.range_batch_norm import range_batch_norm as range_batch_norm
from jaxnorm._methods.recurrent_batch_norm import (
    RecurrentBatchNorm as RecurrentBatchNorm,
)
from jaxnorm._methods.recurrent_batch_norm import (
    recurrent_batch_norm as recurrent_batch_norm,
)
from jaxnorm._methods.rms_norm import RMSNorm as RMSNorm
from jaxnorm._methods.rms_norm import rms_norm as rms_norm
from jaxnorm._methods.running_instance_norm import (
    RunningInstanceNorm as RunningInstanceNorm,
)
from jaxnorm._methods.running_instance_norm import (
    running_instance_norm as running_instance_norm,
)
from jaxnorm._methods.scale_norm import ScaleNorm as ScaleNorm
from jaxnorm._methods.scale_norm import scale_norm as scale_norm
from jaxnorm._methods.segment_norm import SegmentNorm as SegmentNorm
from jaxnorm._methods.segment_norm import segment_norm as segment_norm
from jaxnorm._methods.switchable_norm import SwitchableNorm as SwitchableNorm
from jaxnorm._methods.switchable_norm import switchable_norm as switchable_norm
from jaxnorm._methods.virtual_batch_norm import VirtualBatchNorm as VirtualBatchNorm
from jaxnorm._methods.virtual_batch_norm import virtual_batch_norm as virtual_batch_norm
from jaxnorm._moments import Moments as Moments
from jaxnorm._moments import pool as pool
from jaxnorm._normalize import normalize as normalize
from jaxnorm._pop_art import pop_art as pop_art
from jaxnorm._reduce import moments as moments
from jaxnorm._running import init_stats as init_stats
from jaxnorm._running import update_stats as update_stats
from jaxnorm._standardize import standardize as standardize
from jaxnorm._standardizer import Standardizer as Standardizer
from jaxnorm._stateful import RunningNorm as RunningNorm
from jaxnorm._stateful import StatefulNorm as StatefulNorm
from jaxnorm._stateless import StatelessNorm as StatelessNorm
from jaxnorm._tree_standardizer import TreeStandardizer as TreeStandardizer
from jaxnorm._weights.spectral_norm import spectral_norm as spectral_norm
from jaxnorm._weights.weight_norm import weight_norm as weight_norm
from jaxnorm._weights.weight_standardize import weight_standardize as weight_standardize

__all__ = [
    "ActNorm",
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
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GraphNorm",
    "GroupNorm",
    "InstanceNorm",
    "IterNorm",
    "L1BatchNorm",
    "LayerNorm",
    "LocalResponseNorm",
    "Moments",
    "MovingAverageBatchNorm",
    "Norm",
    "OnlineNorm",
    "PairNorm",
    "PositionalNorm",
    "PowerNorm",
    "RMSNorm",
    "RangeBatchNorm",
    "RecurrentBatchNorm",
    "RunningInstanceNorm",
    "RunningNorm",
    "ScaleNorm",
    "SegmentNorm",
    "Standardizer",
    "StatefulNorm",
    "StatelessNorm",
    "SwitchableNorm",
    "TreeStandardizer",
    "VirtualBatchNorm",
    "act_norm",
    "batch_norm",
    "batch_renorm",
    "cross_iteration_batch_norm",
    "divisive_norm",
    "domain_batch_norm",
    "dynamic_tanh",
    "eval_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "filter_response_norm",
    "ghost_batch_norm",
    "global_response_norm",
    "graph_norm",
    "group_norm",
    "init_stats",
    "instance_norm",
    "iter_norm",
    "l1_batch_norm",
    "layer_norm",
    "local_response_norm",
    "moments",
    "moving_average_batch_norm",
    "normalize",
    "online_norm",
    "pair_norm",
    "pool",
    "pop_art",
    "positional_norm",
    "power_norm",
    "range_batch_norm",
    "recurrent_batch_norm",
    "rms_norm",
    "running_instance_norm",
    "scale_norm",
    "segment_norm",
    "spectral_norm",
    "standardize",
    "switchable_norm",
    "sync",
    "to_float8",
    "update_stats",
    "virtual_batch_norm",
    "weight_norm",
    "weight_standardize",
]


def __dir__() -> list[str]:
    return __all__


if typing.TYPE_CHECKING:
    from jaxnorm import linen as linen
    from jaxnorm import models as models
    from jaxnorm import nnx as nnx

    __version__: str
else:  # a type checker would take any name for one that this function knows

    def __getattr__(name: str):
        """The parts that are imported when they are asked for, and the version that is
        installed, which is stated in pyproject.toml alone."""
        import importlib.metadata

        if name in ("linen", "models", "nnx"):
            return importlib.import_module(f"{__name__}.{name}")
        if name == "__version__":
            return importlib.metadata.version(__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
