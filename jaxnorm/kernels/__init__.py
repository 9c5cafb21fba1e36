"""Pallas kernels for GPUs, by block pattern and not by method. None has run on a GPU.

`rows` normalizes rows and differentiates that; `columns` takes sums over columns;
`support` says which of them fits where. Importing these imports no part of Pallas.
"""

from jaxnorm.kernels.norms import Plan as Plan
from jaxnorm.kernels.norms import normalized as normalized
from jaxnorm.kernels.norms import reason as reason
from jaxnorm.kernels.support import BACKENDS as BACKENDS
