"""Pictures of what shares statistics, drawn from what the functions compute.

An element of the input is blue if a change to it changes one element of the result.
(The gradient would not tell: that of some methods is not the derivative.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

SHAPE = (8, 5, 1, 6)  # examples, height, width, features
AT = (7, 2, 0, 3)
COLORS = np.array(["#e4e4e4", "#5b8fd6", "#f28e2b"])
KERNEL, KERNEL_AT = (3, 3, 5, 6), (1, 1, 4, 3)  # height, width, inputs, outputs
INK = "#808080"  # to be read on white and on black


def depends(
    f: Callable[[Any], Any], shape: tuple[int, ...], at: tuple[int, ...]
) -> Any:
    """Which elements of an array `f(x)[at]` depends on."""
    size = int(np.prod(shape))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    changes = 100 * jnp.eye(size + 1, size, k=-1).reshape(-1, *shape)
    first, *others = np.asarray(jax.jit(jax.vmap(lambda dx: f(x + dx)[at]))(changes))
    return (abs(np.array(others) - first) > 1e-5).reshape(shape)


def of_norm(row: Any) -> Any:
    """1 where y[AT] depends on it, 2 at AT, by examples, space and features."""
    norm, inputs = row.norm, row.inputs(jnp.zeros(SHAPE))
    # Not the first parameters: with a scale of 0 nothing would be shared.
    params = jax.tree.map(lambda v: v + 0.5, norm.init_params(SHAPE[-1:]))
    stats = norm.init_stats(SHAPE[-1:])
    used = depends(lambda x: norm(x, params, stats, **inputs)[0], SHAPE, AT).astype(int)
    used[AT] = 2
    return used[:, :, 0]


def of_kernel(transform: Callable[[Any], Any]) -> Any:
    """The same of the function of a kernel, by inputs, positions and outputs."""
    used = depends(transform, KERNEL, KERNEL_AT).astype(int)
    used[KERNEL_AT] = 2
    return np.moveaxis(used.reshape(-1, *KERNEL[2:]), 1, 0)


def face(values: Any, place: Callable[[float, float], tuple[float, ...]]) -> Any:
    """A square for each of `values`, at `place(row, column)` of its corners."""
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    squares = [
        [place(i + di, j + dj) for di, dj in corners]
        for i, j in np.ndindex(values.shape)
    ]
    return Poly3DCollection(
        squares, facecolors=COLORS[values.ravel()], edgecolors=INK, linewidths=0.5
    )


def draw(used: Any, labels: tuple[str, str, str], path: Path) -> None:
    """Three faces of `used`: the last along its first axis, which is in front and holds
    the 2; the first along its second axis, on top; the last along its third."""
    depth, height, width = used.shape
    figure = plt.figure(figsize=(3.2, 3.2))
    axes: Any = figure.add_subplot(projection="3d", proj_type="ortho")
    axes.add_collection3d(face(used[-1], lambda i, j: (j, 0, height - i)))
    axes.add_collection3d(face(used[::-1, :, -1], lambda i, j: (width, i, height - j)))
    axes.add_collection3d(face(used[::-1, 0], lambda i, j: (j, i, height)))
    axes.set(xlim=(0, width), ylim=(0, depth), zlim=(0, height))
    axes.set_box_aspect((width, depth, height))
    axes.view_init(elev=24, azim=-58)
    axes.set_axis_off()
    ends = ((width / 2, 0, -0.9), (width + 1.2, depth / 2, -0.6), (-0.9, 0, height / 2))
    for label, place in zip((labels[2], labels[0], labels[1]), ends, strict=True):
        axes.text(*place, label, color=INK, ha="center", va="center")
    path.parent.mkdir(exist_ok=True)
    file = {"bbox_inches": "tight", "pad_inches": 0.25, "metadata": {"Date": None}}
    figure.savefig(path, transparent=True, **file)
    plt.close(figure)
