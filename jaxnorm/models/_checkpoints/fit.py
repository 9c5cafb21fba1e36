"""When do a leaf of a model and an array of a checkpoint fit?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm.models._checkpoints.conventions import FLAX, Convention
from jaxnorm.models._checkpoints.names import Leaf


class Misfit(Exception):
    """Why one leaf cannot be converted."""


def fail(problems: list[str], what: str, fix: str) -> None:
    """Raises ValueError with a line for each problem, if there are any."""
    if problems:
        raise ValueError("\n    ".join([f"{what}:", *problems]) + f"\n{fix}")


def key_in(leaf: Leaf, found: Mapping[str, Any]) -> str | None:
    """The first of the keys of a leaf that is in `found`."""
    return next((key for key in leaf.keys if key in found), None)


def layouts(leaf: Leaf, table: Convention, kind: str) -> tuple[str, str]:
    """How the axes of a kernel are ordered in the framework, and in Flax."""
    theirs, ours = table.kernels[kind], FLAX.kernels[kind]
    if leaf.value.ndim == 2:
        theirs, ours = (v.replace("S", "").replace("s", "") for v in (theirs, ours))
    return theirs, ours


def of_rank(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`array` in `shape`, if only axes of length 1 are between them."""
    before, after = ([n for n in s if n != 1] for s in (array.shape, shape))
    return array.reshape(shape) if before == after else array
