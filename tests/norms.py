"""The table of everything under test: a method adds a row and inherits every property.

A row is read by the property tests: the settings, a float64 reference written from the
paper, shapes that work, shapes that must not with the message they give, and the axis
over which devices share statistics if `axis_name` is set.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference

import jaxnorm
from jaxnorm import axes as axes_of


class Row(NamedTuple):
    norm: jaxnorm.Norm
    reference: Callable[..., reference.Result]
    shape: tuple[int, ...]  # the usual input, its batch a multiple of 8
    more_shapes: tuple[tuple[int, ...], ...] = ()
    bad: tuple[tuple[tuple[int, ...], str], ...] = ()  # (shape, message)
    split: int | None = 0  # the axis that synchronized devices share out
    lone: tuple[int, ...] | None = None  # a shape of one value per variance


def row(kind: type[jaxnorm.Norm], ref: Any, options: dict[str, Any], *args, **kwargs):
    norm = kind(**options)
    call = functools.partial(ref, epsilon=norm.epsilon, **options)
    return Row(norm, call, *args, **kwargs)


FIRST = (8, 4, 4, 2)  # channels first
LAST = (8, 4, 2, 6)  # channels last

NORMS: dict[str, Row] = {
    "batch": row(
        jaxnorm.BatchNorm,
        reference.batch_norm,
        {},
        LAST,
        ((16, 5), (8, 7, 3), (8, 2, 3, 2, 4)),
        bad=(((), "out of range"),),
        lone=(1, 4),
    ),
    "batch_first": row(
        jaxnorm.BatchNorm,
        reference.batch_norm,
        {"axis": 1},
        FIRST,
        bad=(((8,), "axis=1 is out of range for an array of rank 1"),),
        lone=(1, 4, 1, 1),
    ),
    "batch_two_axes": row(
        jaxnorm.BatchNorm,
        reference.batch_norm,
        {"axis": (1, 3)},
        LAST,
        lone=(1, 4, 1, 6),
    ),
    "layer": row(
        jaxnorm.LayerNorm,
        reference.layer_norm,
        {},
        LAST,
        ((8, 5), (7,)),
        bad=(((), "reduction_axes=-1 is out of range"),),
        split=None,
        lone=(8, 1),
    ),
    "layer_space": row(
        jaxnorm.LayerNorm,
        reference.layer_norm,
        {"reduction_axes": (1, 2, 3)},
        LAST,
        bad=(((8, 3, 2), r"reduction_axes=\(1, 2, 3\) is out of range"),),
        split=1,
        lone=(8, 1, 1, 1),
    ),
    "layer_mixed": row(
        jaxnorm.LayerNorm,
        reference.layer_norm,
        {"reduction_axes": (-1, 1), "feature_axes": (1, 2)},
        LAST,
        split=None,
    ),
    "rms": row(
        jaxnorm.RMSNorm,
        reference.rms_norm,
        {},
        LAST,
        ((8, 5), (7,)),
        bad=(((), "reduction_axes=-1 is out of range"),),
        split=None,
    ),
    "rms_space": row(
        jaxnorm.RMSNorm,
        reference.rms_norm,
        {"reduction_axes": (1, 2, 3)},
        LAST,
        split=1,
    ),
    "group": row(
        jaxnorm.GroupNorm,
        reference.group_norm,
        {"num_groups": 2},
        LAST,
        ((8, 6), (8, 5, 4)),
        bad=(
            ((8, 4, 7), "num_groups=2 does not divide the 7 features"),
            ((6,), "axis=-1 names the leading axis"),
        ),
        split=1,
        lone=(8, 2),
    ),
    "group_first": row(
        jaxnorm.GroupNorm,
        reference.group_norm,
        {"num_groups": None, "group_size": 2, "axis": 1},
        FIRST,
        bad=(((8, 5, 2), "group_size=2 does not divide the 5 features"),),
        split=None,
    ),
    "instance": row(
        jaxnorm.InstanceNorm,
        reference.instance_norm,
        {},
        LAST,
        ((8, 5, 3),),
        bad=(((6,), "axis=-1 names the leading axis"),),
        split=1,
        lone=(8, 5),
    ),
    "instance_first": row(
        jaxnorm.InstanceNorm,
        reference.instance_norm,
        {"axis": 1},
        FIRST,
        bad=(((8,), "axis=1 is out of range"),),
        split=2,
        lone=(8, 4, 1, 1),
    ),
    "ghost": row(
        jaxnorm.GhostBatchNorm,
        reference.ghost_batch_norm,
        {"size": 2},
        LAST,
        ((8, 5), (4, 3, 2)),
        bad=(((7, 4), "size=2 does not divide the batch of 7 examples"),),
        split=None,
    ),
}

RUNNING = {k: r for k, r in NORMS.items() if r.norm.has_stats}
SYNCED = {k: r for k, r in NORMS.items() if r.split is not None}


def changed(norm, **settings):
    """The same norm with other settings."""
    return type(norm)(**(vars(norm) | settings))


class Problem(NamedTuple):
    """Random arrays for a row; `x` in float32 unless asked otherwise.

    In NumPy, so that no test compiles a program just to make its inputs.
    """

    x: Any
    params: dict[str, Any]
    stats: dict[str, Any]
    mask: np.ndarray
    cotangent: np.ndarray


def problem(row: Row, shape=None, *, dtype=jnp.float32, offset=0.0, seed=0) -> Problem:
    rng = np.random.default_rng(seed)
    shape = row.shape if shape is None else shape
    features = row.norm.axes(shape).feature_shape
    x = (rng.normal(size=shape) + offset).astype(dtype)
    params = {
        k: rng.uniform(0.5, 2, size=features).astype(np.float32)
        for k in row.norm.params
    }
    mask = rng.random(shape) > 0.4
    cotangent = rng.normal(size=shape).astype(np.float32)
    return Problem(x, params, dict(initial_stats(row.norm, features)), mask, cotangent)


@functools.cache
def initial_stats(norm: jaxnorm.Norm, features, dtype=jnp.float32):
    return {k: np.asarray(v) for k, v in norm.init_stats(features, dtype).items()}


def expected(row: Row, x, params, mask=None) -> reference.Result:
    return row.reference(np.asarray(x), *_arrays(params), mask=mask)


@functools.partial(jax.jit, static_argnums=0)
def spread(norm: jaxnorm.Norm, x, mask=None):
    """jaxnorm's moments of `x`, each broadcast to the shape of `x`."""
    axes = norm.axes(x.shape)
    if isinstance(norm, jaxnorm.GhostBatchNorm):
        axes = axes_of.virtual_batches(x.shape, norm.axis, norm.size)
    m = jaxnorm.moments(x, axes, mask=mask, center=norm.center)
    return [jnp.broadcast_to(v, axes.folded).reshape(x.shape) for v in m[:3]]


def _arrays(params) -> list[np.ndarray]:
    return [np.asarray(params[k]) for k in ("scale", "bias") if k in params]


def tolerance(dtype, summed: int = 1) -> float:
    """Unit roundoff times the root of the number of elements summed, times 8.

    The roundings of a sum of n terms add up like a random walk of n steps, and an
    output goes through a handful of such sums and products.
    """
    return 8 * float(jnp.finfo(dtype).eps) * max(summed, 1) ** 0.5


def assert_close(actual, desired, *, dtype=jnp.float32, summed=1, size=1.0):
    """Equal to `tolerance` of the magnitude `size`; and finite: NaN is no pass."""
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all(), "not finite"
    limit = tolerance(dtype, summed) * size
    np.testing.assert_allclose(actual, np.asarray(desired), rtol=limit, atol=limit)
