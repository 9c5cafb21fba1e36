"""Which arrays does a file hold, or a directory that Orbax has written?"""

from pathlib import Path
from typing import Any

import jax
import numpy as np


def read(path: Path) -> Any:
    """The arrays of a checkpoint; raises ValueError for what is none."""
    if path.is_dir():
        return read_orbax(path)
    if path.suffix == ".safetensors":
        from safetensors.flax import load_file

        return load_file(path)
    if path.suffix == ".npz":
        return dict(np.load(path, allow_pickle=False))
    if path.suffix == ".msgpack":
        from flax.serialization import msgpack_restore

        return msgpack_restore(path.read_bytes())
    raise ValueError("is no .safetensors, .npz or .msgpack file, and no directory")


def read_orbax(path: Path) -> Any:
    """The tree of the last step that Orbax has written below `path`, or all by name."""
    import orbax.checkpoint as ocp

    by_step: dict[Any, list[Path]] = {}
    for found in path.resolve().rglob("_METADATA"):
        step = tuple(int(part) for part in found.parts if part.isdecimal())
        by_step.setdefault(step, []).append(found.parent)
    if not by_step:
        raise ValueError("holds no checkpoint of Orbax")
    trees = {}
    with ocp.PyTreeCheckpointer() as reader:
        for tree in by_step[max(by_step)]:
            known = reader.metadata(tree).item_metadata.tree
            host = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), known
            )
            trees[tree.name] = reader.restore(tree, restore_args=host)
    return trees if len(trees) > 1 else trees.popitem()[1]
