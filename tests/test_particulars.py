"""What single methods promise beyond what all of them keep."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_methods as methods
from flax import nnx
from norms import assert_close, cross_iteration

import jaxnorm
from jaxnorm import nnx as jx

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_renorm_without_room_is_batch_norm():
    x, stats = numbers(8, 3), {"mean": numbers(3), "var": np.full(3, 2, np.float32)}
    for flag in (False, True):
        pair = [
            norm(x, {}, stats, use_running_average=flag)
            for norm in (jaxnorm.BatchRenorm(rmax=1.0, dmax=0.0), jaxnorm.BatchNorm())
        ]
        jax.tree.map(functools.partial(assert_close, summed=8, size=4), *pair)


def test_renorm_limits_may_be_traced_or_scheduled():
    x, stats = numbers(8, 3) * 5, {"mean": numbers(3), "var": np.ones(3, np.float32)}
    call = functools.partial(jaxnorm.batch_renorm, x, use_running_average=False)
    traced = jax.jit(lambda r, d: call(stats, rmax=r, dmax=d)[0])
    for r, d in ((1.0, 0.0), (1.5, 0.2)):
        assert_close(traced(r, d), call(stats, rmax=r, dmax=d)[0], size=10)
    rmax = optax.linear_schedule(1.0, 3.0, 4)
    norm = jaxnorm.BatchRenorm(rmax=rmax, dmax=lambda step: step.astype(float) / 2)
    state = norm.init_stats((3,)) | stats
    step = jax.jit(lambda x, state: norm(x, {}, state))
    for i in range(3):
        assert state["step"] == i
        y, new = step(x, state)
        exact, _ = methods.batch_renorm(x, {}, state, rmax=1 + 0.5 * i, dmax=0.5 * i)
        assert_close(y, exact, summed=8, size=10)
        # A batch that is not finite is no step.
        assert step(np.full_like(x, np.nan), state)[1]["step"] == i
        state = new
    with pytest.raises(ValueError, match=r"stats lacks \['step'\]"):
        norm(x, {}, stats)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ghost_batches_are_devices(count):
    """Virtual batches of g on one device, as groups of g rows over D devices."""
    x = numbers(16, 5)
    ghost = jaxnorm.GhostBatchNorm(size=16 // count)
    stats = ghost.init_stats((5,))
    y, _ = jax.jit(ghost)(x, {}, stats)
    alone = jax.jit(jax.vmap(lambda x: jaxnorm.BatchNorm()(x, {}, stats)[0]))
    assert_close(y.reshape(count, -1, 5), alone(x.reshape(count, -1, 5)), size=4)


def test_a_stream_of_single_examples_is_a_batch():
    """Statistics, outputs, gradients and controls of n batches of one and one of n."""
    norm = jaxnorm.OnlineNorm(momentum=0.9, control_momentum=0.8)
    x, cotangent = numbers(4, 3, 2), numbers(4, 3, 2, seed=1)
    params = norm.init_params((2,)) | {"control_mean": numbers(2, seed=2)}

    @jax.jit
    def step(x, params, stats, cotangent):
        y, pull, stats = jax.vjp(
            lambda x, p: norm(x, p, stats), x, params, has_aux=True
        )
        return y, stats, *pull(cotangent)

    start = norm.init_stats((2,))
    y, stats, dx, dparams = step(x, params, start, cotangent)
    state, held, each = start, dict(params), []
    for i in range(4):
        one, state, grad, grads = step(x[i : i + 1], held, state, cotangent[i : i + 1])
        for k in ("control_product", "control_mean"):
            held[k] = held[k] - grads[k]
        each.append((one[0], grad[0]))
    close = functools.partial(assert_close, summed=24, size=10)
    close(y, np.stack([v for v, _ in each]))
    close(dx, np.stack([v for _, v in each]))
    jax.tree.map(close, stats, state)
    for k in ("control_product", "control_mean"):
        close(params[k] - dparams[k], held[k])


def test_moving_averages_over_many_batches():
    """Forwards and backwards, through the filling of the buffers and past it."""
    norm = jaxnorm.MovingAverageBatchNorm(window=2, momentum=0.7)
    params: dict[str, Any] = dict(norm.init_params((3,)))
    stats: Any = norm.init_stats((3,))

    @jax.jit
    def step(x, params, stats, cotangent):
        y, pull, new = jax.vjp(lambda x, p: norm(x, p, stats), x, params, has_aux=True)
        return y, new, *pull(cotangent)

    exact_stats, exact = stats, dict(params)
    for i in range(5):
        x, ct = (2 + i) * numbers(8, 3, seed=i), numbers(8, 3, seed=10 + i)
        y, stats, dx, grads = step(x, params, stats, ct)
        params["control"] = params["control"] - grads["control"]
        settings = {"window": 2, "momentum": 0.7}
        back = methods.moving_average_batch_norm_backward(
            x, exact, exact_stats, ct, **settings
        )
        y_exact, exact_stats = methods.moving_average_batch_norm(
            x, exact, exact_stats, **settings
        )
        exact["control"] = back["new_control"]
        close = functools.partial(assert_close, summed=24, size=4)
        close(y, y_exact)
        close(dx, back["x"])
        close(params["control"], exact["control"])
        jax.tree.map(close, stats, dict(exact_stats))


def test_cross_iteration_follows_a_kernel_that_changes():
    norm = jaxnorm.CrossIterationBatchNorm(window=3, kernel_shape=(4, 3), momentum=0.7)
    stats: Any = norm.init_stats((3,))
    exact = stats

    @jax.jit
    def step(inputs, kernel, stats):
        def layer(kernel):
            return inputs @ kernel

        def f(kernel):
            return norm(layer(kernel), {}, stats, kernel=kernel, layer=layer)

        y, pull, new = jax.vjp(f, kernel, has_aux=True)
        return y, new, pull(jnp.cos(y))[0]

    with jax.enable_x64(True):
        for i in range(4):
            inputs = numbers(8, 4, seed=i).astype(np.float64)
            kernel = 1 + 0.3 * numbers(4, 3, seed=10 + i).astype(np.float64)
            settings = {"window": 3, "momentum": 0.7}
            settings |= {"kernel": kernel, "layer": lambda k, v=inputs: v @ k}
            y, stats, grad = step(inputs, kernel, stats)
            call = functools.partial(cross_iteration, params={}, stats=exact)
            y_exact, new = call(inputs @ kernel, **settings)
            # Gradients go through x alone: the history is fixed.
            way = numbers(4, 3, seed=20).astype(np.float64)
            ahead, behind = (
                call(inputs @ (kernel + t * way), **settings)[0] for t in (1e-5, -1e-5)
            )
            slope = (np.cos(y_exact) * (ahead - behind) / 2e-5).sum()
            np.testing.assert_allclose(y, y_exact, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose((grad * way).sum(), slope, rtol=1e-5, atol=1e-5)
            exact = new
            for k, v in stats.items():
                # The statistics are kept in float32.
                assert_close(v, new[k], summed=8, size=10)


def test_recurrent_statistics_in_a_scan():
    norm = jaxnorm.RecurrentBatchNorm(max_steps=3, momentum=0.0)
    xs = numbers(5, 8, 2)

    @jax.jit
    def run(xs):
        def step(stats, i):
            y, stats = norm(xs[i], {}, stats, step=i)
            return stats, y

        return jax.lax.scan(step, norm.init_stats((2,)), jnp.arange(5))

    stats, _ = run(xs)
    # Steps past the last share its statistics.
    np.testing.assert_allclose(stats["mean"], xs[[0, 1, 4]].mean(1), atol=1e-6)
    with pytest.raises(TypeError, match="step must be an integer scalar, got float32"):
        norm(xs[0], {}, stats, step=np.float32(1))
    with pytest.raises(ValueError, match=r"it is \(3, 2\).*max_steps=3"):
        norm(xs[0], {}, jaxnorm.init_stats(2), step=0)


def test_domains_of_a_mixed_batch():
    norm = jaxnorm.DomainBatchNorm(num_domains=3, share_affine=False)
    single = {"scale": numbers(2), "bias": None}, jaxnorm.init_stats(2)
    params, stats = norm.from_single(*single)
    assert set(params) == {"scale"} and params["scale"].shape == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, stats, norm.init_stats((2,)))
    shared, _ = jaxnorm.DomainBatchNorm(num_domains=3).from_single(*single)
    assert shared["scale"].shape == (2,)
    x = numbers(6, 2)
    call = functools.partial(norm, x, params, stats)
    y, new = call(domain=np.array([0, 1, 0, 1, 3, -1]))
    # A domain that does not exist is no other domain.
    assert np.isnan(y[4:]).all() and np.isfinite(y[:4]).all()
    assert_close(new["mean"][1], 0.01 * x[[1, 3]].mean(0))
    np.testing.assert_array_equal(new["mean"][2], stats["mean"][2])
    for bad in (np.zeros(5, int), np.zeros(6), np.zeros((6, 1), int)):
        with pytest.raises(ValueError, match="domain must hold an integer for each"):
            call(domain=bad)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), but the features"):
        norm(x, shared, stats, domain=np.zeros(6, int))


def test_examples_do_not_meet_in_virtual_batch_norm():
    norm = jaxnorm.VirtualBatchNorm(size=3)
    x = numbers(6, 4, 2)
    y, _ = norm(x, {}, {})
    other, _ = norm(np.concatenate([x[:4], 7 * x[4:]]), {}, {})
    np.testing.assert_array_equal(y[:4], other[:4])


def test_switchable_norm_of_single_examples_and_positions():
    norm = jaxnorm.SwitchableNorm()
    params = norm.init_params((3,))
    for shape in ((1, 4, 3), (4, 1, 1, 3), (1, 1, 1, 3), (1, 3)):

        def loss(x, p):
            return (norm(x, p, norm.init_stats((3,)))[0] ** 3).sum()

        grads = jax.jit(jax.grad(loss, (0, 1)))(numbers(*shape), params)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match=r"mean_weight has shape \(2,\), but it is"):
        norm(numbers(4, 3), {"mean_weight": np.ones(2)}, norm.init_stats((3,)))


def test_iter_norm_whitens():
    mix = np.array([[1, 0.5, 0], [0, 1, 0.5], [0, 0, 1]], np.float32)
    norm = jaxnorm.IterNorm(iterations=12)
    y, _ = jax.jit(norm)(numbers(256, 3) @ mix, {}, norm.init_stats((3,)))
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(3), atol=1e-3)


def test_filter_response_norm_of_one_position():
    """Without an epsilon of weight it is the sign of x."""
    x = np.array([[0.01, -2.0]], np.float32)
    norm = jaxnorm.FilterResponseNorm(use_threshold=False, learn_epsilon=True)
    params = norm.init_params((2,))
    assert set(params) == {"scale", "bias", "extra_epsilon"}
    y, _ = norm(x, params | {"extra_epsilon": np.array([-1, 0], np.float32)}, {})
    np.testing.assert_allclose(y, [[0.01, -1]], atol=1e-5)


def test_controls_are_labelled_by_their_own_name():
    norm = jaxnorm.OnlineNorm()
    tree = {"control": {"scale": 0, "control_mean": 0}, "controller": 0}
    assert jaxnorm.models.control_labels(tree) == {
        "control": {"scale": "parameter", "control_mean": "control"},
        "controller": "parameter",
    }
    with jax.numpy_dtype_promotion("standard"):
        params = nnx.state(jx.Norm(norm, 3), nnx.Param)
    found = jaxnorm.models.control_labels(params)
    assert sorted(jax.tree.leaves(found)) == ["control"] * 2 + ["parameter"] * 2


def test_optax_renews_the_controls():
    norm = jaxnorm.PowerNorm()
    params, stats = norm.init_params((3,)), norm.init_stats((3,))
    optimizer = optax.multi_transform(
        {"parameter": optax.sgd(0.1), "control": optax.sgd(1.0)},
        jaxnorm.models.control_labels,
    )
    x, ct = numbers(8, 3), numbers(8, 3, seed=1)
    grads = jax.grad(lambda p: (norm(x, p, stats)[0] * ct).sum())(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    exact = methods.power_norm_backward(x, params, stats, ct)
    assert_close(new["control"], exact["new_control"], summed=8)
    assert_close(new["scale"], params["scale"] - 0.1 * exact["scale"], summed=8, size=4)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (jaxnorm.BatchRenorm, {"rmax": 0.5}, "rmax must be at least 1, got 0.5"),
        (jaxnorm.BatchRenorm, {"dmax": -1.0}, "dmax must be at least 0, got -1"),
        (jaxnorm.EvalNorm, {"weight": 2.0}, "weight must be from 0 to 1, got 2"),
        (jaxnorm.GhostBatchNorm, {"size": 0}, "size must be at least 1 example, got 0"),
        (jaxnorm.VirtualBatchNorm, {"size": 0}, "size must be at least 1 example"),
        (jaxnorm.MovingAverageBatchNorm, {"window": 0}, "window must be at least 1"),
        (jaxnorm.MovingAverageBatchNorm, {"clip": 0.9}, "clip must be at least 1"),
        (jaxnorm.CrossIterationBatchNorm, {"window": 0}, "window must be at least 1"),
        (jaxnorm.PowerNorm, {"momentum": None}, "does not count batches"),
        (jaxnorm.OnlineNorm, {"momentum": None}, "does not count batches"),
        (jaxnorm.IterNorm, {"iterations": -1}, "iterations must not be negative"),
        (jaxnorm.DomainBatchNorm, {"num_domains": 0}, "num_domains must be at least 1"),
        (jaxnorm.RecurrentBatchNorm, {"max_steps": 0}, "max_steps must be at least 1"),
        (
            jaxnorm.OnlineNorm,
            {"control_momentum": 3.0},
            "control_momentum must be from",
        ),
        (jaxnorm.LocalResponseNorm, {"size": 0}, "size=0 must be positive"),
        (jaxnorm.RMSNorm, {"first_features": 0}, "first_features must be at least 1"),
        (
            jaxnorm.RMSNorm,
            {"first_features": 2, "axis_name": "d"},
            "first_features=2 takes no axis_name and no kernels",
        ),
        (
            jaxnorm.RMSNorm,
            {"first_features": 2, "implementation": "triton"},
            "first_features=2 takes no axis_name and no kernels",
        ),
    ],
)
def test_settings_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_part_of_features_that_there_is_not():
    x = numbers(2, 4, 3)
    message = "first_features=4 must be at most the number of elements along the one"
    with pytest.raises(ValueError, match=message):
        jaxnorm.rms_norm(x, first_features=4)
    with pytest.raises(ValueError, match=r"got reduction_axes=\(1, 2\) for an input"):
        jaxnorm.rms_norm(x, first_features=2, reduction_axes=(1, 2))


def test_windows_that_do_not_fit():
    x = numbers(2, 4, 3)
    for window, error in (((3, 3), ValueError), (0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="window"):
            cast(Any, jaxnorm.divisive_norm)(x, window=window)
    for name, call in (
        ("sigma", functools.partial(jaxnorm.divisive_norm, x, sigma=np.ones(3))),
        ("alpha", functools.partial(jaxnorm.dynamic_tanh, x, alpha=np.ones(3))),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} has shape \(3,\), but it is one"
        ):
            call()
    with pytest.raises(ValueError, match="has one number for all features"):
        jaxnorm.scale_norm(x, np.ones(3))
    with pytest.raises(ValueError, match="control has shape"):
        norm = jaxnorm.MovingAverageBatchNorm()
        norm(x, {"control": np.zeros(3)}, norm.init_stats((3,)))
    with pytest.raises(ValueError, match="kernel has shape"):
        norm = jaxnorm.CrossIterationBatchNorm(kernel_shape=(2, 3))
        stats = norm.init_stats((3,))
        norm(x, {}, stats, kernel=np.ones((5, 3)), layer=lambda k: x)


def test_moments_of_positions_for_a_shortcut():
    x = numbers(2, 4, 3)
    y, m = jaxnorm.positional_norm(x)
    assert_close(y * jnp.sqrt(m.var + 1e-5) + m.mean, x, size=4)
    with pytest.raises(ValueError, match="one single value"):
        jaxnorm.positional_norm(x[..., :1])


@pytest.mark.parametrize("kind", ["PowerNorm", "MovingAverageBatchNorm", "OnlineNorm"])
def test_controls_survive_a_bad_batch_and_evaluation(kind):
    norm = getattr(jaxnorm, kind)()
    params = jax.tree.map(lambda v: v + 0.5, norm.init_params((3,)))
    stats, x = norm.init_stats((3,)), numbers(8, 3)

    @jax.jit
    def grads(x, flag):
        def loss(p):
            return norm(x, p, stats, use_running_average=flag)[0].sum()

        return jax.grad(loss)(params)

    bad = x.copy()
    bad[-1] = np.nan
    for found in (grads(bad, False), grads(x, True)):
        for k, v in found.items():
            if k.startswith("control"):
                np.testing.assert_array_equal(v, 0)
    assert all(np.any(v) for k, v in grads(numbers(8, 3), False).items())


def test_mean_squares_of_single_values_are_learned():
    x = np.full((1, 3), 100, np.float32)
    for norm in (jaxnorm.PowerNorm(momentum=0.5), jaxnorm.MovingAverageBatchNorm()):
        stats = norm.init_stats((3,))
        for _ in range(20):
            _, stats = norm(x, {}, stats)
        np.testing.assert_allclose(stats["var"], 1e4, rtol=1e-4)


def test_moving_averages_count_what_a_mask_leaves():
    norm = jaxnorm.MovingAverageBatchNorm(window=4)
    x = np.array([[2.0, 2.0], [-2.0, -2.0]], np.float32)
    _, stats = norm(x, {}, norm.init_stats((2,)), mask=np.array([True, False]))
    y, stats = norm(x, {}, stats)
    np.testing.assert_array_equal(stats["count"], [2, 1])
    np.testing.assert_allclose(y, x / 2, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 4)


def test_many_newton_iterations_stay_right():
    norm = jaxnorm.IterNorm(iterations=30)
    x = numbers(256, 8) * np.logspace(-1, 1, 8, dtype=np.float32)
    y, _ = jax.jit(norm)(x, {}, norm.init_stats((8,)))
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(8), atol=0.02)


def test_what_is_in_no_domain_reaches_no_statistic():
    norm = jaxnorm.DomainBatchNorm(num_domains=2, momentum=0.0)
    stats = norm.init_stats((3,))
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    x[4:] = np.nan
    domain = np.array([0, 1, 0, 1, 2, -1])
    y, new = norm(x, {}, stats, domain=domain)
    exact, kept = norm(x[:4], {}, stats, domain=domain[:4])
    np.testing.assert_array_equal(y[:4], exact)
    jax.tree.map(np.testing.assert_array_equal, new, kept)


def test_padding_of_no_domain_has_no_gradient():
    norm = jaxnorm.DomainBatchNorm()
    x, stats = numbers(6, 3), norm.init_stats((3,))
    mask = np.arange(6)[:, None] < 5
    domain = np.array([0, 0, 0, 1, 1, -1])

    def loss(x, params):
        return (norm(x, params, stats, domain=domain, mask=mask)[0] ** 2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(x, norm.init_params((3,)))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(grads))


def test_cross_iteration_slopes_are_of_each_device():
    norm = jaxnorm.CrossIterationBatchNorm(kernel_shape=(3, 2))
    inputs, kernel = numbers(2, 8, 3), np.ones((3, 2), np.float32)

    def slopes(inputs, kernel):
        def layer(kernel):
            return inputs @ kernel

        settings = {"kernel": kernel, "layer": layer}
        _, stats = norm(layer(kernel), {}, norm.init_stats((2,)), **settings)
        return stats["past_mean_slope"]

    grid = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    many = jax.shard_map(
        lambda v, k: slopes(v[0], k)[None],
        mesh=grid,
        in_specs=(spec, jax.sharding.PartitionSpec()),
        out_specs=spec,
    )
    found, one = jax.jit(many)(inputs, kernel), jax.jit(slopes)
    for i in range(2):
        assert_close(found[i], one(inputs[i], kernel), summed=8)


def test_complex_numbers_are_refused_by_methods_of_real_ones():
    x = np.ones((4, 3), np.complex64)
    for norm in (jaxnorm.DynamicTanh(), jaxnorm.BatchRenorm(), jaxnorm.IterNorm()):
        with pytest.raises(TypeError, match="takes real numbers, got complex64"):
            norm(x, {}, norm.init_stats((3,)))


def test_empty_batches_leave_the_state():
    x = np.zeros((0, 4, 3), np.float32)
    for norm in (jaxnorm.RunningInstanceNorm(), jaxnorm.IterNorm()):
        stats = norm.init_stats((3,))
        y, new = jax.jit(norm)(x, {}, stats)
        assert y.shape == x.shape
        jax.tree.map(np.testing.assert_array_equal, new, stats)
