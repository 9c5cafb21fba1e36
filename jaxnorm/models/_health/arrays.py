"""Which scale, and which moments of a fresh batch, belong to each layer?"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxnorm._marks import BATCH, MARKS, shape_of
from jaxnorm.models._paths import Tree, check_layers, path_name
from jaxnorm.models._paths import layers as all_layers


def check_known(*trees: Tree | None) -> None:
    """Raises TypeError for arrays whose values are not known."""
    for value in jax.tree.leaves(trees):
        if isinstance(value, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"health needs values, got {type(value).__name__} of shape "
                f"{value.shape}: call it outside of `jit`, with the arrays it returns"
            )


def scales_of(layers: Mapping[str, Any], params: Tree | None) -> dict[str, Any]:
    """{"scale"} of each layer that has one in `params`, by its path."""
    if params is None:
        return {}
    check_layers(params, "params")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {path_name(path): value for path, value in leaves}
    names = {path: f"{path}/scale".lstrip("/") for path in layers}
    scales = {p: {"scale": by_path[k]} for p, k in names.items() if k in by_path}
    if not scales and any(
        _is_below(k, name) for k in by_path for name in names.values()
    ):
        raise ValueError(
            f"params hold no scale for any of the layers {list(layers)}: pass those of "
            'the same model, variables["params"], with no other tree around them, or '
            "leave them out"
        )
    for path, scale in scales.items():
        shape = shape_of(layers[path])
        if not _broadcasts(np.shape(scale["scale"]), shape):
            raise ValueError(
                f"the scale of {path!r} has shape {np.shape(scale['scale'])}, but the "
                f"statistics {shape}: take both from one model"
            )
    return scales


def _is_below(a: str, b: str) -> bool:
    """Whether one of two paths ends in the other."""
    return a.endswith(f"/{b}") or b.endswith(f"/{a}")


def batches_of(layers: Mapping[str, Any], fresh: Tree | None) -> dict[str, Any]:
    """The moments of a fresh batch, {"mean", "var", "size"} as far as known, of each
    layer."""
    if fresh is not None:
        check_layers(fresh, "fresh")
    source = layers if fresh is None else all_layers(fresh)
    missing = [path for path in layers if path not in source]
    if missing:
        raise ValueError(
            f"fresh lacks the layers {missing}, it holds {list(source)}: take it from "
            "the same model, or leave layers out with `where`"
        )
    source = {path: source[path] for path in layers}
    batches = {p: _pooled(stats) for p, stats in source.items() if BATCH[0] in stats}
    empty = batches and not any(np.any(m["size"]) for m in batches.values())
    if fresh is None and empty:
        return {}
    if empty:
        raise ValueError(
            f"fresh holds no batch in any of {list(batches)}: pass the statistics that "
            "a training pass of the model returned; Flax's own norms gather none"
        )
    if fresh is not None and not batches:
        batches = source
    for path, moments in batches.items():
        _check_batch(path, layers[path], moments)
    return batches


def _pooled(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The moments that a layer has gathered."""
    return {k: stats[f"batch_{k}"] for k in ("mean", "var", "size")}


def _check_batch(
    path: str, stats: Mapping[str, Any], moments: Mapping[str, Any]
) -> None:
    """Raises ValueError unless the moments have the shape of the statistics."""
    shape = shape_of(stats)
    for name, value in moments.items():
        fits = _broadcasts if name == "size" else tuple.__eq__
        if name in ("mean", "var", "size") and not fits(np.shape(value), shape):
            raise ValueError(
                f"the {name} of {path!r} in the fresh batch has shape "
                f"{np.shape(value)}, but the statistics {shape}: take both "
                "from one model"
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether arrays of `shape` broadcast to the shape `to`."""
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def as_float64(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`arrays` without marks, in double precision."""
    return {
        k: np.asarray(v, np.complex128 if np.iscomplexobj(v) else np.float64)
        for k, v in arrays.items()
        if k not in MARKS
    }
