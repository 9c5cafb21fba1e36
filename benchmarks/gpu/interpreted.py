"""Kernels for GPUs on a CPU, for a dry run: what is meant for CUDA, interpreted."""

from jaxnorm._primitives import gpu
from jaxnorm._primitives._operation import Operation
from jaxnorm._primitives.activated import ACTIVATED_TANGENT
from jaxnorm._primitives.rows import ROW_TANGENT

KERNELS = {
    ROW_TANGENT: gpu.row_gradient(interpret=True),
    ACTIVATED_TANGENT: gpu.activated_gradient(interpret=True),
}


def interpret_kernels() -> None:
    """From here on, in this process."""
    for op in Operation.every.values():
        op.lower("cpu", formula=op.formulas.get("cuda"))
    for op, kernel in KERNELS.items():
        op.lower("cpu", formula=op.formulas.get("cuda"), adjoint_kernel=kernel)
