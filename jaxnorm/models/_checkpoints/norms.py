"""Which arrays of a checkpoint, of whatever framework, belong to running statistics?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxnorm.models._checkpoints.arrays import as_numpy
from jaxnorm.models._checkpoints.conventions import (
    FLAX,
    HAIKU,
    KERAS,
    TORCH,
    Convention,
)
from jaxnorm.models._checkpoints.names import flatten

Arrays = Mapping[str, np.ndarray]
STATS = ("mean", "var", "count")


def running_norms(
    checkpoint: Mapping[str, Any],
) -> tuple[Convention, dict[str, Arrays], dict[str, Arrays]]:
    """Whose checkpoint it is, and the statistics and scales of its norms, by path.

    The arrays have Flax's names, and their paths are those in the checkpoint, less the
    collections. Raises ValueError where no array has a name of running statistics.
    """
    arrays = {
        key.removesuffix("/value"): value  # Flax's boxes
        for key, value in flatten(checkpoint, "/").items()
    }
    for table in (TORCH, KERAS, HAIKU, FLAX):
        norms = _norms(arrays, table)
        if norms:
            stats, scales = (
                {path: _named(norm, names) for path, norm in norms.items()}
                for names in (STATS, ("scale",))
            )
            return table, stats, {p: scale for p, scale in scales.items() if scale}
    some = ", ".join([*arrays][:3]) or "nothing"
    raise ValueError(
        f"there are no running statistics of any framework, but {some}: export the "
        "state of the model as well as its parameters"
    )


def _named(norm: Arrays, names: Sequence[str]) -> Arrays:
    return {name: norm[name] for name in names if name in norm}


def _norms(arrays: Mapping[str, Any], table: Convention) -> dict[str, Arrays]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        for name in (*STATS, "scale"):
            layer = _layer(key, name, table)
            if layer is not None:
                found.setdefault(layer, {})[name] = as_numpy(key, value)
    return {path: _counted(norm) for path, norm in found.items() if "var" in norm}


def _layer(key: str, name: str, table: Convention) -> str | None:
    """The path of the layer whose array `name` is at `key`, or None."""
    for end in table.norm_names.get(name, (name,)):
        if key == end or key.endswith(table.separator + end):
            parts = key.removesuffix(end).split(table.separator)[:-1]
            outer = set((table.collections or {}).values())
            return table.separator.join(part for part in parts if part not in outer)
    return None


def _counted(norm: Arrays) -> Arrays:
    """The arrays, with a count for each feature where there is one for all."""
    if "count" not in norm:
        return norm
    return {**norm, "count": np.broadcast_to(norm["count"], norm["var"].shape)}
