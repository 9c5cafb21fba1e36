"""Pallas kernels for GPUs, by block pattern and not by method. None has run on a GPU.

`rows` normalizes rows and differentiates that; `columns` takes sums over columns;
`support` says which of them fits where. Importing these imports no part of Pallas.
"""

from jaxnorm._kernels.norms import KernelCall as KernelCall
from jaxnorm._kernels.norms import normalized as normalized
from jaxnorm._kernels.norms import why_unfit as why_unfit
from jaxnorm._kernels.support import BACKENDS as BACKENDS
