"""Each operation: its derivatives, its batches, and what it is lowered to where."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import jaxnorm
from jaxnorm import Axes, models
from jaxnorm._cpu import library
from jaxnorm._primitives import rows
from jaxnorm._primitives._operation import Reduction
from jaxnorm._primitives.affine import TANGENT, Change, Line, Stood
from jaxnorm._primitives.columns import LINE, Centered, Terms
from jaxnorm._primitives.rows import ROW_TANGENT, Row, RowChange

SHAPE = (4, 6, 8)


@pytest.fixture(autouse=True)
def _same_numbers():
    """Whatever tests ran before."""
    global rng
    rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def line_operands(masked=False):
    axes = Axes.keep(SHAPE, -1)
    small = (1, 1, 8)
    mask = jnp.asarray(rng.random((4, 6, 1)) < 0.7) if masked else None
    fixed = Centered(normal(*SHAPE), mask, normal(*small), normal(*small))
    change = Terms(normal(*SHAPE), normal(*small), normal(*small))
    return LINE, axes, fixed, change


def plain_line_operands():
    """Without the other array, as standardizing by given statistics is."""
    op, axes, fixed, change = line_operands()
    return op, axes, fixed._replace(gain=None), change._replace(array=None)


def tangent_operands():
    axes = Axes.over(SHAPE, (0, 2), 2)
    stats, param = (1, 6, 1), (1, 1, 8)
    mean, residue, rstd, scale = *(normal(*stats) for _ in range(3)), normal(*param)
    line = Line(mean, residue, rstd, scale, None)
    dline = Line(normal(*stats), None, normal(*stats), normal(*param), normal(*param))
    stood = Stood(normal(*SHAPE), None, line)
    return TANGENT, axes, stood, Change(normal(*SHAPE), dline)


def row_operands():
    axes = Axes.over(SHAPE, -1, -1)
    stats, param = (4, 6, 1), (1, 1, 8)
    epsilon = jnp.asarray(0.1, jnp.float32)
    mean, var, residue = (normal(*stats) for _ in range(3))
    scale, residue = normal(*param), 1e-3 * residue
    row = Row(normal(*SHAPE), epsilon, scale, mean, jnp.square(var), residue)
    change = RowChange(normal(*SHAPE), normal(), normal(*param), normal(*param))
    return ROW_TANGENT, axes, row, change


LINEAR = {
    "line": line_operands,
    "masked line": functools.partial(line_operands, True),
    "plain line": plain_line_operands,
    "tangent": tangent_operands,
    "rows": row_operands,
}


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(np.float64(v), np.float64(w)) for v, w in pairs)


def bound(name, implementation=None):
    op, axes, fixed, change = LINEAR[name]()
    reduction = Reduction(axes, True, jnp.dtype("float32"), implementation)
    return op, reduction, fixed, change


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_the_adjoint_is_the_transpose(name, implementation):
    """<A change, cotangents> = <change, A* cotangents>, whatever computes them."""
    op, reduction, fixed, change = bound(name, implementation)
    if name == "rows":  # of which the kernel gives no gradient of epsilon
        change = change._replace(epsilon=None)
    out = op(reduction, fixed, change)
    cotangents = [normal(*v.shape) for v in out]
    pulled = op.pull_back(reduction, fixed, cotangents, change)
    np.testing.assert_allclose(dot(pulled, change), dot(cotangents, out), rtol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_the_primitive_is_its_formula(name):
    op, reduction, fixed, change = bound(name)
    expected = op.formula(reduction, fixed, change)
    found = op(reduction, fixed, change)
    chex.assert_trees_all_close(found, [*expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_derivatives_along_what_is_fixed(name):
    """Of second order for a norm: those of the formula, in both modes."""
    op, reduction, fixed, change = bound(name)
    mask = getattr(fixed, "mask", None)
    moving = [v for v in jax.tree.leaves(fixed) if v.dtype != bool]
    tree = jax.tree.structure(fixed._replace(mask=None) if mask is not None else fixed)

    cotangents = [normal(*v.shape) for v in op(reduction, fixed, change)]

    def of(compute):
        def f(*moving):
            at = jax.tree.unflatten(tree, moving)
            at = at if mask is None else at._replace(mask=mask)
            return [*compute(reduction, at, change)]

        return f

    tangents = tuple(normal(*v.shape) for v in moving)
    for mode in (
        lambda f: jax.jvp(f, (*moving,), tangents)[1],
        lambda f: jax.vjp(f, *moving)[1](cotangents),
    ):
        found, exact = mode(of(op)), mode(of(op.formula))
        for v, w in zip(found, exact, strict=True):
            np.testing.assert_allclose(v, w, atol=2e-6 * np.abs(w).max())


NORMS = {
    "batch": lambda x, scale: jaxnorm.batch_norm(
        x, jaxnorm.init_stats(8), scale, use_running_average=False
    )[0],
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
    "group": functools.partial(jaxnorm.group_norm, num_groups=2),
    "instance": jaxnorm.instance_norm,
    "group first": functools.partial(jaxnorm.group_norm, num_groups=2, axis=1),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (2, 0), (0, 1)])
def test_batches(name, dims):
    """vmap of the gradient is a loop of gradients, wherever the batch lies."""

    def grad(x, scale):
        return jax.grad(lambda *a: jnp.sin(NORMS[name](*a)).sum(), (0, 1))(x, scale)

    arrays = normal(2, 8, 5, 8), normal(8)
    many = [
        v if d is None else jnp.stack([v, v + 1, 2 * v], d)
        for v, d in zip(arrays, dims, strict=True)
    ]

    def one(i):
        pairs = zip(many, dims, strict=True)
        return [v if d is None else jnp.take(v, i, d) for v, d in pairs]

    each = [jax.jit(grad)(*one(i)) for i in range(3)]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *each)
    found = jax.jit(jax.vmap(grad, dims))(*many)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_gradient_is_rounded_once(name, dtype):
    """Where its two parts, of which one is a hundred times the other, cancel; forward
    mode alike."""
    x, scale = normal(4, 8, 16, 8, dtype=dtype), jnp.ones(8)
    dy = jnp.asarray(100 + rng.standard_normal(x.shape), dtype)

    def both(x, dy):
        y, dx = jax.vjp(lambda x: NORMS[name](x, scale), x)
        return dx(dy)[0], jax.jvp(lambda x: NORMS[name](x, scale), (x,), (dy,))[1]

    wide = [v.astype(jnp.float32) for v in (x, dy)]
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    for found, exact in zip(jax.jit(both)(x, dy), jax.jit(both)(*wide), strict=True):
        assert found.dtype == dtype
        largest = np.abs(exact).max()
        assert np.abs(found - exact).max() <= 1.01 * half_ulp * largest


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_rows_of_zeros(name):
    x = jnp.zeros((2, 8, 16, 8), jnp.float16)
    grad = jax.grad(lambda x: NORMS[name](x, jnp.ones(8)).astype(jnp.float32).sum())
    assert np.isfinite(jax.jit(grad)(x)).all()


def test_an_operand_has_the_rank_that_broadcasts():
    for name, make in LINEAR.items():
        _, axes, fixed, change = make()
        for v in jax.tree.leaves((fixed, change)):
            assert v.ndim in (0, len(axes.working_shape)), name


def test_nothing_is_gathered_where_xla_partitions():
    """A kernel would need the whole array on one device: there it is XLA's formula."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(16, 8, 8, 8)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    for norm in NORMS.values():
        grad = jax.jit(jax.grad(lambda x, n=norm: jnp.sin(n(x, jnp.ones(8))).sum()))
        text = str(grad.lower(sharded).compile().as_text())
        assert 'custom_call_target="jaxnorm' not in text
        assert "all-gather" not in text
        chex.assert_trees_all_close(grad(sharded), grad(x), rtol=1e-4, atol=1e-5)


def test_an_export_runs_without_kernels():
    x = normal(4, 8, 5, 8)
    for norm in NORMS.values():
        grad = jax.jit(jax.grad(lambda x, n=norm: jnp.sin(n(x, jnp.ones(8))).sum()))
        for platforms in (["cpu"], ["cpu", "cuda", "tpu"]):
            exported = export.export(grad, platforms=platforms)(x)
            assert "custom_call @jaxnorm" not in exported.mlir_module()
            chex.assert_trees_all_close(exported.call(x), grad(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(library.problem() is not None, reason=str(library.problem()))
def test_vectors_of_vmap_are_rows_of_one_array():
    """Though each has the shape of its parameters."""
    x, param = jnp.ones((64, 32)), jnp.ones(32)

    def loss(x, scale, bias):
        return jax.vmap(lambda v: jaxnorm.layer_norm(v, scale, bias))(x).sum()

    found = models.implementations(jax.grad(loss, (0, 1, 2)), x, param, param)
    assert [v.shape for v in found if v.kernel] == [x.shape] * 2


@pytest.mark.parametrize("way", ["by kernels", "by the formula"])
def test_vectors_of_vmap_share_a_cotangent_that_is_not_mapped(way):
    """It has x's shape, which a parameter of a vector has, too."""
    x, dy = normal(6, 32), normal(32)
    how = {} if way == "by kernels" else {"implementation": "xla"}

    def gradient(x, scale, bias):
        norm = functools.partial(jaxnorm.layer_norm, **how)
        return jax.vjp(norm, x, scale, bias)[1](dy)

    params = jnp.ones(32), jnp.zeros(32)
    found = jax.vmap(gradient, (0, None, None))(x, *params)
    alone = [gradient(row, *params) for row in x]
    for got, want in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-6)


def test_implementations_say_what_is_taken_and_why():
    x = jax.ShapeDtypeStruct((4, 5, 8, 8), jnp.complex64)
    said = str(models.implementations(lambda x: jaxnorm.layer_norm(x), x))
    assert said.startswith("row_norm of complex64 4x5x8x8: XLA's formula, as ")
    assert "complex64" in said.partition("as ")[2]
    real = jax.ShapeDtypeStruct((4, 5, 8, 8), jnp.float32)
    twice = models.implementations(
        jax.jit(lambda x: NORMS["instance"](NORMS["instance"](x, jnp.ones(8)), None)),
        real,
    )
    assert [v.operation for v in twice] == ["moments", "line"]
    assert [v.times for v in twice] == [2, 2]
    asked = models.implementations(
        lambda x: jaxnorm.LayerNorm(implementation="xla")(x, {}, {})[0], real
    )
    assert "asks for XLA's formula" in str(asked)
    assert str(models.implementations(jnp.sin, real)) == "nothing is normalized"


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_platform_lowers_every_operation(platform):
    for name in LINEAR:
        op, reduction, fixed, change = bound(name)
        f = functools.partial(op, reduction)
        text = jax.jit(f).trace(fixed, change).lower(lowering_platforms=(platform,))
        assert "stablehlo" in text.as_text()
    assert rows.ROW_NORM.primitive.name == "jaxnorm_row_norm"


def test_a_batch_of_epsilons():
    x, epsilons = normal(3, 8), jnp.asarray([1e-3, 0.1, 1.0])

    def f(x, epsilon):
        m = jaxnorm.normalize(x, {}, Axes.over(x.shape, -1, -1), epsilon=epsilon)[0]
        return jnp.sin(m).sum()

    each = [jax.jit(jax.grad(f, (0, 1)))(x, e) for e in epsilons]
    expected = jax.tree.map(lambda *v: jnp.stack(v), *each)
    found = jax.jit(jax.vmap(jax.grad(f, (0, 1)), (None, 0)))(x, epsilons)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_several_last_features_are_rows(center):
    """As one axis of all of them, with the derivatives of that."""
    x, scale, bias = normal(3, 4, 5, 6), normal(5, 6), normal(5, 6)
    both, one = Axes.over(x.shape, (2, 3), (2, 3)), Axes.over((3, 4, 30), 2, 2)

    def by(axes, *arrays):
        shaped = [v.reshape(*v.shape[:-2], *axes.feature_shape) for v in arrays]
        params = {"scale": shaped[1], "bias": shaped[2]}
        settings = {"epsilon": 1e-3, "center": center}
        y, m = jaxnorm.normalize(shaped[0], params, axes, **settings)
        assert m.mean.shape == axes.stats_shape
        return y.reshape(x.shape), m.var.reshape(3, 4)

    def all_of(axes):
        f = functools.partial(by, axes)
        arrays = x, scale, bias
        y, pull = jax.vjp(f, *arrays)
        return y, pull((jnp.cos(x), jnp.ones((3, 4)))), jax.jvp(f, arrays, arrays)

    chex.assert_trees_all_close(all_of(both), all_of(one), rtol=1e-5, atol=1e-5)
    said = models.implementations(functools.partial(by, both), x, scale, bias)
    assert [v.operation for v in said] == ["row_norm"]
