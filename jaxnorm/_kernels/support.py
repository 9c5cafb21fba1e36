"""Where a kernel fits, and why not."""

import functools
import importlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnorm._kernels import tiles

BACKENDS = {
    "triton": ("jax.experimental.pallas.triton", ("CompilerParams", "load", "store")),
    "mosaic": (
        "jax.experimental.pallas.mosaic_gpu",
        ("CompilerParams", "Layout", "LoweringSemantics", "kernel", "load", "SMEM"),
    ),
}
# The least compute capability of a GPU on which each backend's kernels run.
LEAST_CAPABILITY = {"triton": (8, 0), "mosaic": (9, 0)}
DTYPES = ("bfloat16", "float16", "float32")
PATTERNS = {"rows": ("rows", "features"), "columns": ("batch", "space", "features")}
MAX_FEATURES = 8192  # of rows: more would not fit in registers


def why_unfit(
    pattern: str, backend: str, shape: Sequence[int], *dtypes: DTypeLike
) -> str | None:
    """Why the kernels of `pattern` cannot take arrays like that; None if they can.

    `pattern` is "rows" with a shape of (rows, features), or "columns" with one of
    (batch, space, features); `backend` is "triton" or "mosaic"; `dtypes` are those of
    all arrays of that shape, results included. Which GPU there is, is not looked at:
    see `LEAST_CAPABILITY`. Raises ValueError for an unknown pattern or backend.
    """
    for name, value, known in (
        ("pattern", pattern, PATTERNS),
        ("backend", backend, BACKENDS),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {list(known)}")
    if len(shape) != len(PATTERNS[pattern]):
        names = ", ".join(PATTERNS[pattern])
        return f"kernels of {pattern} take arrays of ({names}), got shape {shape}"
    if not all(isinstance(n, int) for n in shape):
        return f"kernels need sizes that are known, got shape {shape}"
    return (
        _unfit_dtype(dtypes)
        or _unfit_size(backend, shape)
        or _unfit_rows(pattern, backend, shape)
        or _unfit_columns(pattern, backend, shape)
        or unavailable(backend)
    )


def require(pattern: str, backend: str, shape: Sequence[int], *dtypes) -> None:
    """Raises ValueError with what `why_unfit` says, if it says something."""
    problem = why_unfit(pattern, backend, shape, *dtypes)
    if problem:
        raise ValueError(f"the {backend} kernel does not fit: {problem}")


def why_not_on_this_gpu(backend: str) -> str | None:
    """Why the GPU at hand cannot run the kernels; None where there is none."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", "")
    parts = str(capability).split(".")
    if not all(v.isdecimal() for v in parts):
        return f"kernels are for NVIDIA's GPUs, this one is {capability or 'unknown'}"
    if tuple(map(int, parts)) >= LEAST_CAPABILITY[backend]:
        return None
    needed = ".".join(map(str, LEAST_CAPABILITY[backend]))
    return f"{backend} needs compute capability {needed}, this GPU has {capability}"


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why the installed jax lacks what `backend` needs; None if it has it all."""
    name, needed = BACKENDS[backend]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # whatever a version that does not fit raises
        return (
            f"jax {jax.__version__} cannot import {name} "
            f"({type(error).__name__}: {error})"
        )
    missing = [k for k in needed if not hasattr(module, k)]
    return f"{name} of jax {jax.__version__} has no {missing}" if missing else None


def _unfit_dtype(dtypes: Sequence[DTypeLike]) -> str | None:
    names = [jnp.dtype(d).name for d in dtypes]
    unfit = sorted({n for n in names if n not in DTYPES})
    return f"kernels take {', '.join(DTYPES)}, got {unfit[0]}" if unfit else None


def _unfit_size(backend: str, shape: Sequence[int]) -> str | None:
    if 0 in shape:
        return f"an array of shape {shape} is empty"
    # Pallas widens what Triton's kernels index with, by the size of the array.
    if backend == "mosaic" and math.prod(shape) >= 2**31:
        return f"kernels index with 32 bits, and {shape} has 2**31 elements or more"
    return None


def _unfit_rows(pattern: str, backend: str, shape: Sequence[int]) -> str | None:
    if pattern != "rows":
        return None
    features = shape[-1]
    if features > MAX_FEATURES:
        return (
            f"a row of {features} features does not fit in registers: at most "
            f"{MAX_FEATURES}"
        )
    if backend == "mosaic" and features % 128:
        return f"features must be a multiple of 128, got {features}"
    return None


def _unfit_columns(pattern: str, backend: str, shape: Sequence[int]) -> str | None:
    if pattern != "columns" or backend != "mosaic":
        return None
    _, space, features = shape
    rows = tiles.MOSAIC_TILE_ROWS * tiles.LANES // math.gcd(features, tiles.LANES)
    if space % rows == 0:
        return None
    return f"with {features} features, space is a multiple of {rows}, got {space}"
