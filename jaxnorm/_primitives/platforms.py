"""What each platform computes for each operation: one table."""

import functools

from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives import activated, affine, columns, cpu, gpu, rows
from jaxnorm._primitives._linear import transposed
from jaxnorm._primitives.activated import ACTIVATED_NORM, ACTIVATED_TANGENT
from jaxnorm._primitives.affine import TANGENT
from jaxnorm._primitives.columns import LINE, MOMENTS
from jaxnorm._primitives.rows import KEPT, OWN_MOMENTS, ROW_NORM, ROW_TANGENT

GPUS = "cuda", "rocm"

MOMENTS.lower("cpu", formula=formulas.of_any(formulas.on_cpu), kernel=cpu.MOMENTS)
MOMENTS.lower(*GPUS, formula=formulas.of_any(formulas.on_gpu))

LINE.lower("cpu", adjoint_kernel=cpu.SUMS)
LINE.adjoint.lower(*GPUS, formula=transposed(columns.line_in_parts))

TANGENT.lower("cpu", formula=functools.partial(affine.tangent, affine.by_products))

ROW_NORM.lower(
    "cpu",
    formula=functools.partial(rows.norm, formulas.along_rows),
    kernel=cpu.ROW_NORM,
)

ROW_NORM.lower(*GPUS, formula=functools.partial(rows.norm, formulas.on_gpu))

ROW_TANGENT.lower(
    "cpu",
    formula=functools.partial(rows.tangent, rows.as_given, affine.by_products),
    adjoint_kernel=cpu.ROW_GRADIENT,
)
_on_gpus = functools.partial(rows.tangent, rows.moments_again, affine.by_sums_in_parts)
ROW_TANGENT.lower("cuda", formula=_on_gpus, adjoint_kernel=gpu.row_gradient())
ROW_TANGENT.lower("rocm", formula=_on_gpus)

KEPT.lower(*GPUS, formula=rows.kept_nothing)
OWN_MOMENTS.lower(
    *GPUS, formula=functools.partial(rows.moments_of_row, rows.moments_again)
)

ACTIVATED_NORM.lower("cpu", formula=functools.partial(activated.norm, formulas.on_cpu))
ACTIVATED_NORM.lower(*GPUS, formula=functools.partial(activated.norm, formulas.on_gpu))
ACTIVATED_TANGENT.lower("cuda", adjoint_kernel=gpu.activated_gradient())
