"""PopArt: what a layer predicts in original units outlives changes of its targets."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import assert_close

from jaxnorm import Standardizer, pop_art


def rng_data(*shape: int, mean: Any = 0.0, deviation: Any = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) * deviation + mean).astype(np.float32)


def predicted(stats: Standardizer, kernel: Any, bias: Any, h: Any) -> np.ndarray:
    """In original units, in float64."""
    h, kernel, bias = (np.asarray(v, np.float64) for v in (h, kernel, bias))
    mean = np.asarray(stats.mean, np.float64) + np.asarray(stats.residue)
    return (h @ kernel + bias) * np.asarray(stats.deviation, np.float64) + mean


OLD = Standardizer.fit(rng_data(50, 3, mean=[0, 1e4, -7], deviation=[1, 5, 100]))
NEW = Standardizer.fit(rng_data(20, 3, mean=[9, 1e4, 50], deviation=[0.1, 7, 1e4]))


@pytest.mark.parametrize("old, new", [(OLD, NEW), (NEW, OLD), (OLD, OLD)])
def test_outputs_in_original_units_are_preserved(old, new):
    h, kernel, bias = rng_data(9, 4), rng_data(4, 3), rng_data(3)
    moved = jax.jit(pop_art)(kernel, bias, old, new)
    before = predicted(old, kernel, bias, h)
    after = predicted(new, moved[0], moved[1], h)
    # Kernel and bias are rounded in deviations of the new targets.
    size = (abs(np.asarray(moved[1])) + 4) * np.asarray(new.deviation)
    size += 4 * np.asarray(old.deviation)
    assert_close((after - before) / size, np.zeros_like(before))


def test_outputs_outlive_a_stream():
    """A thousand updates, each with a correction: roundings do not pile up."""
    targets = (
        rng_data(1000, 8, 3) + np.linspace(0, 50, 1000, dtype=np.float32)[:, None, None]
    )

    def step(carry, batch):
        stats, kernel, bias = carry
        new = stats.update(batch, decay=0.9)
        return (new, *pop_art(kernel, bias, stats, new)), None

    start = Standardizer.init(3), jnp.asarray(rng_data(4, 3)), jnp.asarray(rng_data(3))
    (stats, kernel, bias), _ = (
        jax.jit(lambda c, t: jax.lax.scan(step, c, t))(start, targets)[0],
        None,
    )
    h = rng_data(9, 4)
    size = 50 * 1000**0.5
    assert_close(
        predicted(stats, kernel, bias, h) / size,
        predicted(*start, h) / size,
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize(
    "axis, features, kernel", [(-1, (3,), (4, 3)), ((1, 2), (2, 3), (4, 2, 3))]
)
def test_shapes_and_dtypes(dtype, axis, features, kernel):
    old = Standardizer.init(features, axis=axis)
    new = old.update(rng_data(50, *features, mean=3, deviation=2))
    moved = pop_art(jnp.ones(kernel, dtype), jnp.zeros(features, dtype), old, new)
    assert [v.shape for v in moved] == [kernel, features]
    assert all(v.dtype == dtype for v in moved)
    deviation = np.asarray(new.deviation)
    assert_close(moved[0], np.broadcast_to(1 / deviation, kernel), dtype=dtype)
    assert_close(moved[1], -np.asarray(new.mean) / deviation, dtype=dtype)


def test_one_deviation_for_all_targets():
    new = Standardizer.fit(rng_data(50, 1, mean=3, deviation=2), axis=())
    old = Standardizer.init((), axis=())
    kernel, bias = pop_art(rng_data(4, 1), rng_data(1), old, new)
    assert kernel.shape == (4, 1) and bias.shape == (1,)
    assert_close(kernel * np.asarray(new.deviation), rng_data(4, 1))


def test_constant_targets_leave_the_layer_as_it_is():
    kernel, bias = rng_data(4, 2), rng_data(2)
    constant = Standardizer.fit(np.full((5, 2), 7, np.float32))
    varying = Standardizer.fit(rng_data(5, 2))
    for old, new in ((constant, varying), (varying, constant), (constant, constant)):
        moved = pop_art(kernel, bias, old, new)
        np.testing.assert_array_equal(moved[0], kernel)
        np.testing.assert_array_equal(moved[1], bias)


def test_the_layer_gets_gradients_and_the_moments_none():
    def loss(kernel, bias, mean):
        old = Standardizer(**{**vars(OLD), "mean": mean})
        kernel, bias = pop_art(kernel, bias, old, NEW)
        return kernel.sum() + bias.sum()

    slopes = jax.grad(loss, (0, 1, 2))(rng_data(4, 3), rng_data(3), OLD.mean)
    ratio = np.asarray(OLD.deviation / NEW.deviation)
    assert_close(slopes[0], np.broadcast_to(ratio, (4, 3)))
    assert_close(slopes[1], ratio)
    np.testing.assert_array_equal(slopes[2], np.zeros(3))


@pytest.mark.parametrize(
    "args, kind, message",
    [
        (
            (jnp.ones((3, 4)), jnp.ones(3), OLD, NEW),
            ValueError,
            r"kernel of shape \(3, 4\) does not end with .* shape \(3,\): transpose it",
        ),
        ((jnp.ones((4, 3)), jnp.ones(4), OLD, NEW), ValueError, "bias of shape"),
        ((jnp.ones((4, 3)), 0.0, OLD, NEW), ValueError, "bias of shape"),
        (
            (jnp.ones((4, 3), int), jnp.ones(3), OLD, NEW),
            TypeError,
            "kernel must be of real floating point, got int32",
        ),
        (
            (jnp.ones((4, 3)), jnp.ones(3), OLD, Standardizer.init(1)),
            ValueError,
            r"old and new must be moments of the same features, .* \(3,\) and \(1,\)",
        ),
        (
            (jnp.ones((4, 3)), jnp.ones(3), cast(Any, 3), NEW),
            TypeError,
            "old must be a jaxnorm.Standardizer",
        ),
    ],
)
def test_errors(args, kind, message):
    with pytest.raises(kind, match=message):
        pop_art(*args)
