"""Running statistics: their values step by step, and what never touches them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from norms import MOMENTS as NORMS
from norms import RUNNING, assert_close, changed, problem

import jaxnorm
from jaxnorm import _running as running
from jaxnorm._axes import Axes
from jaxnorm._moments import Moments

pytestmark = pytest.mark.usefixtures("strict_dtypes")
every_running = pytest.mark.parametrize("name", RUNNING)


def per_feature(row, x, mask=None):
    """The moments of the whole batch, feature by feature, in float64."""
    axis = row.norm.axes(x.shape).feature
    ref = reference.batch_norm(np.asarray(x), axis=axis, mask=mask)
    first = tuple(slice(None) if a in axis else 0 for a in range(x.ndim))
    return reference.Moments(ref.mean[first], ref.var[first], ref.size[first])


@every_running
@pytest.mark.parametrize(
    "momentum, unbiased", [(0.9, True), (0.0, False), (None, False), (None, True)]
)
def test_values_step_by_step(name, momentum, unbiased):
    row = RUNNING[name]
    norm = changed(row.norm, momentum=momentum, unbiased=unbiased)
    step = jax.jit(lambda x, stats, mask: norm(x, {}, stats, mask=mask)[1])
    stats = norm.init_stats(problem(row).params["scale"].shape)
    ref = {k: np.asarray(v, np.float64) for k, v in stats.items()}
    for seed in range(4):
        # Far from zero from the very first step on, when the running mean is still 0.
        p = problem(row, seed=seed, offset=1e4)
        stats = step(p.x, stats, p.mask)
        ref = reference.running(
            ref, per_feature(row, p.x, p.mask), momentum=momentum, unbiased=unbiased
        )
        assert stats.keys() == ref.keys()
        for k, v in stats.items():
            np.testing.assert_allclose(v, ref[k], rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def moved_by_all(momentum, stats, means, variances):
    """The statistics after batches of these moments."""
    axes = Axes.keep((2, means.shape[1]), -1)

    def step(stats, each):
        mean, var = (v[None] for v in each)
        m = Moments(mean, var, 2)
        return running.update_stats(stats, m, axes, momentum=momentum), None

    return jax.lax.scan(step, stats, (means, variances))[0]


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, None])
@pytest.mark.parametrize("size", [4, 256, 10**6])
def test_running_means_do_not_stand_still(momentum, size):
    """Means far from 0, of batches of this size and of deviation 1, where most steps
    are below the spacing of the numbers."""
    rng = np.random.default_rng(0)
    far = 1e4 * rng.uniform(0.7, 1.3, 64)
    noise = rng.normal(size=(10_000, 64)) / np.sqrt(size)
    means = (far + noise).astype(np.float32)
    variances = (1 + rng.normal(size=means.shape) * 0.5 / np.sqrt(size)) ** 2
    stats = jaxnorm.init_stats(64, momentum=momentum)
    stats |= {"mean": jnp.asarray(far + rng.normal(size=64), jnp.float32)}
    new = moved_by_all(momentum, stats, means, variances.astype(np.float32))
    exact, flax = np.asarray(stats["mean"], np.float64), np.asarray(stats["mean"])
    for i, mean in enumerate(means):
        keep = i / (i + 1) if momentum is None else momentum
        exact = keep * exact + (1 - keep) * mean.astype(np.float64)
        flax = np.float32(keep) * flax + np.float32(1 - keep) * mean
    apart = np.sqrt(np.mean((np.asarray(new["mean"], np.float64) - exact) ** 2))
    assert apart < max(0.5 * np.sqrt(np.mean((flax - exact) ** 2)), 1e-3)
    # Of each step lost or taken whole, half the spacing, as a random walk.
    spacing = 2.0**-10
    noise = (
        spacing / 2 * np.sqrt(len(means) if momentum is None else 1 / (1 - momentum))
    )
    assert apart < noise + spacing


def test_a_batch_that_is_repeated_is_neared_to_half_a_step():
    far = 1e4 + np.linspace(-1, 1, 64, dtype=np.float32)
    means = np.broadcast_to(far, (5000, 64))
    stats = jaxnorm.init_stats(64) | {"mean": jnp.full(64, 1e4, jnp.float32)}
    new = moved_by_all(0.999, stats, means, np.ones_like(means))
    assert abs(new["mean"] - far).max() <= 0.5 * 2.0**-10 / (1 - 0.999)


def test_the_average_of_all_batches_is_of_very_many():
    """The share of one batch is right far beyond what 1 - keep would resolve."""
    stats = {"mean": jnp.zeros(1), "var": jnp.ones(1), "count": jnp.array([10**7])}
    new = moved_by_all(None, stats, np.ones((1, 1), np.float32), np.ones((1, 1)))
    np.testing.assert_allclose(new["mean"], 1 / (10**7 + 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_the_ends_of_a_blend_are_exact(dtype):
    old, new = (jnp.array(v, dtype) for v in ([1e30, 1, 0], [1, 1e4 + 1 / 3, 5e-30]))
    for keep, end in ((0, new), (1, old), (0.0, new), (jnp.array(1.0), old)):
        np.testing.assert_array_equal(running.moving_average(old, new, keep), end)
    np.testing.assert_array_equal(
        running.moving_average(old[1:2], 3 * old[1:2], 0.25), 2.5
    )


@pytest.mark.parametrize("name", ["batch", "ghost"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_scan_over_steps_keeps_structure_and_dtypes(name, momentum):
    row = RUNNING[name]
    norm = changed(row.norm, momentum=momentum)
    for dtype in (jnp.float32, jnp.bfloat16):
        batches = np.stack([problem(row, seed=s, dtype=dtype).x for s in range(3)])
        stats = norm.init_stats(problem(row).params["scale"].shape)
        last, ys = jax.lax.scan(lambda s, x: norm(x, {}, s)[::-1], stats, batches)
        for k, v in stats.items():
            assert last[k].dtype == v.dtype and last[k].shape == v.shape
        step = jax.jit(norm)
        for x in batches:
            _, stats = step(x, {}, stats)
        jax.tree.map(assert_close, last, stats)
        assert ys.dtype == dtype
    with jax.enable_x64(True):
        wide = batches.astype(np.float64)
        stats = norm.init_stats(stats["mean"].shape)
        last, _ = jax.lax.scan(lambda s, x: norm(x, {}, s)[::-1], stats, wide)
        assert last["mean"].dtype == last["var"].dtype == jnp.float32


@every_running
def test_a_batch_that_is_not_finite_leaves_the_state(name):
    row = RUNNING[name]
    for momentum in (0.9, None):
        norm = changed(row.norm, momentum=momentum)
        step = jax.jit(norm)
        p = problem(row)
        _, stats = step(p.x, p.params, norm.init_stats(p.params["scale"].shape))
        for bad in (np.nan, np.inf, -np.inf):
            x = p.x.copy()
            x[(1,) * x.ndim] = bad
            y, new = step(x, p.params, stats)
            assert not np.isfinite(y).all()  # the batch is bad, and shows it
            jax.tree.map(np.testing.assert_array_equal, new, stats)


@every_running
def test_sums_that_overflow_leave_the_state(name):
    row = RUNNING[name]
    p = problem(row)
    _, new = jax.jit(row.norm)(p.x * 1e30, p.params, p.stats)
    jax.tree.map(np.testing.assert_array_equal, new, p.stats)


@every_running
def test_an_empty_batch_leaves_the_state(name):
    row = RUNNING[name]
    p = problem(row)
    y, new = jax.jit(row.norm)(p.x[:0], p.params, p.stats)
    assert y.shape == (0, *row.shape[1:])
    jax.tree.map(np.testing.assert_array_equal, new, p.stats)


@pytest.mark.parametrize("name", ["batch", "batch_first"])
def test_features_with_fewer_than_two_values_keep_their_state(name):
    row = RUNNING[name]
    p = problem(row)
    axis = row.norm.axes(row.shape).feature[0]
    mask = np.zeros(row.shape, bool)
    by_feature = np.moveaxis(mask, axis, 0)
    by_feature[0, 3, 1, 1] = True  # one value; feature 1 has none; the others have all
    by_feature[2:] = True
    _, new = jax.jit(row.norm)(p.x, p.params, p.stats, mask=mask)
    for k, v in new.items():
        np.testing.assert_array_equal(v[:2], p.stats[k][:2])
        assert (v[2:] != p.stats[k][2:]).all()


@every_running
def test_evaluation_uses_the_state_and_leaves_it(name):
    row = RUNNING[name]
    p = problem(row)
    rng = np.random.default_rng(3)
    features = p.params["scale"].shape
    stats = {
        "mean": jnp.asarray(rng.normal(size=features), jnp.float32),
        "var": jnp.asarray(rng.uniform(0.1, 3, size=features), jnp.float32),
    }
    call = jax.jit(functools.partial(row.norm, use_running_average=True))
    y, new = call(p.x, p.params, stats)
    jax.tree.map(np.testing.assert_array_equal, new, stats)
    axes = row.norm.axes(row.shape)
    mean, var, scale, bias = (
        np.asarray(v, np.float64).reshape(axes.param_shape())
        for v in (stats["mean"], stats["var"], p.params["scale"], p.params["bias"])
    )
    exact = (np.asarray(p.x) - mean) / np.sqrt(var + row.norm.epsilon) * scale + bias
    assert_close(y, exact, size=10)
    # One example is enough, whatever the method does in training.
    one, _ = call(p.x[:1], p.params, stats)
    assert_close(one, exact[:1], size=10)


@every_running
def test_use_running_average_may_be_traced(name):
    row = RUNNING[name]
    p = problem(row)
    weights = p.cotangent

    def f(x, params, flag):
        y, stats = row.norm(x, params, p.stats, use_running_average=flag, mask=p.mask)
        return (y * weights).sum(), (y, stats)

    grad = jax.value_and_grad(f, (0, 1), has_aux=True)
    traced = jax.jit(grad)
    for flag in (True, False):
        known = jax.jit(functools.partial(grad, flag=flag))(p.x, p.params)
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=10),
            traced(p.x, p.params, flag),
            known,
        )
    with pytest.raises(TypeError, match="must be a boolean scalar, got int32"):
        jax.jit(f)(p.x, p.params, 1)


@every_running
def test_no_gradient_reaches_the_state(name):
    row = RUNNING[name]
    p = problem(row)

    def f(x):
        return sum(v.sum() for v in row.norm(x, p.params, p.stats)[1].values())

    np.testing.assert_array_equal(jax.jit(jax.grad(f))(p.x), 0)


def test_the_number_of_the_batch_is_the_global_masked_one():
    """The unbiased variance counts the valid elements, not the padded ones."""
    x = jnp.asarray([[1.0], [3.0], [100.0], [100.0]])
    mask = jnp.asarray([[True], [True], [False], [False]])
    _, stats = jaxnorm.batch_norm(
        x,
        jaxnorm.init_stats(1),
        use_running_average=False,
        momentum=0.0,
        unbiased=True,
        mask=mask,
    )
    assert stats["var"] == 2.0


@pytest.mark.parametrize("name", [n for n, r in NORMS.items() if r.lone])
def test_one_value_per_variance_raises(name):
    row = NORMS[name]
    p = problem(row, row.lone)
    message = "would take each variance of one single value"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: row.norm(x, p.params, p.stats), p.x)
    if row.norm.has_stats:
        y, _ = row.norm(p.x, p.params, p.stats, use_running_average=True)
        assert np.isfinite(y).all()


def test_one_value_per_virtual_batch_raises():
    norm = jaxnorm.GhostBatchNorm(size=1)
    with pytest.raises(ValueError, match="size=1 leaves one value per variance"):
        norm(jnp.ones((4, 3)), {}, norm.init_stats((3,)))


def test_momentum_none_needs_a_count():
    with pytest.raises(ValueError, match=r"stats lacks \['count'\].*momentum=None"):
        jaxnorm.batch_norm(
            jnp.ones((4, 3)),
            jaxnorm.init_stats(3),
            use_running_average=False,
            momentum=None,
        )
