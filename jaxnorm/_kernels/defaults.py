"""Where a kernel for GPUs is the default: what a run on such a GPU has shown.

`defaults.json` holds, for each kind of device, the boxes of arrays for which a kernel
has been measured to be faster than XLA's formula. `benchmarks/on_gpu.py --report`
writes it. A kind that is not there has no defaults.
"""

import functools
import importlib.resources
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnorm._axes import Shape


class Box(NamedTuple):
    """Arrays of a pattern for which the kernels of `backend` are the default."""

    pattern: str
    backend: str
    dtypes: tuple[str, ...]
    features: tuple[int, int]  # the least and the most
    least_bytes: int

    def holds(self, pattern: str, shape: Shape, features: int, dtype: Any) -> bool:
        """Whether an array of `shape`, with `features` in a row, is one of them."""
        least, most = self.features
        return (
            pattern == self.pattern
            and dtype.name in self.dtypes
            and least <= features <= most
            and math.prod(shape) * dtype.itemsize >= self.least_bytes
        )


def backend(pattern: str, shape: Shape, features: int, dtype: DTypeLike) -> str | None:
    """The kernels for such arrays on the GPU at hand; None for XLA's formula.

    `shape` is that of the whole array, however many devices share it; where it is not
    known yet, there are none.
    """
    known = _boxes()
    if not known or jax.default_backend() != "gpu":
        return None
    if not all(isinstance(n, int) for n in shape):
        return None
    of_device = known.get(jax.devices()[0].device_kind, ())
    dtype = jnp.dtype(dtype)
    held = (box for box in of_device if box.holds(pattern, shape, features, dtype))
    return next((box.backend for box in held), None)


@functools.cache
def _boxes() -> dict[str, tuple[Box, ...]]:
    file = importlib.resources.files("jaxnorm._kernels").joinpath("defaults.json")
    return parsed(json.loads(file.read_text()))


def parsed(known: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[Box, ...]]:
    """The boxes by kind of device, of what the file holds."""
    return {
        device: tuple(
            Box(
                box["pattern"],
                box["backend"],
                tuple(box["dtypes"]),
                tuple(box["features"]),
                box["least_bytes"],
            )
            for box in boxes
        )
        for device, boxes in known.items()
    }
