"""Values, statistics and derivatives of every norm against the float64 reference."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import MOMENTS as NORMS
from norms import (
    RUNNING,
    STATEFUL,
    assert_close,
    changed,
    expected,
    implied,
    initial_stats,
    problem,
    spread,
    tolerance,
)

import jaxnorm
from jaxnorm._axes import Axes
from jaxnorm._primitives._moment_formulas import about_a_pivot

pytestmark = pytest.mark.usefixtures("strict_dtypes")
every_norm = pytest.mark.parametrize("name", NORMS)


def output(norm, x, params, stats, mask=None):
    return norm(x, params, stats, mask=mask)[0]


@pytest.mark.optimized
@every_norm
@pytest.mark.parametrize("masked", [False, True])
def test_values_match_the_reference(name, masked):
    row = NORMS[name]
    p = problem(row)
    mask = p.mask if masked else None
    ref = expected(row, p.x, p.params, mask)
    y, _ = jax.jit(row.norm)(p.x, p.params, p.stats, mask=mask)
    assert y.dtype == p.x.dtype and y.shape == row.shape
    # A variance of a few nearby values magnifies the rounding of their mean.
    size = 1 + np.max(ref.size * np.abs(ref.mean) / np.sqrt(ref.var + 1e-5))
    assert_close(y, ref.y, summed=ref.size.max(), size=size)
    valid = np.broadcast_to(True if mask is None else mask, row.shape)
    for actual, desired in zip(spread(row.norm, p.x, mask), ref[1:], strict=True):
        assert_close(np.asarray(actual)[valid], desired[valid], summed=ref.size.max())


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name, dtype",
    [(n, jnp.bfloat16) for n in NORMS] + [(n, jnp.float16) for n in ("batch", "layer")],
)
def test_half_precision_rounds_only_the_result(name, dtype):
    row = NORMS[name]
    p = problem(row, dtype=dtype)
    y, stats = jax.jit(row.norm)(p.x, p.params, p.stats)
    assert y.dtype == dtype
    assert all(v.dtype == jnp.float32 for v in stats.values())
    assert all(v.dtype == jnp.float32 for v in spread(row.norm, p.x)[:2])
    exact = expected(row, np.asarray(p.x, np.float64), p.params).y
    one_rounding = float(jnp.finfo(dtype).eps) / 2 + tolerance(jnp.float32, p.x.size)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), exact, rtol=one_rounding, atol=one_rounding
    )
    wide, _ = jax.jit(functools.partial(row.norm, dtype=jnp.float32))(
        p.x, p.params, p.stats
    )
    assert wide.dtype == jnp.float32
    assert_close(wide, exact, summed=p.x.size)


@pytest.mark.optimized
@every_norm
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_variance_is_exact_far_from_zero(name, offset, masked):
    row = NORMS[name]
    shape = tuple(4 * n for n in row.shape)
    p = problem(row, shape, offset=offset)
    mask = p.mask if masked else None
    _, var, _ = spread(row.norm, p.x, mask)
    ref = expected(row, p.x, p.params, mask)
    defined = (ref.size > 1) & (ref.var > 0)
    np.testing.assert_allclose(var[defined], ref.var[defined], rtol=1e-5)


@pytest.mark.optimized
def test_variance_is_exact_whatever_the_order_of_the_batch():
    """The first rows are far from the others: a pivot on them alone would not do."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 3)).astype(np.float32) + np.float32(1e4)
    axes = jaxnorm.BatchNorm().axes(x.shape)
    for rows in (slice(0, 1), slice(0, 16), slice(0, 2048), slice(0, None, 16)):
        y = x.copy()
        y[rows] = 0
        var = jax.jit(lambda v: jaxnorm.moments(v, axes).var)(y)
        np.testing.assert_allclose(var[0], y.astype(np.float64).var(0), rtol=1e-5)


@every_norm
def test_float16_of_large_spread(name):
    row = NORMS[name]
    p = problem(row)
    x = (p.x * 300).astype(np.float16)
    y, stats = jax.jit(row.norm)(x, {}, p.stats)
    assert_close(y, expected(row, np.asarray(x, np.float64), {}).y, dtype=jnp.float16)
    assert all(np.isfinite(v).all() for v in stats.values())


@every_norm
def test_constant_input_gives_zeros_and_finite_gradients(name):
    row = NORMS[name]
    if not row.norm.center:
        pytest.skip("nothing is subtracted: a constant gives plus or minus one")
    p = problem(row)

    @jax.jit
    def both(x):
        y, vjp = jax.vjp(lambda x: output(row.norm, x, {}, p.stats), x)
        return y, vjp(p.cotangent)[0]

    for value in (0.0, 5144.123, -1e4 / 3):
        y, dx = both(np.full(row.shape, value, np.float32))
        np.testing.assert_array_equal(y, 0)
        assert np.isfinite(dx).all()


def assert_derivatives(f, x, v, tol):
    """First and second derivatives of scalar `f` along `v`, in every mode, against
    differences of `f` and of its gradient."""
    step = 1e-5
    f, grad = jax.jit(f), jax.jit(jax.grad(f))
    move = functools.partial(jax.tree.map, lambda a, b, t: a + t * b, x, v)
    ahead, behind = (move(jax.tree.map(lambda _, t=t: t, x)) for t in (step, -step))
    slope = (f(ahead) - f(behind)) / (2 * step)

    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), a, b)))

    forward = jax.jit(lambda x: jax.jvp(f, (x,), (v,))[1])
    np.testing.assert_allclose(forward(x), slope, rtol=tol, atol=tol)
    np.testing.assert_allclose(dot(grad(x), v), slope, rtol=tol, atol=tol)
    bend = jax.tree.map(lambda a, b: (a - b) / (2 * step), grad(ahead), grad(behind))
    over_reverse = jax.jit(lambda x: jax.jvp(grad, (x,), (v,))[1])(x)
    twice_reverse = jax.jit(jax.grad(lambda x: dot(grad(x), v)))(x)
    over_forward = jax.jit(jax.grad(forward))(x)
    for second in (over_reverse, twice_reverse, over_forward):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol),
            second,
            bend,
        )


@pytest.mark.parametrize(
    "name, masked",
    [(n, False) for n in ("batch", "layer", "rms", "group", "ghost")]
    + [("batch", True)],
)
def test_derivatives_of_every_mode_and_order(name, masked):
    row = NORMS[name]
    with jax.enable_x64(True):
        p, q = (problem(row, dtype=jnp.float64, seed=s) for s in (0, 1))
        wide = functools.partial(jax.tree.map, lambda v: v.astype(np.float64))
        x, v = (
            {"x": r.x, "params": wide(r.params), "epsilon": e}
            for r, e in ((p, np.float64(0.1)), (q, np.float64(1)))
        )
        weights = p.cotangent.astype(np.float64)
        mask = p.mask if masked else None

        def f(a):
            norm = changed(row.norm, epsilon=a["epsilon"])
            y = output(norm, a["x"], a["params"], p.stats, mask)
            return (y * weights).sum()

        assert_derivatives(f, x, v, 1e-4)


@pytest.mark.parametrize(
    "name, masked", [("batch", True), ("rms", False), ("ghost", False)]
)
def test_derivatives_of_the_moments_alone(name, masked):
    row = NORMS[name]
    with jax.enable_x64(True):
        p, q = (problem(row, dtype=jnp.float64, seed=s) for s in (0, 1))

        def f(x):
            mean, var, _ = spread(row.norm, x, p.mask if masked else None)
            return ((mean + var * var) * p.cotangent.astype(np.float64)).sum()

        assert_derivatives(f, p.x, q.x, 1e-5)


@pytest.mark.parametrize(
    "name", ["batch", "layer", "rms", "group", "instance_first", "ghost"]
)
def test_transformations_change_nothing(name):
    row = NORMS[name]
    p = problem(row)
    weights = p.cotangent

    def loss(x, params):
        return (output(row.norm, x, params, p.stats) * weights).sum()

    grad = jax.grad(loss, (0, 1))
    plain = jax.jit(grad)(p.x, p.params)
    close = functools.partial(assert_close, summed=p.x.size, size=10)
    remat = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))
    jax.tree.map(close, remat(p.x, p.params), plain)
    batch = np.stack([p.x, p.x * 2 + 1, -p.x])
    mapped = jax.jit(jax.vmap(grad, (0, None)))(batch, p.params)
    looped = [jax.jit(grad)(x, p.params) for x in batch]
    jax.tree.map(lambda m, *each: close(m, np.stack(each)), mapped, *looped)


@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_eager_equals_jit(name):
    row = NORMS[name]
    p = problem(row)

    def both(x, params):
        y, vjp = jax.vjp(
            lambda x, q: output(row.norm, x, q, p.stats, p.mask), x, params
        )
        return y, vjp(p.cotangent)

    close = functools.partial(assert_close, summed=p.x.size, size=10)
    jax.tree.map(close, both(p.x, p.params), jax.jit(both)(p.x, p.params))


@every_norm
def test_one_trace_per_shape(name):
    row = NORMS[name]
    p = problem(row)

    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(norm, x, params, stats, mask):
        return norm(x, params, stats, mask=mask)

    for seed in range(3):
        q = problem(row, seed=seed)
        # An equal value, not the same one: settings are compared, not identified.
        norm = type(row.norm)(**vars(row.norm))
        _, stats = step(norm, q.x, q.params, p.stats, q.mask)
        step(row.norm, q.x, q.params, stats, q.mask)


@every_norm
def test_scale_and_bias_per_example(name):
    row = NORMS[name]
    p = problem(row)
    if 0 in row.norm.axes(row.shape).feature:
        pytest.skip("the features include the batch")
    rng = np.random.default_rng(1)
    params = {
        k: rng.normal(size=(row.shape[0], *v.shape)).astype(np.float32)
        for k, v in p.params.items()
    }
    y, _ = jax.jit(row.norm)(p.x, params, p.stats)
    assert_close(y, expected(row, p.x, params).y, summed=p.x.size, size=4)


@every_norm
def test_integers_are_read_as_float32(name):
    row = NORMS[name]
    p = problem(row)
    x = np.round(p.x * 10).astype(np.int32)
    call = jax.jit(row.norm)
    y, _ = call(x, {}, p.stats)
    assert y.dtype == jnp.float32
    assert_close(y, call(x.astype(np.float32), {}, p.stats)[0])


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "ghost"])
def test_complex_inputs(name):
    row = NORMS[name]
    p = problem(row)
    x = (p.x + 1j * problem(row, seed=1).x).astype(np.complex64)
    features = row.norm.axes(row.shape).feature_shape
    stats = initial_stats(row.norm, features, jnp.complex64)
    y, new = jax.jit(row.norm)(x, {}, stats, mask=p.mask)
    ref = expected(row, x, {}, p.mask)
    tol = tolerance(jnp.float32, p.x.size) * 10
    np.testing.assert_allclose(y, ref.y, rtol=tol, atol=tol)
    assert [v.dtype for v in new.values()] == [v.dtype for v in stats.values()]
    if row.norm.has_stats:
        with pytest.raises(TypeError, match="cannot hold the mean of a complex input"):
            row.norm(x, {}, p.stats)


@pytest.mark.optimized
def test_counts_are_exact_past_the_integers_of_float32():
    valid = 2**24 + 3
    mask = jnp.arange(2**25).reshape(-1, 1) < valid
    axes = jaxnorm.BatchNorm().axes(mask.shape)
    m = jax.jit(lambda x, mask: jaxnorm.moments(x, axes, mask=mask))(
        jnp.ones(mask.shape, jnp.bfloat16), mask
    )
    assert m.size == valid and m.mean == 1 and m.var == 0
    both = jax.jit(lambda m: jaxnorm.pool(m, lambda v: v.sum(0, keepdims=True)))(
        jaxnorm.Moments(*(jnp.concatenate([v, v]) for v in m))
    )
    assert both.size == 2 * valid


def test_published_worked_examples():
    path = pathlib.Path(__file__).with_name("worked_examples.json")
    examples = json.loads(path.read_text())["examples"]
    assert len(examples) == 2
    for example in examples:
        axis = example["layout"].index("C")
        x = jnp.asarray(example["x"])
        y, _ = jaxnorm.batch_norm(
            x,
            jaxnorm.init_stats(x.shape[axis]),
            use_running_average=False,
            axis=axis,
            epsilon=example["epsilon"],
        )
        # Inputs and outputs are printed to 4 decimals.
        np.testing.assert_allclose(y, example["y"], atol=2e-4)


def test_pooling_sets_is_the_moments_of_their_union():
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=n) + 1e4 for n in (5, 1, 0, 40)]
    with jax.enable_x64(True):
        mean, var = (
            jnp.asarray([f(v) if v.size else 0.0 for v in sets])
            for f in (np.mean, np.var)
        )
        size = jnp.asarray([v.size for v in sets])
        pooled = jaxnorm.pool(
            jaxnorm.Moments(mean, var, size), lambda v: v.sum(0, keepdims=True)
        )
        whole = np.concatenate(sets)
        assert pooled.size == whole.size
        np.testing.assert_allclose(pooled.mean, whole.mean(), rtol=1e-14)
        np.testing.assert_allclose(pooled.var, whole.var(), rtol=1e-10)


def test_moments_about_a_pivot_of_nothing_are_zero():
    """What runs where there is no CPU: an empty shard that still has positions."""
    axes = Axes.keep((0, 5, 3), -1)
    for value in about_a_pivot(axes, jnp.zeros(axes.shape)):
        np.testing.assert_array_equal(value, np.zeros((1, 1, 3)))


@pytest.mark.optimized
@pytest.mark.parametrize("name", [n for n in STATEFUL if n not in RUNNING])
def test_the_state_is_exact_far_from_zero(name):
    """Whatever the method keeps, in float32, of numbers around 1e4."""
    row = STATEFUL[name]
    if not row.norm.center:
        pytest.skip("nothing is subtracted: mean squares, not variances")
    norm = changed(row.norm, momentum=0.0)
    shape = (8, *(4 * n for n in row.shape[1:-1]), row.shape[-1])
    p = problem(row, shape, offset=1e4)

    @jax.jit
    def call(x):
        return norm(x, {}, p.stats, **row.inputs(x))[1]

    settings = {"momentum": 0.0, **row.inputs(p.x)}
    _, exact = row.exact(p.x, implied(row), p.stats, **settings)
    for k, v in call(p.x).items():
        if k in ("mean", "var"):
            np.testing.assert_allclose(v, exact[k], rtol=1e-5)


@pytest.mark.parametrize("center", [True, False])
def test_tangents_of_complex_moments(center):
    """d var = 2 / n * the real part of sum(conj(x - mean) * dx)."""
    rng = np.random.default_rng(0)
    x, dx = (v @ [1, 1j] for v in rng.standard_normal((2, 50, 3, 2)))
    axes = Axes.keep(x.shape, -1)

    def both(x):
        m = jaxnorm.moments(x, axes, center=center)
        return m.mean, m.var

    primal, tangent = (jnp.asarray(v, jnp.complex64) for v in (x, dx))
    _, (dmean, dvar) = jax.jvp(both, (primal,), (tangent,))
    away = x - x.mean(0) if center else x
    exact = 2 * (away.conj() * dx).real.mean(0)
    np.testing.assert_allclose(dvar[0], exact, rtol=1e-5, atol=1e-6)
    expected = dx.mean(0) if center else 0
    np.testing.assert_allclose(dmean[0], expected + np.zeros(3), rtol=1e-5, atol=1e-6)
