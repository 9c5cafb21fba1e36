"""The formulas that other platforms get, run on a CPU: the same numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import lowered_as
from norms import MOMENTS, assert_close, changed, expected, problem
from test_activation import NAMES as ACTIVATED

import jaxnorm
from jaxnorm._primitives._parts import parts_of

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """Takes the formulas that are meant for a platform wherever there is a choice."""

    def chosen(*args, default, **choices):
        return choices.get(request.param, default)(*args)

    with lowered_as(request.param):
        monkeypatch.setattr(lax, "platform_dependent", chosen)
        yield request.param
        monkeypatch.undo()


def value_and_gradients(f, cotangent, *args):
    """What `f` returns for the arguments, and the gradients by each of them."""

    @jax.jit
    def both(*args):
        y, pull = jax.vjp(f, *args)
        return y, pull(cotangent.astype(y.dtype))

    return jax.tree.map(np.asarray, both(*args))


@functools.cache
def gradients_by_definition(name):
    """Those in float64 of what is the same on every platform."""
    row = MOMENTS[name]
    p = problem(row, offset=3.0)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (p.x, p.params))
        f = functools.partial(expected_in_jax, row)
        return value_and_gradients(f, p.cotangent, *wide)[1]


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance_first"])
def test_values_and_gradients_do_not_depend_on_the_platform(name, platform):
    row = MOMENTS[name]
    p = problem(row, offset=3.0)

    def f(x, params):
        return row.norm(x, params, p.stats)[0]

    y, (dx, dparams) = value_and_gradients(f, p.cotangent, p.x, p.params)
    assert_close(y, expected(row, p.x, p.params).y, summed=p.x.size, size=4)
    ex, eparams = gradients_by_definition(name)
    assert_close(dx, ex, summed=p.x.size, size=4)
    for k, v in dparams.items():
        assert_close(v, eparams[k], summed=p.x.size, size=4)


def expected_in_jax(row, x, params):
    """The definition of a norm over its axes, without anything of the package's."""
    axes = row.norm.axes(x.shape)
    folded = x.reshape(axes.working_shape)
    if row.norm.center:
        folded = folded - folded.mean(axes.reduce, keepdims=True)
    square = (folded**2).mean(axes.reduce, keepdims=True)
    y = (folded / jnp.sqrt(square + row.norm.epsilon)).reshape(x.shape)
    shape = [n if a in axes.feature else 1 for a, n in enumerate(x.shape)]
    y = y * params["scale"].reshape(shape)
    return y + params["bias"].reshape(shape) if "bias" in params else y


PARTED = {  # shapes, and the axes of what is summed
    "batch": ((4, 264, 64), (0, 1)),
    "layer": ((128, 1024), (0,)),
    "group": ((16, 128, 64), (1,)),
}


@pytest.mark.parametrize("platform", ["cuda"], indirect=True)
@pytest.mark.parametrize(
    "name, offset, relu",
    [
        *((name, offset, False) for name in PARTED for offset in (3.0, 1e4)),
        *((name, 3.0, True) for name in PARTED if name in ACTIVATED),
    ],
)
def test_sums_that_a_gpu_takes_in_parts(name, offset, relu, platform):
    row, (shape, along) = MOMENTS[name], PARTED[name]
    assert parts_of(shape, along)[0] > 1
    p = problem(row, shape, offset=offset)
    norm = changed(row.norm, activation="relu") if relu else row.norm

    def f(x, params):
        return norm(x, params, p.stats)[0]

    def definition(x, params):
        y = expected_in_jax(row, x, params)
        return jnp.maximum(y, 0) if relu else y

    found = value_and_gradients(f, p.cotangent, p.x, p.params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (p.x, p.params))
        desired = value_and_gradients(definition, p.cotangent, *wide)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(desired), strict=True):
        assert_close(a, b, summed=p.x.size, size=4)


def with_residual(name):
    row = MOMENTS[name]
    p = problem(row, (8, 4, 2, 8))
    residual = np.random.default_rng(5).normal(size=p.x.shape).astype(np.float32)
    return row, p, (p.x, p.params, residual)


@functools.cache
def relu_by_definition(name):
    row, p, args = with_residual(name)

    def composed(x, params, residual):
        return jax.nn.relu(expected_in_jax(row, x, params) + residual)

    return value_and_gradients(composed, p.cotangent, *args)


@pytest.mark.parametrize("name", ACTIVATED)
def test_relu_and_residual_do_not_depend_on_the_platform(name, platform):
    row, p, args = with_residual(name)
    norm = changed(row.norm, activation="relu")

    def fused(x, params, residual):
        return norm(x, params, p.stats, residual=residual)[0]

    y, grads = value_and_gradients(fused, p.cotangent, *args)
    want, desired = relu_by_definition(name)
    assert_close(y, want, summed=p.x.size, size=4)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(desired), strict=True):
        assert_close(a, b, summed=p.x.size, size=8)


@pytest.mark.parametrize(
    "jit", [False, pytest.param(True, marks=pytest.mark.optimized)]
)
def test_constants_become_zero_whatever_their_number(platform, jit):
    norms = {
        (5, 1023): jaxnorm.LayerNorm(),
        (1000, 3): jaxnorm.BatchNorm(),
        (2, 769, 4): jaxnorm.GroupNorm(num_groups=2),
        (2, 3, 1025): jaxnorm.InstanceNorm(axis=1),
    }
    for (shape, norm), value in itertools.product(
        norms.items(), (5144.123, -1e4 / 3, 7.7, 1e-3)
    ):
        stats = norm.init_stats(norm.axes(shape).feature_shape)
        call = jax.jit(norm) if jit else norm
        y, _ = call(np.full(shape, value, np.float32), {}, stats)
        np.testing.assert_array_equal(y, 0)


@pytest.mark.optimized
def test_outputs_are_exact_far_from_zero(platform):
    x = np.random.default_rng(0).normal(size=(16, 7, 7, 8)).astype(np.float32)
    x = x + np.float32(1e4)
    for name in ("batch", "layer", "instance"):
        row = MOMENTS[name]
        y, _ = jax.jit(row.norm)(x, {}, problem(row, x.shape).stats)
        assert_close(y, expected(row, x, {}).y, summed=16)


SHAPES = [(5, 8), (4, 5, 8), (3, 4, 2, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_axes_may_share_statistics(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    axes = range(len(shape))
    choices = [c for n in axes for c in itertools.combinations(axes, n + 1)]
    ys = jax.jit(lambda x: [jaxnorm.layer_norm(x, reduction_axes=c) for c in choices])
    for y, reduced in zip(ys(x), choices, strict=True):
        apart = x - x.mean(reduced, dtype=np.float64, keepdims=True)
        square = (apart**2).mean(reduced, keepdims=True)
        assert_close(y, apart / np.sqrt(square + 1e-6), summed=x.size, size=4)


@pytest.mark.parametrize("spec", [P("d"), P("d", None, "f"), P(None, None, "f")])
def test_explicit_meshes(spec):
    x = np.random.default_rng(2).normal(size=(16, 4, 16)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("d", "f"), axis_types=(AxisType.Explicit,) * 2)
    norms = (
        jaxnorm.GroupNorm(num_groups=2, activation="relu"),
        jaxnorm.InstanceNorm(activation="relu"),
    )
    for norm in norms:
        grad = jax.jit(jax.grad(lambda x, norm=norm: jnp.sin(norm(x, {}, {})[0]).sum()))
        want = grad(x)
        with jax.set_mesh(mesh):
            got = grad(jax.device_put(x, NamedSharding(mesh, spec)))
        assert_close(got, np.asarray(want), summed=64)
