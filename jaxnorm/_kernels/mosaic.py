"""What the Mosaic GPU kernels share, and where versions of Pallas differ."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxnorm._kernels.tiles import SUMS

THREADS = 128  # of a warpgroup, which runs one program
LOAD_BYTES = 16  # the most that a thread loads at once

# Until jax 0.11, load has an index apart from the reference.
_NO_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def strided(shape: Sequence[int], *dtypes: DTypeLike) -> Any:
    """The layout in which neighbouring threads hold neighbouring pieces of an array,
    each as large as a load of any of `dtypes` can be."""
    each = math.prod(shape) // THREADS
    widest = max(jnp.dtype(d).itemsize for d in dtypes)
    return plgpu.Layout.WG_STRIDED(tuple(shape), math.gcd(each, LOAD_BYTES // widest))


def load(ref: Any, layout: Any) -> Array:
    """What `ref` holds, in float32."""
    return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False).astype(SUMS)


def call(
    body: Callable[..., None],
    operands: Mapping[str, Array | None],
    results: Mapping[str, Any],
    scratch: Mapping[str, Any],
    **settings: Any,
) -> dict[str, Array]:
    """Runs `body(refs)` on a grid, with the references of all that is not None, by
    name; returns the results by name."""
    operands = {k: v for k, v in operands.items() if v is not None}

    def named(*refs, **scratch_refs):
        body(dict(zip((*operands, *results), refs, strict=True)) | scratch_refs)

    named.__name__ = body.__name__
    outs = plgpu.kernel(
        named,
        out_type=tuple(results.values()),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **settings,
    )(*operands.values())
    return dict(zip(results, outs, strict=True))
