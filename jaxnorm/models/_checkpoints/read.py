"""How do the arrays of a checkpoint become the variables of a model?"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._arguments import check_function
from jaxnorm._marks import MARKS
from jaxnorm._weights.spectral_norm import spectral_norm
from jaxnorm.models._checkpoints.arrays import as_numpy
from jaxnorm.models._checkpoints.conventions import Convention, convention
from jaxnorm.models._checkpoints.fit import Misfit, fail, key_in, layouts, of_rank
from jaxnorm.models._checkpoints.layouts import relayout
from jaxnorm.models._checkpoints.names import (
    Kinds,
    Leaf,
    Renamed,
    check_checkpoint,
    flatten,
    leaves,
)
from jaxnorm.models._checkpoints.report import Mapped, Report
from jaxnorm.models._paths import Tree, Where, check_variables, copied


def nowhere(path: str) -> bool:
    """False, for a layer or key of any name."""
    return False


def from_checkpoint(
    framework: str,
    checkpoint: Mapping[str, Any],
    template: Tree,
    *,
    rename: Renamed = None,
    kinds: Kinds = None,
    keep: Where = nowhere,
    ignore: Where = nowhere,
) -> tuple[Tree, Report]:
    """The variables of a Flax model, with the values of a checkpoint, and a report.

    | framework | checkpoint |
    |---|---|
    | "torch" | a state dict, or what `safetensors.numpy.load_file` returns |
    | "keras" | `{v.path: v.numpy() for v in model.weights}` |
    | "haiku" | `{"params": params, "state": state}` |
    | "flax" | `{"params": ..., "batch_stats": ...}`, of Linen or NNX |

    Each leaf of `template` is looked up under the framework's name for it, its axes
    are put in Flax's order, and it gets the dtype that it has in `template`. Running
    statistics are copied as they are: what they are is a setting of the norm, which
    `norm_settings` gives. Nothing is guessed: all that does not fit is in one error.

    Two things no checkpoint says. A dense layer that follows a flattened image has its
    inputs in the order (C, H, W) in torch: move the axes before flattening in Flax,
    too. And a `padding` p of torch's ConvTranspose is `kernel_size - 1 - p` in Flax.

    torch's weight norm and spectral norm, of the old kind ("weight_g", "weight_orig")
    and the new ("parametrizations"), fit a model with WeightNorm and SpectralNorm. The
    scales of torch's ConvTranspose are those of its inputs: `feature_axes=-2`. Of
    spectral norm "v" is dropped, and `sigma` computed. In evaluation jaxnorm takes a
    step of the power iteration, and torch none, which is the same once "u" has settled.

    Args:
        framework: "flax", "haiku", "keras" or "torch".
        checkpoint: arrays by their keys, or nested mappings of them. Tensors of torch
            may be on any device, require gradients, and be bfloat16.
        template: the variables of the model, from `init` or `jaxnorm.nnx.variables`,
            or their shapes and dtypes, from `jax.eval_shape`.
        rename: the framework's name for the layer at a path; a function, which may
            return None, or a mapping of paths, or of their beginnings. Without one,
            "layer1/0/conv1" is "layer1.0.conv1" in torch and the same elsewhere. For
            torch, the path of a layer in a wrapper has no "layer_instance" in it.
        kinds: which kernels are "conv_transpose", "transpose_kernel" (that of Flax's
            `ConvTranspose(transpose_kernel=True)`) or "depthwise" (with one feature
            out for each in, for Keras); a function or mapping of layers' paths. Shapes
            do not always tell, so that all of them must be named.
        keep: whether the layer at a path keeps its values, such as a new head.
        ignore: whether a key of the checkpoint may be left unused.

    Returns:
        Variables of the structure, shapes and dtypes of `template`, and a `Report`
        which prints as a table.

    Raises:
        ValueError: naming every leaf that was not found or does not fit, and every key
            that was not used.
        TypeError: for a checkpoint that is no mapping, a template that is no tree of
            arrays, and for `rename`, `kinds`, `keep` and `ignore` of another kind.

    >>> import jaxnorm, numpy as np
    >>> template = {"params": {"fc": {"kernel": np.zeros((3, 2), np.float32)}}}
    >>> variables, report = jaxnorm.models.from_checkpoint(
    ...     "torch", {"fc.weight": np.ones((2, 3), np.float32)}, template
    ... )
    >>> print(variables["params"]["fc"]["kernel"].shape, report)
    (3, 2) params/fc/kernel  fc.weight  OI to IO
    """
    table = convention(framework)
    check_checkpoint("checkpoint", checkpoint)
    check_variables(template, "template")
    for name, argument in (("keep", keep), ("ignore", ignore)):
        check_function(name, argument)
    found = flatten(checkpoint, table.separator)
    model = leaves(template, table, rename, kinds)
    kept = [leaf for leaf in model if keep(leaf.layer)]
    wanted = [leaf for leaf in model if not keep(leaf.layer)]
    dropped, ignored, unused = _not_read(found, wanted, kept, ignore)
    problems = [] if kept or keep is nowhere else ["`keep` means no layer of the model"]
    problems += [
        f"{leaf.path}: has no value to keep"
        for leaf in kept
        if isinstance(leaf.value, jax.ShapeDtypeStruct)
    ]
    values, rows = {leaf.path: copied(leaf.value) for leaf in kept}, []
    for leaf in wanted:
        try:
            key = _found_key(leaf, found, unused)
            if leaf.kernel is not None and leaf.name == "sigma":
                rows.append(Mapped(leaf.path, key, "its largest singular value"))
                continue
            values[leaf.path], change = _read(leaf, table, key, found[key])
            rows.append(Mapped(leaf.path, key, change))
        except Misfit as misfit:
            problems.append(f"{leaf.path}: {misfit}")
    problems += [f"not used: {key!r}" for key in unused]
    fail(
        problems,
        f"the {framework} checkpoint and the template do not fit",
        "`rename` gives layers other names, `kinds` says which kernels are not those "
        "of plain layers, `keep` which layers keep the values of the template, and "
        "`ignore` which keys may be left",
    )
    values |= _sigmas(wanted, values)
    tree = jax.tree.structure(template).unflatten(values[leaf.path] for leaf in model)
    paths = tuple(leaf.path for leaf in kept)
    return tree, Report(tuple(rows), tuple(dropped), tuple(ignored), paths)


def _not_read(
    found: Mapping[str, Any], wanted: list[Leaf], kept: list[Leaf], ignore: Where
) -> tuple[list[str], list[str], list[str]]:
    """The keys that are dropped, those that are ignored, and those left unused."""
    read = {key_in(leaf, found) for leaf in wanted}
    extras = {key for leaf in wanted for key in leaf.extras}
    of_kept = {key for leaf in kept for key in (*leaf.keys, *leaf.extras)}
    rest = [key for key in found if key not in read]
    dropped = [key for key in rest if key in extras]
    rest = [key for key in rest if key not in extras]
    ignored = [key for key in rest if key in of_kept or ignore(key)]
    return dropped, ignored, [key for key in rest if key not in ignored]


def _found_key(leaf: Leaf, found: Mapping[str, Any], unused: list[str]) -> str:
    """The key of a leaf; raises Misfit, which names keys like it, if there is none."""
    key = key_in(leaf, found)
    if key is None and leaf.name in MARKS:
        raise Misfit("is a mark of `jaxnorm.models.freeze`: freeze what is returned")
    if key is None:
        size = math.prod(leaf.value.shape)
        alike = [k for k in unused if math.prod(np.shape(found[k])) == size]
        near = difflib.get_close_matches(leaf.keys[0], alike, n=3, cutoff=0.4)
        hint = f", but of its size are {near}" if near else ""
        raise Misfit(f"there is no {leaf.keys[0]!r}{hint}")
    return key


def _read(leaf: Leaf, table: Convention, key: str, value: Any) -> tuple[Any, str]:
    """The value of a leaf in a new array, and how it was changed."""
    array, shape, dtype = as_numpy(key, value), leaf.value.shape, leaf.value.dtype
    if not any(
        jnp.issubdtype(array.dtype, kind) and jnp.issubdtype(dtype, kind)
        for kind in (jnp.floating, jnp.integer, jnp.complexfloating, jnp.bool_)
    ):
        raise Misfit(f"{key!r} is of {array.dtype}, the template of {dtype}")
    fitted, changes = array, []
    if leaf.kind is not None:
        both = layouts(leaf, table, leaf.kind)
        fitted = relayout(array, *both) if array.ndim == len(shape) else array
        changes += [" to ".join(both)] if both[0] != both[1] else []
    elif leaf.name == "count" and array.ndim == 0:
        fitted = np.broadcast_to(array, shape)
    elif table.keeps_rank or leaf.kernel is not None:
        fitted = of_rank(array, shape)
    if fitted.shape != shape:
        raise Misfit(
            f"{key!r} of shape {array.shape} becomes {fitted.shape}, the template has "
            f"{shape}{_other_kinds(leaf, table, array)}"
        )
    if array.dtype != dtype:
        changes.append(f"{array.dtype} to {dtype}")
    return jnp.array(fitted, dtype, copy=True), ", ".join(changes)


def _sigmas(wanted: list[Leaf], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the next call of each SpectralNorm would keep for `sigma`, by path."""
    us = {leaf.kernel.path: leaf for leaf in wanted if leaf.kernel and leaf.name == "u"}
    sigmas = {}
    for leaf in wanted:
        if leaf.kernel is not None and leaf.name == "sigma":
            kernel, u = (v.path for v in (leaf.kernel, us[leaf.kernel.path]))
            sigma = spectral_norm(values[kernel], values[u])[2]
            sigmas[leaf.path] = sigma.astype(leaf.value.dtype)
    return sigmas


def _other_kinds(leaf: Leaf, table: Convention, array: np.ndarray) -> str:
    """What to say about a kernel that would fit if it were of another kind."""
    if leaf.kind is None or array.ndim != leaf.value.ndim:
        return ""
    fits = [
        kind
        for kind in table.kernels
        if relayout(array, *layouts(leaf, table, kind)).shape == leaf.value.shape
    ]
    return f"; of the kinds {fits} it would fit" if fits else ""
