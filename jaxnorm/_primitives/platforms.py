"""What each platform computes for each operation: one table."""

import functools

from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives import affine, cpu, rows
from jaxnorm._primitives.affine import TANGENT
from jaxnorm._primitives.columns import LINE, MOMENTS
from jaxnorm._primitives.rows import ROW_NORM, ROW_TANGENT

GPUS = "cuda", "rocm"

MOMENTS.lower("cpu", formula=formulas.of_any(formulas.on_cpu), kernel=cpu.MOMENTS)
MOMENTS.lower(*GPUS, formula=formulas.of_any(formulas.on_gpu))

LINE.lower("cpu", adjoint_kernel=cpu.SUMS)

TANGENT.lower("cpu", formula=functools.partial(affine.tangent, affine.by_products))

ROW_NORM.lower(
    "cpu",
    formula=functools.partial(rows.norm, formulas.along_rows),
    kernel=cpu.ROW_NORM,
)

ROW_TANGENT.lower(
    "cpu",
    formula=functools.partial(rows.tangent, rows.as_given, affine.by_products),
    adjoint_kernel=cpu.ROW_GRADIENT,
)
ROW_TANGENT.lower(
    *GPUS,
    formula=functools.partial(rows.tangent, rows.moments_again, affine.by_sums),
)
