"""Normalization for JAX: pure functions over arrays and plain pytrees of statistics."""

from jaxnorm.axes import Axes as Axes
from jaxnorm.base import Norm as Norm
from jaxnorm.base import RunningNorm as RunningNorm
from jaxnorm.base import StatelessNorm as StatelessNorm
from jaxnorm.base import method as method
from jaxnorm.devices import sync as sync
from jaxnorm.inputs import Standardize as Standardize
from jaxnorm.methods.batch_norm import BatchNorm as BatchNorm
from jaxnorm.methods.batch_norm import batch_norm as batch_norm
from jaxnorm.methods.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from jaxnorm.methods.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from jaxnorm.methods.group_norm import GroupNorm as GroupNorm
from jaxnorm.methods.group_norm import group_norm as group_norm
from jaxnorm.methods.instance_norm import InstanceNorm as InstanceNorm
from jaxnorm.methods.instance_norm import instance_norm as instance_norm
from jaxnorm.methods.layer_norm import LayerNorm as LayerNorm
from jaxnorm.methods.layer_norm import layer_norm as layer_norm
from jaxnorm.methods.rms_norm import RMSNorm as RMSNorm
from jaxnorm.methods.rms_norm import rms_norm as rms_norm
from jaxnorm.moments import Moments as Moments
from jaxnorm.moments import moments as moments
from jaxnorm.moments import pool as pool
from jaxnorm.normalize import normalize as normalize
from jaxnorm.running import init_stats as init_stats
from jaxnorm.running import update_stats as update_stats
from jaxnorm.standardize import standardize as standardize
