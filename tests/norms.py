"""The table of everything under test: a method adds a row and inherits every property.

A row is read by the property tests: the settings, a float64 reference written from the
paper, shapes that work, shapes that must not with the message they give, and the axis
over which devices share statistics if `axis_name` is set.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
import reference_methods as methods

import jaxnorm
from jaxnorm import RunningNorm
from jaxnorm._axes import Axes


class Row(NamedTuple):
    norm: jaxnorm.Norm
    exact: Callable[..., Any]  # (x, params, stats, mask=, ...) -> (y, stats)
    shape: tuple[int, ...]  # the usual input, its batch a multiple of 8
    more_shapes: tuple[tuple[int, ...], ...] = ()
    bad: tuple[tuple[tuple[int, ...], str], ...] = ()  # (shape, message)
    split: int | None = 0  # the axis that synchronized devices share out
    lone: tuple[int, ...] | None = None  # a shape of one value per variance
    of_moments: Callable[..., reference.Result] | None = None  # if y is of these alone
    inputs: Callable[[Any], dict[str, Any]] = lambda x: {}  # beside x
    backward: Callable[..., dict[str, Any]] | None = None  # if not the derivative
    held: Callable[..., dict[str, Any]] | None = None  # what the gradient sees fixed
    positions: bool = False  # whether masks are of whole positions
    poison: bool = True  # whether what a mask hides may be NaN
    constant: bool = True  # whether a constant input gives zeros
    collectives: int = 1  # in each direction, if synchronized


def row(kind: type[jaxnorm.Norm], ref: Any, options: dict[str, Any], *args, **kwargs):
    """A row whose outputs follow from the moments of sets of elements."""
    norm = kind(**options)
    call = functools.partial(ref, epsilon=norm.epsilon, **options)

    def whole(x, params, stats, *, mask=None, use_running_average=False):
        scale, bias = params.get("scale"), params.get("bias")
        if not isinstance(norm, RunningNorm):
            return call(x, *_arrays(params), mask=mask).y, {}
        axis = norm.axes(np.shape(x)).feature
        if use_running_average:
            args = x, scale, bias, stats, axis, norm.epsilon, mask
            return reference.by_running(*args), dict(stats)
        batch = reference.batch_norm(x, axis=axis, mask=mask)
        first = tuple(slice(None) if a in axis else 0 for a in range(np.ndim(x)))
        seen = reference.Moments(batch.mean[first], batch.var[first], batch.size[first])
        new = reference.running(stats, seen, momentum=norm.momentum)
        return call(x, scale, bias, mask=mask).y, new

    return Row(norm, whole, *args, of_moments=call, **kwargs)


def other(
    kind: type[jaxnorm.Norm],
    options: dict[str, Any],
    *args,
    ref: Any = None,
    backward: Any = None,
    **kwargs,
):
    """A row with a reference of its own, called as the method is."""
    norm = kind(**options)
    ref = ref or getattr(methods, sys.modules[kind.__module__].__name__.split(".")[-1])
    fixed = {"epsilon": norm.epsilon, **options}
    fixed = {k: v for k, v in fixed.items() if k in inspect.signature(ref).parameters}
    if backward is not None:
        backward = functools.partial(backward, **fixed)
    call = functools.partial(ref, **fixed)
    return Row(norm, call, *args, backward=backward, **kwargs)


FIRST = (8, 4, 4, 2)  # channels first
LAST = (8, 4, 2, 6)  # channels last

KERNEL = np.linspace(0.5, 1.5, 6, dtype=np.float32)[None]


def scaling(x):
    """A layer that multiplies each feature by its kernel, which gave x."""

    def layer(kernel):
        ratio = (kernel / KERNEL.astype(kernel.dtype)).astype(x.dtype)
        return x * ratio.reshape(*[1] * (x.ndim - 1), -1)

    return {"kernel": KERNEL, "layer": layer}


def cross_iteration(x, params, stats, **settings):
    """The reference keeps mean squares, the package the variances."""
    settings.pop("kernel_shape", None)
    if settings.get("use_running_average"):
        return methods.cross_iteration_batch_norm(x, params, stats, **settings)
    past = {k: np.asarray(v, np.float64) for k, v in stats.items()}
    mean, slope = past["past_mean"], past["past_mean_slope"]
    twice = 2 * mean[:, None] * slope
    given = {k: past[k] for k in ("mean", "var")} | {
        "history_mean": mean,
        "history_square": past["past_var"] + mean**2,
        "history_mean_slope": slope,
        "history_square_slope": past["past_var_slope"] + twice,
        "history_kernel": past["past_kernel"],
        "count": stats["batches"],
    }
    y, new = methods.cross_iteration_batch_norm(x, params, given, **settings)
    mean, slope = new["history_mean"], new["history_mean_slope"]
    return y, {k: new[k] for k in ("mean", "var")} | {
        "past_mean": mean,
        "past_var": new["history_square"] - mean**2,
        "past_mean_slope": slope,
        "past_var_slope": new["history_square_slope"] - 2 * mean[:, None] * slope,
        "past_kernel": new["history_kernel"],
        "batches": new["count"],
    }


def segments(ids):
    return lambda x: {"segment_ids": np.array(ids)}


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
    "layer_heads": row(
        jaxnorm.LayerNorm,
        reference.layer_norm,
        {"feature_axes": (-2, -1)},
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
    "rms_heads": row(  # a scale for each head, as for queries and keys
        jaxnorm.RMSNorm,
        reference.rms_norm,
        {"feature_axes": (-2, -1)},
        LAST,
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
        split=None,
    ),
    "ghost_ragged": other(jaxnorm.GhostBatchNorm, {"size": 3}, LAST, split=None),
    "ghost_one": other(jaxnorm.GhostBatchNorm, {"size": 20}, LAST, split=None),
    "layer_zero_centered": other(
        jaxnorm.LayerNorm, {"zero_centered_scale": True}, LAST, split=None
    ),
    "rms_zero_centered": other(
        jaxnorm.RMSNorm, {"zero_centered_scale": True}, LAST, split=None
    ),
    "rms_partial": other(
        jaxnorm.RMSNorm,
        {"first_features": 2},
        LAST,
        ((8, 5), (7,)),
        split=None,
    ),
    "rms_partial_zero_centered": other(
        jaxnorm.RMSNorm,
        {"first_features": 3, "zero_centered_scale": True},
        LAST,
        split=None,
    ),
    "renorm": other(
        jaxnorm.BatchRenorm,
        {"rmax": 1.2, "dmax": 0.3},
        LAST,
        ((16, 5),),
        lone=(1, 4),
        held=lambda x, stats, mask: {
            "correction": methods.batch_renorm_correction(
                x, stats, mask=mask, rmax=1.2, dmax=0.3
            )
        },
        constant=False,
    ),
    "recurrent": other(
        jaxnorm.RecurrentBatchNorm,
        {"max_steps": 3},
        (8, 6),
        inputs=lambda x: {"step": np.int32(1)},
        lone=(1, 4),
    ),
    "recurrent_late": other(
        jaxnorm.RecurrentBatchNorm,
        {"max_steps": 3},
        (8, 2, 6),
        inputs=lambda x: {"step": np.int32(7)},
    ),
    "online": other(
        jaxnorm.OnlineNorm,
        {"momentum": 0.9, "control_momentum": 0.8},
        LAST,
        ((8, 5),),
        split=None,
        backward=methods.online_norm_backward,
        constant=False,
    ),
    "online_unscaled": other(
        jaxnorm.OnlineNorm,
        {"momentum": 0.9, "control_momentum": 0.8, "layer_scaling": False},
        (8, 3, 4),
        split=None,
        backward=methods.online_norm_backward,
        constant=False,
    ),
    "moving_average": other(
        jaxnorm.MovingAverageBatchNorm,
        {"window": 3},
        LAST,
        ((8, 5),),
        backward=methods.moving_average_batch_norm_backward,
        constant=False,
        collectives=1,
    ),
    "moving_average_new": other(
        jaxnorm.MovingAverageBatchNorm,
        {"window": 9},
        (8, 3, 4),
        backward=methods.moving_average_batch_norm_backward,
        constant=False,
    ),
    "power": other(
        jaxnorm.PowerNorm,
        {},
        LAST,
        ((8, 5),),
        backward=methods.power_norm_backward,
        constant=False,
    ),
    "cross_iteration": other(
        jaxnorm.CrossIterationBatchNorm,
        {"window": 3, "kernel_shape": (1, 6)},
        LAST,
        ref=functools.partial(cross_iteration, window=3),
        split=None,
        inputs=scaling,
        poison=False,
        constant=False,
    ),
    "eval": other(jaxnorm.EvalNorm, {"weight": 0.3}, LAST, lone=(1, 4)),
    "virtual": other(
        jaxnorm.VirtualBatchNorm,
        {"size": 3},
        LAST,
        ((8, 5),),
        bad=(((2, 4), "size=3 examples of reference do not fit"),),
        split=None,
    ),
    "iter": other(
        jaxnorm.IterNorm,
        {"num_groups": 2, "group_size": None},
        LAST,
        ((16, 4),),
        bad=(((8, 3, 5), "num_groups=2 does not divide the 5 features"),),
        positions=True,
        collectives=2,
    ),
    "l1": other(jaxnorm.L1BatchNorm, {}, LAST, ((16, 5),), lone=(1, 4), collectives=2),
    "range": other(
        jaxnorm.RangeBatchNorm, {}, LAST, ((16, 5),), lone=(1, 4), collectives=2
    ),
    "domain": other(
        jaxnorm.DomainBatchNorm,
        {"num_domains": 3},
        LAST,
        ((8, 5),),
        split=None,
        inputs=lambda x: {"domain": np.array([0, 2, 0, 0, 2, 0, 2, 2])},
    ),
    "domain_affine": other(
        jaxnorm.DomainBatchNorm,
        {"num_domains": 2, "share_affine": False},
        (8, 3, 4),
        split=None,
        inputs=lambda x: {"domain": np.array([0, 1, 0, 0, 1, 0, 1, 1])},
    ),
    "running_instance": other(
        jaxnorm.RunningInstanceNorm, {}, LAST, ((8, 5, 3),), split=None, lone=(8, 1, 4)
    ),
    "switchable": other(jaxnorm.SwitchableNorm, {}, LAST, ((8, 5),), constant=True),
    "filter_response": other(
        jaxnorm.FilterResponseNorm,
        {"learn_epsilon": True},
        LAST,
        ((8, 5),),
        split=1,
        constant=False,
    ),
    "evo_b0": other(jaxnorm.EvoNormB0, {}, LAST, lone=(1, 4), constant=False),
    "evo_s0": other(
        jaxnorm.EvoNormS0, {"num_groups": 2}, LAST, split=1, constant=False
    ),
    "positional": other(jaxnorm.PositionalNorm, {}, LAST, ((8, 5),), split=None),
    "scale": other(
        jaxnorm.ScaleNorm, {}, LAST, ((8, 5), (7,)), split=None, constant=False
    ),
    "global_response": other(
        jaxnorm.GlobalResponseNorm, {}, LAST, ((8, 5),), split=1, constant=False
    ),
    "local_response": other(
        jaxnorm.LocalResponseNorm,
        {"size": 4, "alpha": 0.7, "beta": 0.6, "k": 1.5},
        LAST,
        ((8, 5), (7,)),
        split=None,
        constant=False,
    ),
    "dynamic_tanh": other(
        jaxnorm.DynamicTanh, {}, LAST, ((8, 5),), split=None, constant=False
    ),
    "act": other(jaxnorm.ActNorm, {}, LAST, ((8, 5),), split=None, constant=False),
    "divisive": other(
        jaxnorm.DivisiveNorm,
        {"window": (3, 4), "window_axes": (1, 3)},
        LAST,
        split=None,
    ),
    "segment": other(
        jaxnorm.SegmentNorm,
        {"num_segments": 4},
        LAST,
        ((8, 5),),
        split=1,
        inputs=segments([0, 2, 0, 0, 2, 0, 2, 2]),
        lone=(1, 1),
    ),
    "segment_groups": other(
        jaxnorm.SegmentNorm,
        {"num_segments": 3, "num_groups": None, "group_size": 2},
        LAST,
        ((8, 4),),
        split=1,
        inputs=segments([0, 2, -1, 0, 2, 5, 2, 2]),
    ),
    "graph": other(
        jaxnorm.GraphNorm,
        {"num_segments": 4},
        LAST,
        ((8, 5),),
        split=1,
        inputs=segments([0, 2, 0, 0, 2, 3, 2, 2]),
        lone=(1, 4),
        constant=False,
    ),
    "pair": other(
        jaxnorm.PairNorm,
        {"num_segments": 3, "scale": 1.5},
        LAST,
        ((8, 5),),
        split=1,
        inputs=segments([0, 2, 0, 0, 2, 0, 2, 2]),
        lone=(1, 4),
    ),
    "pair_individual": other(
        jaxnorm.PairNorm,
        {"num_segments": 3, "scale_individually": True},
        LAST,
        ((8, 5),),
        split=1,
        inputs=segments([0, 2, 0, 0, 2, -1, 2, 2]),
    ),
}

MOMENTS = {k: r for k, r in NORMS.items() if r.of_moments is not None}
RUNNING = {k: r for k, r in MOMENTS.items() if r.norm.has_stats}
STATEFUL = {k: r for k, r in NORMS.items() if r.norm.has_stats}
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
        k: (rng.uniform(0.5, 2, size=v) * (0.1 if "control" in k else 1)).astype(
            np.float32
        )
        for k, v in param_shapes(row.norm, features).items()
    }
    mask = rng.random((*shape[:-1], 1) if row.positions else shape) > 0.4
    cotangent = rng.normal(size=shape).astype(np.float32)
    return Problem(x, params, dict(initial_stats(row.norm, features)), mask, cotangent)


def moved(row: Row, shape=None, seed=0) -> dict[str, Any]:
    """Statistics as after some steps: none of them 0 or 1."""
    rng = np.random.default_rng(seed + 100)
    features = row.norm.axes(row.shape if shape is None else shape).feature_shape
    stats = {}
    for k, v in initial_stats(row.norm, features).items():
        if np.issubdtype(v.dtype, np.integer):
            stats[k] = np.full_like(v, 4)
        elif k in ("var", "buffer", "past_var"):
            stats[k] = rng.uniform(0.5, 2, v.shape).astype(v.dtype)
        else:
            stats[k] = (0.3 * rng.normal(size=v.shape)).astype(v.dtype)
    return stats


@functools.cache
def param_shapes(norm: jaxnorm.Norm, features) -> dict[str, tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: norm.init_params(features))
    return {k: v.shape for k, v in shapes.items()}


def implied(row: Row) -> dict[str, Any]:
    """What the reference needs where the package has a default."""
    shapes = param_shapes(row.norm, row.norm.axes(row.shape).feature_shape)
    ones = ("slope", "mean_weight", "var_weight")
    return {k: np.ones(v) for k, v in shapes.items() if k in ones} | {
        k: np.zeros(v) for k, v in shapes.items() if "control" in k
    }


@functools.cache
def initial_stats(norm: jaxnorm.Norm, features, dtype=jnp.float32):
    return {k: np.asarray(v) for k, v in norm.init_stats(features, dtype).items()}


def expected(row: Row, x, params, mask=None) -> reference.Result:
    assert row.of_moments is not None
    return row.of_moments(np.asarray(x), *_arrays(params), mask=mask)


@functools.partial(jax.jit, static_argnums=0)
def spread(norm: jaxnorm.Norm, x, mask=None):
    """jaxnorm's moments of `x`, each broadcast to the shape of `x`."""
    axes = norm.axes(x.shape)
    if isinstance(norm, jaxnorm.GhostBatchNorm):
        axes = Axes.virtual_batches(x.shape, norm.axis, norm.size)
    m = jaxnorm.moments(x, axes, mask=mask, center=norm.center)
    return [jnp.broadcast_to(v, axes.working_shape).reshape(x.shape) for v in m[:3]]


@functools.partial(jax.jit, static_argnums=0)
def everything(name: str, x, params, stats, mask, cotangent):
    """Output, new statistics, and gradients by x and the parameters; compiled once for
    all tests that ask for the same."""
    row = NORMS[name]

    def f(x, params):
        return row.norm(x, params, stats, mask=mask, **row.inputs(x))

    y, pull, new = jax.vjp(f, x, params, has_aux=True)
    return y, new, *pull(cotangent.astype(y.dtype))


@functools.partial(jax.jit, static_argnums=0)
def forward(name: str, x, params, stats, mask, flag):
    """Output and new statistics, where there are some by the running ones if `flag`."""
    row = NORMS[name]
    given = {"mask": mask, **row.inputs(x)}
    if row.norm.has_stats:
        given["use_running_average"] = flag
    return row.norm(x, params, stats, **given)


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
