"""What is meant for another platform, lowered for this CPU."""

import contextlib
from collections.abc import Iterator, Mapping

import jax

from jaxnorm._primitives._linear import Linear
from jaxnorm._primitives._operation import Kernel, Operation


@contextlib.contextmanager
def lowered_as(
    platform: str, adjoint_kernels: Mapping[Linear, Kernel] | None = None
) -> Iterator[None]:
    """Within it the CPU runs the formulas of `platform`, and these kernels."""
    jax.clear_caches()  # what has been compiled has chosen
    known = [
        (op, op.formulas.get("cpu"), op.kernels.get("cpu"))
        for op in Operation.every.values()
    ]
    for op, *_ in known:
        op.lower("cpu", formula=op.formulas.get(platform))
    for op, kernel in (adjoint_kernels or {}).items():
        op.lower("cpu", formula=op.formulas.get(platform), adjoint_kernel=kernel)
    yield
    for op, formula, kernel in known:
        op.lower("cpu", formula=formula, kernel=kernel)
    jax.clear_caches()
