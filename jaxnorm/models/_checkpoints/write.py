"""How do the variables of a model become the arrays of a checkpoint?"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jax import Array

from jaxnorm._marks import MARKS
from jaxnorm.models._checkpoints.arrays import as_numpy, as_torch_takes
from jaxnorm.models._checkpoints.conventions import (
    FLAX,
    LEFT,
    SAME,
    Convention,
    convention,
)
from jaxnorm.models._checkpoints.fit import Misfit, fail, key_in, layouts, of_rank
from jaxnorm.models._checkpoints.layouts import relayout
from jaxnorm.models._checkpoints.names import (
    Kinds,
    Leaf,
    Renamed,
    check_checkpoint,
    flatten,
    leaves,
    nest,
)
from jaxnorm.models._paths import Tree, check_variables


def to_checkpoint(
    framework: str,
    variables: Tree,
    *,
    rename: Renamed = None,
    kinds: Kinds = None,
    template: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The variables of a Flax model as a checkpoint of another framework.

    The inverse of `from_checkpoint`, bit for bit, where dtypes are the same. A norm of
    torch gets the `num_batches_tracked` of its "count", or 0: torch has no use for it
    but with momentum None, where there is a "count". The averages of Haiku's batch norm
    get a state in which they have forgotten where they started, as jaxnorm's have. The
    "v" of torch's spectral norm is computed, and `sigma` left out. Without a `template`
    the names of wrapped kernels are those of `torch.nn.utils.parametrizations`.

    Args:
        framework, rename, kinds: as in `from_checkpoint`.
        variables: {"params", "batch_stats"}, or one of them.
        template: a checkpoint of the model that is to load this one. The result then
            has its keys, shapes and dtypes. Haiku's batch norm needs it, as the shape
            of its arrays is that of its input, and Keras's RMSNormalization, whose
            "scale" is otherwise written as "gamma".

    Returns:
        NumPy arrays, contiguous and writable: {key: array} for torch and Keras, nested
        as `from_checkpoint` takes them for Haiku and Flax. `torch.from_numpy` takes all
        of them: bfloat16, of which it takes none, becomes float32, which a model in
        bfloat16 loads bit for bit. With a `template` of NumPy arrays in bfloat16, as
        from safetensors, it stays what it is.

    Raises:
        ValueError: naming all leaves that the framework has no place for, that have no
            values, as under `jit`, and all that `template` has or lacks.
        TypeError: for what are no trees of arrays, a template that is no mapping, and
            for `rename` and `kinds` of another kind.

    >>> import jaxnorm, numpy as np
    >>> params = {"norm": {"scale": np.ones(2), "bias": np.zeros(2)}}
    >>> jaxnorm.models.to_checkpoint("keras", {"params": params})
    {'norm/beta': array([0., 0.]), 'norm/gamma': array([1., 1.])}
    """
    table = convention(framework)
    check_variables(variables)
    if template is not None:
        check_checkpoint("template", template)
    like = None if template is None else flatten(template, table.separator)
    out, extras, problems = {}, {}, []
    for leaf in leaves(variables, table, rename, kinds):
        if leaf.kernel is not None and leaf.name == "sigma":
            continue  # which is that of the kernel
        key = key_in(leaf, like or {}) or leaf.keys[0]
        try:
            if key in out:
                raise Misfit(f"{key!r} is the key of another leaf, too")
            out[key] = _written(leaf, table, like)
        except Misfit as misfit:
            problems.append(f"{leaf.path}: {misfit}")
        else:
            for extra, value in leaf.extras.items():
                if value is LEFT and extra[:-1] == key[:-1]:
                    extras[extra] = _left_vector(leaf, table, out[key])
                elif value is not LEFT:
                    extras[extra] = out[key] if value is SAME else value
    if like is None:
        out = extras | out
    else:
        out = {k: v for k, v in extras.items() if k in like} | out
        out, misfits = _fitted_to(like, out, table)
        problems += misfits
    if table.numpy_only:
        of_numpy = {
            k for k, v in (like or {}).items() if isinstance(v, np.ndarray | Array)
        }
        out = {k: v if k in of_numpy else as_torch_takes(v) for k, v in out.items()}
    fail(
        problems,
        f"the variables cannot become a {framework} checkpoint",
        "`rename` gives layers other names, `kinds` says which kernels are not those "
        "of plain layers, and `template` what the result must be like",
    )
    return nest({k: np.array(v, order="C") for k, v in out.items()}, table)


def _written(
    leaf: Leaf, table: Convention, like: Mapping[str, Any] | None
) -> np.ndarray:
    """The array of a leaf as the framework has it."""
    nameless = leaf.name in (*MARKS, "count") and leaf.name not in table.norm_names
    if "/" in leaf.name:
        raise Misfit(
            "a name with '/' in it, such as that of a normalized kernel, cannot be "
            "told from a path: leave it out"
        )
    if nameless and table is not FLAX:
        marks = "`jaxnorm.models.unfreeze` and `discard` take such marks away"
        raise Misfit(f"it has no counterpart{f'; {marks}' * (leaf.name in MARKS)}")
    if table.keeps_rank and like is None and leaf.extras:
        raise Misfit("its shape is that of the layer's input: pass `template`")
    array = as_numpy(leaf.name, leaf.value)
    if leaf.kind is not None:
        theirs, ours = layouts(leaf, table, leaf.kind)
        return relayout(array, ours, theirs)
    if leaf.kernel is not None:
        return _beside(_written(leaf.kernel, table, like), array)
    if leaf.name == "count" and table is not FLAX:
        # A feature that a batch had nothing of has counted fewer.
        return np.asarray(array.max(initial=0), np.int64)
    return array


def _beside(kernel: np.ndarray, array: np.ndarray) -> np.ndarray:
    """The scale of a kernel as torch has it, along its first axis of that size; or u.

    Both are as long as the kernel's features, u with an axis before them.
    """
    if array.ndim != 1:
        return array.reshape(-1) if array.ndim else array
    axis = [*kernel.shape].index(array.size)
    return array.reshape([-1 if i == axis else 1 for i in range(kernel.ndim)])


def _left_vector(leaf: Leaf, table: Convention, u: np.ndarray) -> np.ndarray:
    """torch's v, of length 1, of the kernel that has this `u`."""
    of = cast(Leaf, leaf.kernel)
    outputs = layouts(of, table, of.kind or "conv")[0].index("O")
    matrix = np.moveaxis(_written(of, table, None), outputs, 0).reshape(u.size, -1)
    v = u.astype(np.promote_types(u.dtype, np.float32)) @ matrix
    return (v / max(np.linalg.norm(v), 1e-12)).astype(u.dtype)


def _fitted_to(
    like: Mapping[str, Any], out: Mapping[str, Any], table: Convention
) -> tuple[dict[str, np.ndarray], list[str]]:
    """`out` in the order, shapes and dtypes of `like`, and the problems with it."""
    problems = [f"the template lacks {key!r}" for key in out if key not in like]
    problems += [f"the model has nothing for {key!r}" for key in like if key not in out]
    fitted = {}
    for key in (key for key in like if key in out):
        try:
            array, goal = out[key], as_numpy(key, like[key])
        except Misfit as misfit:
            problems.append(f"the template: {misfit}")
            continue
        if table.keeps_rank:
            array = of_rank(array, goal.shape)
        if array.shape != goal.shape:
            problems.append(f"{key!r} is {array.shape}, in the template {goal.shape}")
        fitted[key] = array.astype(goal.dtype)
    return fitted, problems
