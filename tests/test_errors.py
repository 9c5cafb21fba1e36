"""Every wrong input raises while tracing: the rule, the values, the way out."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike
from norms import MOMENTS as NORMS
from norms import NORMS as ALL
from norms import Row, changed, initial_stats, problem
from wrong_values import problem_of, told, unfiltered, wrong_for

import jaxnorm
from jaxnorm._axes import Axes

__all__ = ["unfiltered"]  # a fixture


@pytest.mark.parametrize(
    "name, shape, message",
    [(n, shape, message) for n, r in NORMS.items() for shape, message in r.bad],
)
def test_bad_shapes(name, shape, message):
    norm = NORMS[name].norm
    stats = norm.init_stats((4,))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: norm(x, {}, stats), jnp.ones(shape))


@pytest.mark.parametrize("name", NORMS)
def test_parameters_of_another_shape(name):
    row = NORMS[name]
    p = problem(row)
    for key in p.params:
        params = p.params | {key: jnp.ones((5,))}
        with pytest.raises(
            ValueError, match=rf"{key} has shape \(5,\), but the features"
        ):
            jax.eval_shape(lambda x, q=params: row.norm(x, q, p.stats), p.x)
    complex_scale = {"scale": p.params["scale"].astype(jnp.complex64)}
    with pytest.raises(TypeError, match="scale is complex64, but the input is real"):
        row.norm(p.x, complex_scale, p.stats)


@pytest.mark.parametrize("name", [n for n, r in NORMS.items() if r.norm.has_stats])
@pytest.mark.parametrize("evaluate", [False, True])
def test_statistics_of_another_shape(name, evaluate):
    row = NORMS[name]
    p = problem(row)
    for bad, message in (
        ({}, r"stats lacks \['mean', 'var'\], it holds \[\]"),
        ({"mean": p.stats["mean"]}, r"stats lacks \['var'\], it holds \['mean'\]"),
        (p.stats | {"var": jnp.ones((5,))}, r"stats\['var'\] has shape \(5,\), but"),
    ):
        with pytest.raises(ValueError, match=message):
            row.norm(p.x, p.params, bad, use_running_average=evaluate)


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_what_is_no_number(name):
    norm = NORMS[name].norm
    keys = jax.random.split(jax.random.key(0), (4, 3))
    with pytest.raises(TypeError, match="x must be an array of numbers, got dtype key"):
        norm(keys, {}, norm.init_stats((3,)))


@pytest.mark.parametrize("kind", [type(r.norm) for r in NORMS.values()])
def test_settings_are_keyword_only_values(kind):
    with pytest.raises(TypeError, match="positional"):
        kind(12)
    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind(epsilon=1e-3) != kind() and "epsilon=0.001" in repr(kind(epsilon=1e-3))
    with pytest.raises(AttributeError):
        kind().epsilon = 1
    with pytest.raises(ValueError, match="epsilon must not be negative, got -1"):
        kind(epsilon=-1)
    # Lists, as Flax users write them, make the same hashable value.
    listed = kind(axis_name=["a", "b"], axis_index_groups=[[0, 1], [2, 3]])
    tupled = kind(axis_name=("a", "b"), axis_index_groups=((0, 1), (2, 3)))
    assert listed == tupled and hash(listed) == hash(tupled)


def test_functions_take_their_settings_by_keyword():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match="positional"):
        cast(Any, jaxnorm.layer_norm)(x, None, None, 12)
    with pytest.raises(TypeError, match="use_running_average"):
        cast(Any, jaxnorm.batch_norm)(x, jaxnorm.init_stats(3))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 99])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="PyTorch's momentum m is 1 - m here"):
        jaxnorm.BatchNorm(momentum=momentum)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"num_groups": 2, "group_size": 2},
            "exactly one of num_groups and group_size",
        ),
        ({"num_groups": None}, "exactly one of num_groups and group_size"),
        ({"num_groups": 0}, "num_groups=0 does not divide the 6 features"),
        ({"num_groups": 2, "reduction_axes": (1,)}, "one feature axis, among those it"),
    ],
)
def test_group_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        jaxnorm.GroupNorm(**settings)(jnp.ones((2, 4, 6)), {}, {})


@pytest.mark.parametrize("axis", [1.5, "1", (0, 1.0), None])
def test_axes_that_are_no_integers(axis):
    with pytest.raises(TypeError, match="axis must be an integer or a sequence of"):
        jaxnorm.BatchNorm(axis=axis).axes((2, 3))
    with pytest.raises(TypeError, match="num_groups must be an integer, got 2.0"):
        cast(Any, jaxnorm.GroupNorm)(num_groups=2.0).axes((2, 4, 6))


@pytest.mark.parametrize("axis, ndim", [(2, 2), (-3, 2), ((0, 5), 3)])
def test_axes_out_of_range(axis, ndim):
    with pytest.raises(ValueError, match="is out of range for an array of rank"):
        jaxnorm.BatchNorm(axis=axis).axes((2,) * ndim)


@pytest.mark.parametrize("size", [2, 0])
def test_virtual_batches_that_are_not_equal(size):
    message = f"size={size} does not divide the batch of 7 examples"
    with pytest.raises(ValueError, match=message):
        Axes.virtual_batches((7, 4), -1, size)


ROWS: dict[str, Row] = {}
for _row in ALL.values():
    ROWS.setdefault(type(_row.norm).__name__, _row)

SHAPE = (8, 4, 2, 6)
AXES = Axes.keep(SHAPE, -1)
IMAGES = np.linspace(-1, 1, 384, dtype=np.float32).reshape(SHAPE)
KERNEL = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 4, 6)
STATS = {"mean": np.zeros(6, np.float32), "var": np.ones(6, np.float32)}
ONES = jnp.ones((1, 1, 1, 6))
MEASURED = jaxnorm.Moments(ONES, ONES, 64)
PARTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "keep": (Axes.keep, {"shape": SHAPE, "axis": -1}),
    "over": (Axes.over, {"shape": SHAPE, "reduction_axes": -1, "feature_axes": -1}),
    "per_example": (Axes.per_example, {"shape": SHAPE, "axis": -1}),
    "groups": (Axes.groups, {"shape": SHAPE, "axis": -1, "num_groups": 2}),
    "virtual_batches": (Axes.virtual_batches, {"shape": SHAPE, "axis": -1, "size": 2}),
    "moments": (jaxnorm.moments, {"x": IMAGES, "axes": AXES}),
    "pool": (jaxnorm.pool, {"m": MEASURED, "total": lambda v: v.sum(0, keepdims=True)}),
    "sync": (jaxnorm.sync, {"m": MEASURED, "axis_name": None}),
    "standardize": (
        jaxnorm.standardize,
        {"x": IMAGES, "mean": np.zeros(6), "rstd": np.ones(6), "axes": AXES},
    ),
    "normalize": (
        jaxnorm.normalize,
        {"x": IMAGES, "params": {}, "axes": AXES, "epsilon": 1e-5},
    ),
    "to_float8": (jaxnorm.to_float8, {"y": IMAGES, "scale": 0.1}),
    "init_stats": (jaxnorm.init_stats, {"feature_shape": (6,)}),
    "update_stats": (
        jaxnorm.update_stats,
        {"stats": STATS, "m": MEASURED, "axes": AXES, "momentum": 0.9},
    ),
    "weight_standardize": (jaxnorm.weight_standardize, {"kernel": KERNEL}),
    "weight_norm": (jaxnorm.weight_norm, {"kernel": KERNEL}),
    "spectral_norm": (jaxnorm.spectral_norm, {"kernel": KERNEL, "u": np.ones(6)}),
}


def function_of(row: Row) -> Callable[..., Any]:
    return getattr(jaxnorm, type(row.norm).__module__.rpartition(".")[2])


def arguments_of(row: Row, call: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that `call` takes, for the usual input of `row`."""
    p = problem(row)
    given = {"x": p.x, "params": p.params, "stats": p.stats, **p.params}
    given |= {"use_running_average": False, **vars(row.norm), **row.inputs(p.x)}
    return {k: v for k, v in given.items() if k in inspect.signature(call).parameters}


def refusals(call, arguments, parameters) -> list[str]:
    """What is wrong with how `call` refuses wrong arguments, one at a time."""
    problems = []
    for name, annotation in parameters.items():
        for value in wrong_for(name, annotation):
            given = arguments | {name: value}
            if name == "axis_index_groups":
                given["axis_name"] = "data"
            names = ("parameter", "scale") if name == "params" else ()
            problem = problem_of(lambda given=given: call(**given), name, *names)
            if problem:
                problems.append(f"{name}={told(value)} {problem}")
    return problems


def traced(walk: Callable[[], list[str]]) -> list[str]:
    """What `walk` returns; it runs within one trace, so that nothing is compiled."""
    found = []
    jax.eval_shape(lambda: found.extend(walk()))
    return found


def parameters_of(call: Callable[..., Any]) -> dict[str, Any]:
    return {k: p.annotation for k, p in inspect.signature(call).parameters.items()}


@pytest.mark.parametrize("name", ROWS)
def test_wrong_settings(name, unfiltered):
    row = ROWS[name]
    p = problem(row)

    def call(**settings):
        norm = changed(row.norm, **settings)
        return norm(p.x, p.params, p.stats, **row.inputs(p.x))

    fields = {f.name: f.type for f in dataclasses.fields(row.norm)}
    assert traced(lambda: refusals(call, {}, fields)) == []


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("evaluate", [False, True])
def test_wrong_arguments_of_functions(name, evaluate, unfiltered):
    row = ROWS[name]
    call = function_of(row)
    arguments = arguments_of(row, call)
    parameters = parameters_of(call)
    if evaluate and "use_running_average" not in parameters:
        return
    if evaluate:
        arguments["use_running_average"] = True
        parameters = {k: parameters[k] for k in ("stats", "scale", "bias", "mask")}
    settings = {f.name for f in dataclasses.fields(row.norm)}
    others = {k: v for k, v in parameters.items() if k not in settings}
    assert traced(lambda: refusals(call, arguments, others)) == []
    for k in settings & set(parameters):  # each reaches the settings
        wrong = arguments | {k: object()}
        assert problem_of(lambda wrong=wrong: call(**wrong), k) is None


@pytest.mark.parametrize("name", ROWS)
def test_wrong_arguments_of_values(name, unfiltered):
    row = ROWS[name]
    p = problem(row)
    arguments = {"x": p.x, "params": p.params, "stats": p.stats, **row.inputs(p.x)}
    parameters = parameters_of(jaxnorm.Norm.__call__)
    names = ("x", "params", "stats", "use_running_average", "mask", "dtype")
    parameters = {k: parameters[k] for k in names}
    found = traced(lambda: refusals(row.norm, arguments, parameters))
    # The statistics of a norm that keeps none.
    assert found == ([] if row.norm.has_stats else ["stats={} is accepted"])
    features = {"feature_shape": row.norm.axes(row.shape).feature_shape}
    for init in (row.norm.init_params, row.norm.init_stats):
        parameters = {"feature_shape": None, "dtype": DTypeLike}
        assert refusals(init, features, parameters) == []


@pytest.mark.parametrize("name", PARTS)
def test_wrong_arguments_of_parts(name, unfiltered):
    call, arguments = PARTS[name]
    found = traced(lambda: refusals(call, arguments, parameters_of(call)))
    assert found == []


def test_what_people_pass_by_habit():
    x, scale = jnp.ones((4, 6)), jnp.ones(6)
    norm = cast(Any, jaxnorm)
    for call, message in (
        (
            lambda: norm.batch_norm(x, scale, scale, use_running_average=False),
            r"stats must be a dict, as init_stats makes it, got float32 of shape \(6,\)"
            ": give it before scale and bias",
        ),
        (
            lambda: norm.batch_norm(x, (scale, scale), use_running_average=True),
            "stats must be a dict, as init_stats makes it, got ",
        ),
        (
            lambda: norm.group_norm(x, 3),
            "scale must be an array, got 3: pass num_groups=3 by name",
        ),
        (
            lambda: norm.evo_norm_s0(x, 3),
            "scale must be an array, got 3: pass num_groups=3 by name",
        ),
        (
            lambda: norm.BatchNorm(momentum="0.9"),
            "momentum must be one real number, got '0.9'",
        ),
        (
            lambda: norm.BatchNorm()(x, [scale, scale], jaxnorm.init_stats(6)),
            "params must be a dict, as init_params makes it, got ",
        ),
        (
            lambda: norm.LayerNorm(epsilon=1e-5j),
            "epsilon must be one real number, got 1e-05j",
        ),
        (
            lambda: norm.BatchNorm(activation=jax.nn.relu),
            "activation=.* is none of .*'relu'.*: name one of these, or leave it out",
        ),
        (
            lambda: norm.moments(x, -1),
            r"axes must be a jaxnorm.Axes, as jaxnorm\.Axes\.keep makes it, got -1",
        ),
        (
            lambda: norm.LayerNorm()(x, {}, {}, dtype="int8"),
            "dtype must be a dtype of floating point, such as jnp.float32, got 'int8'",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_numbers_that_are_no_python_numbers():
    """Scalars of NumPy and JAX, lists of numbers: as hashable, and to the same end."""
    plain = jaxnorm.BatchNorm(epsilon=0.5, momentum=0.25, axis=1, unbiased=True)
    for number in (np.float32, np.array, jnp.asarray):
        settings: Any = {"epsilon": number(0.5), "momentum": number(0.25)}
        settings |= {"axis": np.int64(1), "unbiased": np.bool_(True)}
        given = jaxnorm.BatchNorm(**settings)
        assert given == plain and hash(given) == hash(plain)
    x = [[1.0, 2.0], [3.0, 6.0]]
    lists: Any = x, {"scale": [1, 1]}, {"mean": [0.0, 0.0], "var": [1.0, 1.0]}
    y, _ = jaxnorm.BatchNorm()(*lists, use_running_average=True)
    np.testing.assert_allclose(y, x, rtol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_settings_that_are_traced(name):
    row = ROWS[name]
    p = problem(row)
    known = {"epsilon", "control_momentum"} if name == "OnlineNorm" else set()

    def loss(settings, x, flag):
        norm = changed(row.norm, **settings)
        y, _ = norm(x, p.params, p.stats, use_running_average=flag, **row.inputs(p.x))
        return y.sum()

    for f in dataclasses.fields(row.norm):
        if f.type not in (float, float | None):
            continue
        value = {f.name: getattr(row.norm, f.name)}
        for flag in (False, True) if row.norm.has_stats else (False,):
            trace = functools.partial(jax.make_jaxpr(jax.grad(loss), 2), value, p.x)
            if f.name not in known:
                trace(flag)
                continue
            with pytest.raises(TypeError, match=f"{f.name} must be known while tr"):
                trace(flag)


@pytest.mark.parametrize("name", ALL)
def test_arrays_of_nothing(name):
    """Whichever axis is empty, so is the result, and the statistics stay."""
    row = ALL[name]
    for axis in range(len(row.shape)):
        x = np.zeros([n * (a != axis) for a, n in enumerate(row.shape)], np.float32)
        features = row.norm.axes(x.shape).feature_shape
        inputs = row.inputs(x)
        for k in {"domain", "segment_ids"} & inputs.keys():
            inputs[k] = np.zeros(len(x), int)
        if name == "cross_iteration" and not features[0]:
            continue  # the features of its kernel
        norm = functools.partial(row.norm, params={}, **inputs)
        stats = initial_stats(row.norm, features)
        if name == "virtual" and axis == 0:
            with pytest.raises(ValueError, match="put the reference batch before"):
                norm(x, stats=stats)
            continue
        y, new = jax.eval_shape(functools.partial(norm, stats=stats), x)
        assert y.shape == x.shape and new.keys() == stats.keys()
        if axis == 0 and stats:
            new = jax.jit(norm)(x, stats=stats)[1]
            for k, v in stats.items():
                np.testing.assert_array_equal(v, new[k])


@pytest.mark.parametrize(
    "groups, message",
    [
        (
            [[0, 1], [1, 2]],
            "must hold each index of axis_name, from 0 on, exactly once",
        ),
        ([[0, 1], [3]], "must hold each index of axis_name, from 0 on, exactly once"),
        ([[0, 1], []], "exactly once, and no empty group"),
        ([0, 1], r"must be a list of lists of indices, got \[0, 1\]"),
        ([[0], [1]], "must hold each index of axis_name='data', 0 to 2, exactly once"),
        ([[0, 1], [2, 3]], "must hold each index of axis_name='data', 0 to 2, exactly"),
    ],
)
@pytest.mark.parametrize("name", ["BatchNorm", "RMSNorm", "OnlineNorm", "IterNorm"])
def test_groups_that_are_no_partition(name, groups, message):
    row = ROWS[name]
    p = problem(row)

    def each(x):
        norm = changed(row.norm, axis_name="data", axis_index_groups=groups)
        return norm(x, p.params, p.stats)[0]

    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(jax.vmap(each, axis_name="data"), jnp.stack([p.x] * 3))
