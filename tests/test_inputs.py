"""Standardized inputs: moments of the whole however it is split, there and back."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from norms import assert_close
from test_devices import collectives

from jaxnorm import Moments, Standardizer, _feature_moments, _samples, pool
from jaxnorm import linen as _linen  # noqa: F401  # flax.serialization knows it then
from jaxnorm._exact import add_pairs

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def strict_where_flax_is_not_used(request):
    flax = "flax" in request.node.name
    with jax.numpy_dtype_promotion("standard" if flax else "strict"):
        yield


def data(*shape: int, offset: Any = 0.0, deviation: Any = 1.0):
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape) * deviation + offset).astype(np.float32)


FAR: dict[str, Any] = {"offset": [0, 1e4, -1e4, 7], "deviation": [1, 1, 300, 1e-2]}


def assert_weighted(stats, x, weights):
    """The moments of rows of features that count by their weights."""
    x = np.asarray(x, np.float64)
    weights = np.broadcast_to(weights, x.shape).astype(np.float64)
    x = np.where(weights > 0, x, 0)
    size = weights.sum(0)
    mean = (weights * x).sum(0) / size
    var = (weights * (x - mean) ** 2).sum(0) / size
    assert_close(stats.size / size, np.ones_like(size))
    whole_mean = np.asarray(stats.mean, np.float64) + np.asarray(stats.residue)
    np.testing.assert_array_less(abs(whole_mean - mean) / np.sqrt(var), 1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)


def assert_moments(stats, x, mask=None):
    """The moments of rows of features, from each feature's own valid elements."""
    x = np.asarray(x, np.float64)
    mask = np.broadcast_to(True if mask is None else mask, x.shape).astype(bool)
    columns = [x[mask[:, i], i] for i in range(x.shape[1])]
    mean = np.array([c.mean() if len(c) else 0 for c in columns])
    var = np.array([c.var() if len(c) else 0 for c in columns])
    np.testing.assert_array_equal(stats.size, [len(c) for c in columns])
    assert_close(stats.mean / np.maximum(abs(mean), 1), mean / np.maximum(abs(mean), 1))
    whole_mean = np.asarray(stats.mean, np.float64) + np.asarray(stats.residue)
    apart = (whole_mean - mean) / np.sqrt(np.maximum(var, 1e-30))
    np.testing.assert_array_less(abs(apart[var > 0]), 1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "shape, axis, others",
    [
        ((7, 3), -1, (0,)),
        ((4, 3, 5), 1, (0, 2)),
        ((4, 3, 5), -2, (0, 2)),
        ((2, 3, 4, 5), [-1, 1], (0, 2)),
        ((4, 3), (), (0, 1)),
    ],
)
def test_axes(shape, axis, others):
    x = data(*shape, offset=3)
    stats = Standardizer.fit(x, axis=axis)
    assert hash(stats.axis) == hash(Standardizer.init(3, axis=axis).axis)
    exact = x.astype(np.float64)
    assert_close(stats.mean, exact.mean(others))
    assert_close(stats.var, exact.var(others))
    y = (exact - exact.mean(others, keepdims=True)) / exact.std(others, keepdims=True)
    assert_close(jax.jit(Standardizer.apply)(stats, x), y)
    assert_close(stats.invert(stats.apply(x)), x, size=4)


@pytest.mark.parametrize("axis", [-1, -3])
def test_negative_axes_fit_one_example_too(axis):
    x = data(4, 3, 2, 3, offset=[1, 2, 3])
    stats = Standardizer.fit(x, axis=axis)
    assert_close(stats.apply(x[0]), stats.apply(x)[0])


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 0, 7), (0, 1, 11), (3, 9)])
def test_any_split_gives_the_moments_of_the_whole(sizes):
    x, mask = data(12, 4, **FAR), np.random.default_rng(1).random((12, 4)) > 0.4
    x = np.where(mask, x, np.nan)
    cuts = np.cumsum(sizes)[:-1]
    pieces = list(zip(np.split(x, cuts), np.split(mask, cuts), strict=True))
    update = jax.jit(lambda s, x, mask: s.update(x, mask=mask))
    streamed = Standardizer.init(4)
    for batch, valid in pieces:
        streamed = update(streamed, batch, valid)
    parts = [Standardizer.fit(v, mask=m.astype(np.int32)) for v, m in pieces]
    for stats in (streamed, functools.reduce(Standardizer.merge, reversed(parts))):
        assert_moments(stats, x, mask)


def test_parts_with_features_on_other_axes_are_merged():
    x = data(12, 4, **FAR)
    other = Standardizer.fit(x[5:].T, axis=0)
    stats = Standardizer.fit(x[:5]).merge(other)
    assert stats.axis == -1 and other.merge(stats).axis == 0
    assert_moments(stats, x)


def test_more_than_can_be_taken_at_once_is_taken_in_parts(monkeypatch):
    monkeypatch.setattr(_samples, "MAX_SIZE", 5)
    x, mask = data(4, 3, 4, **FAR), np.random.default_rng(1).random((4, 3, 1)) > 0.4
    rows = np.broadcast_to(mask, x.shape).reshape(-1, 4)
    stats = Standardizer.fit(np.where(mask, x, np.nan), mask=mask)
    assert_moments(stats, x.reshape(-1, 4), rows)
    assert_moments(
        Standardizer.init(4).update(x, mask=mask[0]),
        x.reshape(-1, 4),
        np.tile(mask[0], (4, 1)),
    )


def test_a_hundred_thousand_batches_in_a_scan():
    x = data(100_000, 2, 4, **FAR)

    @jax.jit
    def run(x):
        start = Standardizer.init(4)
        return jax.lax.scan(lambda s, batch: (s.update(batch), None), start, x)[0]

    stats, exact = run(x), x.reshape(-1, 4).astype(np.float64)
    assert_moments(stats, exact)
    np.testing.assert_allclose(stats.var, exact.var(0), rtol=2e-7)


def of_sizes(*sizes: int) -> Standardizer:
    """Standard moments, as if of so many elements."""
    size = np.array(sizes, np.float64)
    high = jnp.asarray(size, jnp.float32)
    low = jnp.asarray(size - np.asarray(high), jnp.float32)
    start = Standardizer.init(len(sizes))
    var = jnp.ones(len(sizes))
    return dataclasses.replace(start, var=var, size_high=high, size_low=low)


def test_sizes_are_exact_past_what_an_integer_of_32_bits_holds():
    sizes = [5, 2**24, 2**31 - 4, 2**32 - 2, 2**40 + 2**32 - 3, 2**46 - 5]
    x = data(3, 6)
    stats = of_sizes(*sizes)
    step = jax.jit(lambda s, x: s.update(x), donate_argnums=0)
    for more in (3, 6, 9):
        stats = step(stats, x)
        assert stats.size.dtype == np.float64
        np.testing.assert_array_equal(stats.size, [n + more for n in sizes])
    rounded = np.asarray(jax.jit(lambda s: s.size)(stats))
    assert_close(rounded / np.array(sizes), stats.size / np.array(sizes))
    twice = stats.merge(stats)
    np.testing.assert_array_equal(twice.size, 2 * stats.size)
    for s in (stats, twice):
        seen = np.concatenate([x.astype(np.float64)] * 3)
        weight = 9 / (np.array(sizes, np.float64) + 9)
        mean = weight * seen.mean(0)
        spread = weight * (seen**2).mean(0) + (1 - weight) - mean**2
        assert_close(s.mean, mean)
        assert_close(s.var, spread)
        assert np.isfinite(s.apply(x)).all()


def test_sizes_of_one_sample_are_exact():
    for dtype in (np.float32, np.float64):
        for size in (0, 5, 2**16 + 1, 2**24 + 1, 2**31 - 1):
            with jax.enable_x64(dtype == np.float64):
                high, low = _feature_moments._as_pair(jnp.int32(size), dtype)
                assert high.dtype == low.dtype == dtype
                assert float(high) + float(low) == size


@pytest.mark.parametrize("seed", range(4))
def test_sizes_of_many_batches_are_exact(seed):
    more = np.random.default_rng(seed).integers(0, 2**31, 2000)
    steps = jax.vmap(lambda n: jnp.stack(_feature_moments._as_pair(n, jnp.float32)))
    add = lambda total, pair: (add_pairs(total, (pair[0], pair[1])), None)  # noqa: E731
    start = (jnp.float32(0), jnp.float32(0))
    total, _ = jax.jit(lambda n: jax.lax.scan(add, start, steps(n)))(
        jnp.asarray(more, jnp.int32)
    )
    assert float(total[0]) + float(total[1]) == more.sum()


WEIGHTS: dict[str, Any] = {
    "of examples": (12, 1),
    "of features": (4,),
    "of elements": (12, 4),
}


@pytest.mark.parametrize("scale", [1, 1e-12, 1e12])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind, scale):
    """Whatever they are scaled by, and however the data is split."""
    x = data(12, 4, **FAR)
    weights = np.random.default_rng(1).random(WEIGHTS[kind]) * scale
    weights = np.asarray(weights, np.float32)
    each = np.broadcast_to(weights, x.shape)
    whole = jax.jit(lambda x, w: Standardizer.fit(x, weights=w))(x, weights)
    parts = Standardizer.init(4)
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        parts = parts.update(x[rows], weights=each[rows])
    for stats in (whole, parts):
        assert_weighted(stats, x, each)


def test_weights_that_are_whole_repeat_elements():
    x, times = data(12, 4, **FAR), np.arange(12) % 4
    stats = Standardizer.fit(x, weights=times[:, None])
    assert_moments(stats, np.repeat(x, times, 0))


def test_what_has_no_weight_or_is_masked_may_be_nan():
    x, rng = data(12, 4, **FAR), np.random.default_rng(1)
    weights, mask = rng.random((12, 4)), rng.random((12, 1)) > 0.4
    weights[3] = 0
    each = np.where(mask, weights, 0)
    junk = np.where(each > 0, x, np.nan)
    assert_weighted(Standardizer.fit(junk, mask=mask, weights=weights), x, each)
    none = Standardizer.fit(junk, mask=mask, weights=np.zeros((12, 1)))
    np.testing.assert_array_equal(none.size, np.zeros(4))
    np.testing.assert_array_equal(none.apply(x), x)


def test_weights_of_wide_data_and_of_parts(monkeypatch):
    x = 1.7e9 + 10 * np.random.default_rng(0).normal(size=(40, 3))
    weights = np.random.default_rng(1).random((40, 1))
    assert_weighted(Standardizer.fit(x, weights=weights), x, weights)
    monkeypatch.setattr(_samples, "MAX_SIZE", 7)
    assert_weighted(Standardizer.fit(x, weights=weights), x, weights)


def test_weighted_constants_become_zero():
    x = np.broadcast_to(CONSTANTS, (1000, 8))
    weights = np.random.default_rng(0).random((1000, 1)).astype(np.float32)
    stats = Standardizer.fit(x, weights=weights).update(x, weights=weights)
    np.testing.assert_array_equal(stats.apply(x), np.zeros_like(x))
    np.testing.assert_array_equal(stats.invert(np.zeros(8, np.float32)), CONSTANTS)


@pytest.mark.parametrize("scale", [1, 1e-12])
def test_sums_of_weights_are_sizes_that_sets_are_pooled_by(scale):
    mean, var = data(5, 1, 3, offset=1e4), data(5, 1, 3) ** 2
    sizes = scale * np.random.default_rng(1).random((5, 1, 3)).astype(np.float32)
    m = Moments(jnp.asarray(mean), jnp.asarray(var), jnp.asarray(sizes))
    whole = pool(m, lambda v: v.sum(0, keepdims=True))
    shares = sizes.astype(np.float64) / sizes.sum(0, dtype=np.float64)
    exact = (shares * mean).sum(0)
    spread = (shares * (var + (mean - exact) ** 2)).sum(0)
    assert_close(whole.size[0] / scale, sizes.sum(0) / scale)
    assert_close(np.asarray(whole.mean[0], np.float64) + whole.residue[0] - exact, 0)
    assert_close(whole.var[0] / spread, np.ones_like(spread))


def test_gradients_of_weighted_moments_over_devices():
    x, rng = data(4, 5, 2, offset=3), np.random.default_rng(1)
    weights = rng.random((4, 5, 1)).astype(np.float32)

    def loss(mean, var):
        return (var * jnp.arange(1.0, 3)).sum() + mean.sum()

    def shared(x):
        fit = functools.partial(Standardizer.fit, axis_name="data")
        each = jax.vmap(lambda x, w: fit(x, weights=w), axis_name="data")(x, weights)
        return loss(each.mean[0], each.var[0])

    def formula(x):
        share = jnp.asarray(weights / weights.sum())
        mean = (share * x).sum((0, 1), keepdims=True)
        return loss(mean[0, 0], (share * (x - mean) ** 2).sum((0, 1)))

    assert_close(jax.grad(shared)(x), jax.grad(formula)(x))


def test_negative_weights_that_are_not_known_show():
    stats = jax.jit(lambda w: Standardizer.fit(data(3, 2), weights=w))(
        jnp.array([[1.0], [-1.0], [1.0]])
    )
    assert np.isnan(stats.mean).all()


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_wrong_weights_of_an_update_that_are_not_known_show(wrong):
    """In the moments, too, and in no other feature."""
    weights = np.ones((3, 2), np.float32)
    weights[1, 0] = wrong
    update = jax.jit(lambda s, x, w: s.update(x, weights=w))
    for start in (Standardizer.init(2), Standardizer.fit(data(5, 2, offset=4))):
        stats = update(start, data(3, 2), weights)
        for v in (stats.mean, stats.var, stats.size):
            np.testing.assert_array_equal(np.isnan(v), [True, False])


@pytest.mark.parametrize("decay", [0, 0.5, 0.9, 1])
def test_decay_weighs_by_age(decay):
    batches = [data(n, 4, **FAR) + n for n in (5, 1, 7, 3)]
    weights = np.random.default_rng(1).random((16, 4)).astype(np.float32)
    pieces = np.split(weights, [5, 6, 13])
    update = jax.jit(lambda s, x, w, d: s.update(x, weights=w, decay=d))
    for d in (decay, jnp.float32(decay)):
        stats = Standardizer.init(4)
        for x, w in zip(batches, pieces, strict=True):
            stats = update(stats, x, w, d)
        ages = np.repeat([3, 2, 1, 0], [5, 1, 7, 3])[:, None]
        assert_weighted(stats, np.concatenate(batches), weights * float(decay) ** ages)


@pytest.mark.parametrize("decay", [0.99, 1 - 1e-6])
def test_decay_over_many_updates(decay):
    """The size, whose roundings would add up, and moments that follow a drift."""
    steps = 20_000
    x = data(steps, 1, 2) + np.linspace(0, 100, steps, dtype=np.float32)[:, None, None]

    @jax.jit
    def run(x):
        step = lambda s, x: (s.update(x, decay=decay), None)  # noqa: E731
        return jax.lax.scan(step, Standardizer.init(2), x)[0]

    assert_weighted(run(x), x[:, 0], decay ** np.arange(steps - 1, -1, -1.0)[:, None])


def test_decay_leaves_features_alone_of_which_a_batch_holds_nothing():
    x = data(6, 3, offset=5)
    start = Standardizer.fit(x)
    stats = start.update(np.full_like(x, np.nan), mask=np.zeros(3), decay=0.5)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(stats), strict=True):
        np.testing.assert_array_equal(old, new)
    stats = start.update(x, mask=np.array([1, 0, 1]), decay=0.5)
    np.testing.assert_array_equal(stats.size, [9, 6, 9])


def test_what_is_forgotten_makes_nothing_constant():
    """The spacing of numbers far from 0 goes with them."""
    far, near = data(50, 1, offset=1e9), data(50, 1)
    stats = Standardizer.fit(far)
    for _ in range(60):
        stats = stats.update(near, decay=0.1)
    exact = near.astype(np.float64)
    assert_close(stats.apply(near), (exact - exact.mean(0)) / exact.std(0))


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_nan_is_forgotten_with_all_else(junk):
    """Then constants are constant again."""
    x = np.broadcast_to(CONSTANTS, (1000, 8))
    spoilt = Standardizer.fit(np.where(np.arange(1000)[:, None] == 7, junk, x))
    assert np.isnan(spoilt.mean).all()
    stats = spoilt.update(x, decay=0)
    assert_moments(stats, x)
    np.testing.assert_array_equal(stats.spacing, np.float32(EPS) * abs(CONSTANTS))
    np.testing.assert_array_equal(stats.apply(x), np.zeros_like(x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_clip(dtype):
    x = data(50, 3, offset=[0, 5, 1e4], deviation=[1, 3, 300])
    x[0] += [1e3, -1e4, 0]
    stats = Standardizer.fit(x[1:])
    y = stats.apply(x, dtype=dtype)
    for limit in (2.0, 2, jnp.float32(2)):
        clipped = stats.apply(x, clip=limit, dtype=dtype)
        assert clipped.dtype == dtype
        np.testing.assert_array_equal(clipped, np.clip(y, -2, 2).astype(dtype))
    np.testing.assert_array_equal(stats.apply(x, clip=np.inf, dtype=dtype), y)
    traced = jax.jit(lambda x, c: stats.apply(x, clip=c, dtype=dtype))(x, 2.0)
    np.testing.assert_array_equal(traced, clipped)
    x[1] = np.nan
    assert np.isnan(stats.apply(x, clip=2)[1]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_half_precision(dtype):
    x = data(50, 3, offset=5, deviation=[1, 3, 300]).astype(dtype)
    exact = x.astype(np.float64)
    stats = Standardizer.fit(x)
    assert stats.mean.dtype == stats.var.dtype == np.float32
    assert_moments(stats, exact)
    y = stats.apply(x)
    assert y.dtype == dtype and stats.invert(y).dtype == np.float32
    expected = (exact - exact.mean(0)) / exact.std(0)
    assert_close(y, expected, dtype=dtype)
    wide = stats.apply(x, dtype=np.float32)
    assert wide.dtype == np.float32
    assert_close(wide, expected, size=4)
    back = stats.invert(wide, dtype=dtype)
    assert back.dtype == dtype
    assert_close(back, exact, dtype=dtype, size=10)


def test_an_inverse_is_rounded_once():
    x = data(50, 3, offset=1e6, deviation=100)
    stats = Standardizer.fit(x)
    y = jnp.asarray(stats.apply(x), jnp.bfloat16)
    exact = x.astype(np.float64)
    exact = exact.mean(0) + exact.std(0) * np.asarray(y, np.float64)
    assert_close(stats.invert(y) / 1e6, exact / 1e6)
    half = np.asarray(stats.invert(y, dtype=jnp.bfloat16), np.float64)
    np.testing.assert_array_less(abs(half / exact - 1), 2.0**-9 * 1.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64, bool])
def test_integers(dtype):
    top = {"b1": 2.0, "u1": 255.0, "i4": 2.0**23}.get(np.dtype(dtype).str[1:], 2.0**40)
    x = (np.random.default_rng(0).random((6, 5, 3)) * top).astype(int).astype(dtype)
    stats, exact = Standardizer.fit(x), x.astype(np.float64)
    assert_close(stats.mean / top, exact.mean((0, 1)) / top)
    y = stats.apply(x)
    assert y.dtype == np.float32
    assert_close(y, (exact - exact.mean((0, 1))) / exact.std((0, 1)))


WIDE: dict[str, Any] = {
    "float64": lambda x: x,
    "lists": lambda x: x.tolist(),
    "int64": lambda x: x.astype(np.int64),
    "uint64": lambda x: x.astype(np.uint64),
    "int32": lambda x: (-x).astype(np.int32),
    "uint32": lambda x: (2 * x).astype(np.uint32),
    "int32 on a device": lambda x: jnp.asarray(x, jnp.int32),
}


@pytest.mark.parametrize("kind", WIDE)
def test_what_float32_has_too_few_digits_for(kind):
    """Numbers whose spacing in float32 is 128, and whose deviation is 10."""
    rng = np.random.default_rng(0)
    x = WIDE[kind](1.7e9 + 10 * rng.normal(size=(40, 3)))
    exact = np.asarray(x, np.float64)
    mask = rng.random(exact.shape) > 0.3
    scaled = (exact - exact.mean(0)) / exact.std(0)
    whole = Standardizer.fit(x)
    parts = Standardizer.init(3).update(x[:15]).merge(Standardizer.fit(x[15:]))
    for stats in (whole, parts):
        assert stats.mean.dtype == np.float32
        assert_moments(stats, exact)
        y = stats.apply(x)
        assert y.dtype == np.float32
        assert_close(y, scaled)
        assert_close(stats.invert(y) / 1e9, exact / 1e9)
        np.testing.assert_array_equal(stats.apply(x, mask=mask)[~mask], 0)
    assert_moments(Standardizer.fit(x, mask=mask), exact, mask)
    # Also where the data is a constant of a compiled function.
    compiled = jax.jit(lambda: Standardizer.fit(x).apply(x))()
    assert_close(compiled, scaled)


def test_what_float32_has_too_few_digits_for_comes_back_in_float64():
    x = 1.7e9 + 10 * np.random.default_rng(0).normal(size=(40, 3))
    stats = Standardizer.fit(x)
    y = stats.apply(x)
    with jax.enable_x64(True):
        back = np.asarray(stats.invert(y, dtype=np.float64))
    assert_close((back - x) / 10, np.zeros_like(x), size=4)


def test_missing_values_of_wide_data():
    x = 1.7e9 + 10 * np.random.default_rng(0).normal(size=(40, 3))
    mask = np.random.default_rng(1).random(x.shape) > 0.3
    for junk in (np.nan, np.inf, 1e300):
        assert_moments(Standardizer.fit(np.where(mask, x, junk), mask=mask), x, mask)


def test_constants_of_wide_data():
    x = np.broadcast_to([0.1, 1.7e9 + 0.1, -1e15, 0], (6, 4))
    stats = Standardizer.init(4).update(x).update(x)
    np.testing.assert_array_equal(stats.deviation, np.zeros(4))
    np.testing.assert_array_equal(stats.apply(x + 1), np.zeros((6, 4)))
    np.testing.assert_array_equal(stats.invert(np.ones(4)), x[0].astype(np.float32))
    # What is rounding in float32 is none in float64.
    noise = np.where(np.arange(64) % 2, EPS, -EPS)[:, None] * np.array([1, 1 / 4])
    assert_close(abs(Standardizer.fit(1.5 + noise).apply(1.5 + noise)), 1)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(40, 3)) + 1e9
        stats = Standardizer.init(3, dtype=np.float64).update(x[:5]).update(x[5:])
        assert stats.mean.dtype == stats.var.dtype == np.float64
        np.testing.assert_allclose(stats.var, x.var(0), rtol=1e-11)
        y = stats.apply(x)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), atol=1e-6)
        assert Standardizer.init(3).mean.dtype == np.float32
        assert Standardizer.init(3, dtype=jnp.bfloat16).var.dtype == np.float32
        # Wider data widens, narrower data is read by the wider moments.
        narrow = Standardizer.fit(x.astype(np.float32))
        assert narrow.merge(stats).var.dtype == np.float64
        assert narrow.apply(x).dtype == np.float64
        for call in (stats.apply, stats.invert):
            assert call(jnp.ones(3), dtype=np.float64).dtype == np.float64
        assert stats.apply(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16
        assert stats.invert(jnp.ones(3, jnp.bfloat16)).dtype == np.float64
        # The moments hold more digits than their dtype has.
        narrow = Standardizer.fit(data(40, 3, offset=1e6, deviation=100))
        exact = data(40, 3, offset=1e6, deviation=100).astype(np.float64)
        y = (exact - exact.mean(0)) / exact.std(0)
        back = narrow.invert(y, dtype=np.float64)
        np.testing.assert_allclose(back, exact, rtol=0, atol=1e-4)


def test_what_rounding_cut_off_the_mean_is_subtracted():
    x = data(4000, 3, offset=[1e4, -1e4, 3e4])
    exact = x.astype(np.float64)
    y = Standardizer.fit(x).apply(x)
    # The mean itself is rounded by up to 1e-3 of a deviation.
    assert_close(y, (exact - exact.mean(0)) / exact.std(0))
    assert abs(np.asarray(y, np.float64).mean(0)).max() < 1e-6
    np.testing.assert_array_equal(Standardizer.fit(x).invert(y), x)


CONSTANTS = np.array(
    [0, 0.1, -1 / 3, 1e4 + 1 / 3, 16777213, -1e-20, 7.7e15, 255], np.float32
)


@pytest.mark.parametrize("count", [1, 5, 1000])
@pytest.mark.parametrize("batches", [1, 40])
def test_constants_become_zero_and_come_back(count, batches):
    x = np.broadcast_to(CONSTANTS, (count, 8))
    fit = jax.jit(
        lambda x: jax.lax.fori_loop(
            0, batches, lambda _, s: s.update(x), Standardizer.init(8)
        )
    )
    stats = fit(x)
    for unseen in (x, x + 1):
        y = stats.apply(unseen)
        np.testing.assert_array_equal(y, np.zeros_like(x))
    np.testing.assert_array_equal(stats.invert(stats.apply(x)), x)
    np.testing.assert_array_equal(stats.invert(np.ones(8, np.float32)), CONSTANTS)
    np.testing.assert_array_equal(stats.deviation, np.zeros(8))
    slope = jax.grad(lambda x: stats.apply(x).sum())(x)
    np.testing.assert_array_equal(slope, np.zeros_like(x))


def test_a_deviation_of_roundoff_is_constant_and_more_is_not():
    value = np.float32(1.5)
    noise = np.where(np.arange(64) % 2, EPS, -EPS)[:, None].astype(np.float32)
    x = value + noise * np.array([0, 1, 4], np.float32)
    y = np.asarray(Standardizer.fit(x).apply(x))
    np.testing.assert_array_equal(y[:, :2], np.zeros((64, 2)))
    assert_close(abs(y[:, 2]), 1)


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (4, 0, 3)])
def test_of_nothing_is_the_identity(shape):
    x = data(6, 3, offset=100)
    valid = np.array([True, True, False])
    for empty in (Standardizer.init(3), Standardizer.fit(np.zeros(shape, np.float32))):
        np.testing.assert_array_equal(empty.size, [0, 0, 0])
        np.testing.assert_array_equal(empty.apply(x), x)
        np.testing.assert_array_equal(empty.invert(x), x)
        assert_moments(empty.update(x).merge(empty), x)
        stats = empty.update(np.where(valid, x, np.nan), mask=valid)
        assert_moments(stats, x, valid)
        np.testing.assert_array_equal(stats.apply(x)[:, 2], x[:, 2])


def test_nan_spoils_its_feature_only_and_missing_values_are_masked():
    x = data(5, 3, offset=4)
    x[2, 1] = np.nan
    assert np.isnan(Standardizer.fit(x).mean).tolist() == [False, True, False]
    mask = ~np.isnan(x)
    stats = Standardizer.fit(x, mask=mask)
    assert_moments(stats, x, mask)
    y = stats.apply(x, mask=mask)
    assert y[2, 1] == 0
    slope = jax.grad(lambda x: stats.apply(x, mask=mask).sum())(x)
    assert_close(slope, np.where(mask, 1 / np.asarray(stats.deviation), 0))


def over_devices(f, *args, num_devices=4, vma=True):
    """`f(*args)`, with all but the first split over devices, and its collectives."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    specs = (P(), *[P("data")] * (len(args) - 1))
    shared = jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=vma)
    )
    return shared(*args), collectives(shared.lower(*args).compile().as_text())


@pytest.mark.parametrize("vma", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_devices_share_what_they_hold_by_one_collective(weighted, far, vma):
    """Data, masked or weighted, in float32 or as the sum of two numbers in it."""
    x, rng = data(24, 4, **FAR), np.random.default_rng(1)
    x = (1.7e9 + rng.integers(-99, 99, x.shape)).astype(np.int32) if far else x
    mask, weights = rng.random((24, 4)) > 0.4, rng.random((24, 1)).astype(np.float32)
    mask[18:] = False  # nothing on the last of four devices

    def update(s, x, mask, weights):
        weights = weights if weighted else None
        return s.update(x, mask=mask, weights=weights, axis_name="data")

    stats, program = over_devices(
        update, Standardizer.init(4), x, mask, weights, vma=vma
    )
    assert program == ["all-reduce"]
    assert_weighted(stats, x, mask * (weights if weighted else 1))


@pytest.mark.parametrize("vma", [False, True])
def test_devices_share_out_a_stream(vma):
    x, mask = data(24, 4, **FAR), np.random.default_rng(1).random((24, 4)) > 0.4
    mask[16:20] = False  # nothing on the third of four devices, in the second batch
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    update = jax.shard_map(
        lambda s, x, mask: s.update(x, mask=mask, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=vma,
    )
    stats = Standardizer.init(4)
    for rows in (slice(0, 8), slice(8, 24)):
        stats = jax.jit(update)(stats, np.where(mask, x, np.nan)[rows], mask[rows])
    assert_moments(stats, x, mask)


def test_sharded_arrays_need_nothing():
    x = data(16, 4, **FAR)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    stats = jax.jit(Standardizer.fit)(spread)
    assert_moments(stats, x)
    y = jax.jit(Standardizer.apply)(stats, spread)
    assert y.sharding == spread.sharding
    assert_close(y, Standardizer.fit(x).apply(x))


def test_vmap_fits_one_for_each():
    x = data(3, 6, 4, offset=[1, 2, 3, 4])
    each = jax.vmap(Standardizer.fit)(x)
    for i in range(3):
        assert_moments(jax.tree.map(lambda v, i=i: v[i], each), x[i])


def test_moments_get_no_gradient_and_inputs_do():
    x = data(6, 3, offset=2, deviation=[1, 2, 0])
    stats = Standardizer.fit(x)

    def loss(mean, var, x):
        moved = dataclasses.replace(stats, mean=mean, var=var)
        return (moved.apply(x) + moved.invert(x)).sum()

    dmean, dvar, dx = jax.grad(loss, (0, 1, 2))(stats.mean, stats.var, x)
    np.testing.assert_array_equal(dmean, np.zeros(3))
    np.testing.assert_array_equal(dvar, np.zeros(3))
    deviation = np.asarray(stats.deviation)
    slope = np.where(deviation > 0, 1 / np.maximum(deviation, 1e-9), 0) + deviation
    assert_close(dx, np.broadcast_to(slope, x.shape))


def pointers(*trees):
    return [v.unsafe_buffer_pointer() for v in jax.tree.leaves(trees)]


@pytest.mark.parametrize("shape", [(3,), (0, 3), (1, 3), (4, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_no_array_shares_a_buffer_with_another(shape, dtype):
    x = jnp.ones(shape, dtype)
    start = Standardizer.init(3)

    def made():
        yield (start,)
        fitted = Standardizer.fit(x)
        yield fitted, x
        yield jax.jit(Standardizer.fit)(x), x
        for update in (Standardizer.update, jax.jit(Standardizer.update)):
            yield update(start, x), start, x
        for merge in (Standardizer.merge, jax.jit(Standardizer.merge)):
            yield merge(fitted, start), fitted, start
        yield (jax.jit(lambda: Standardizer.init(3))(),)

    for trees in made():
        assert len(set(pointers(*trees))) == len(pointers(*trees))
    update = jax.jit(Standardizer.update, donate_argnums=0)
    stats = update(update(start, x), x)
    np.testing.assert_array_equal(stats.size, 2 * Standardizer.fit(x).size)


def test_a_checkpoint_of_flax_or_any_other_holds_its_leaves():
    stats = Standardizer.fit(data(6, 3), axis=-1)
    leaves, structure = jax.tree.flatten(stats)
    assert all(isinstance(v, jax.Array) for v in leaves) and len(leaves) == 7
    loaded = serialization.from_bytes(leaves, serialization.to_bytes(leaves))
    again = jax.tree.unflatten(structure, loaded)
    np.testing.assert_array_equal(again.apply(data(2, 3)), stats.apply(data(2, 3)))
    assert again.axis == -1


@pytest.mark.parametrize("axis", [1, -1, (-1,)])
def test_flax_writes_and_reads_it_whatever_the_feature_axis(axis):
    """What is saved of (batch, time, features) serves (batch, features, time)."""
    x = data(6, 5, 3, offset=1e4)
    stats = Standardizer.fit(x)
    saved = serialization.to_bytes({"seen": stats})
    like = {"seen": Standardizer.init(3, axis=axis)}
    loaded = serialization.from_bytes(like, saved)["seen"]
    assert loaded.axis == axis
    turned = np.moveaxis(x, -1, axis) if axis == 1 else x
    y = np.asarray(loaded.apply(turned))
    np.testing.assert_array_equal(
        np.moveaxis(y, axis, -1) if axis == 1 else y, stats.apply(x)
    )
    for old, new in zip(jax.tree.leaves(stats), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(old, new)
        assert new.dtype == old.dtype


def test_flax_reads_nothing_else():
    saved = serialization.to_bytes({"mean": np.zeros(3), "var": np.ones(3)})
    with pytest.raises(ValueError, match="a Standardizer consists of mean, var, res"):
        serialization.from_bytes(Standardizer.init(3), saved)


def test_each_series_by_itself_and_back():
    """Reversible instance normalization: levels and scales of series cancel."""
    past = data(4, 48, 3, offset=[0, 1e4, -1e4], deviation=[1, 1, 300])

    def forecast(x):
        series = Standardizer.fit(x, axis=(0, 2))
        return series.invert(2 * series.apply(x)[:, ::4])

    exact = past.astype(np.float64)
    mean, deviation = exact.mean(1, keepdims=True), exact.std(1, keepdims=True)
    expected = mean + 2 * (exact - mean)[:, ::4]
    ahead = np.asarray(jax.jit(forecast)(past), np.float64)
    assert ahead.shape == (4, 12, 3)
    # Forecasts at level 1e4 are rounded to 1e-3.
    size = np.maximum(deviation, abs(mean))
    assert_close(ahead / size, expected / size)


class Linen(nn.Module):
    inputs: Standardizer

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(self.inputs.apply(x))


def test_a_constant_of_a_flax_linen_model():
    x = data(6, 3, offset=1e4)
    model = Linen(Standardizer.fit(x))
    variables = model.init(jax.random.key(0), x)
    assert list(variables) == ["params"]
    run = jax.jit(lambda model, v, x: model.apply(v, x), static_argnums=0)
    expected = nn.Dense(2).apply(
        {"params": variables["params"]["Dense_0"]}, model.inputs.apply(x)
    )
    assert_close(run(model, variables, x), cast(Any, expected))


class Streaming(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        seen = self.variable("input_stats", "seen", Standardizer.init, x.shape[-1])
        if train and not self.is_initializing():
            seen.value = seen.value.update(x)
        return seen.value.apply(x)


def test_a_variable_of_a_flax_linen_model():
    x = data(8, 3, offset=5)
    variables = Streaming().init(jax.random.key(0), x, train=True)
    for batch in (x[:2], x[2:]):
        _, variables = Streaming().apply(
            variables, batch, train=True, mutable=["input_stats"]
        )
    assert_moments(variables["input_stats"]["seen"], x)


class Nnx(nnx.Module):
    def __init__(self, inputs, rngs):
        self.inputs = inputs
        self.dense = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.inputs.apply(x))


def test_a_constant_of_a_flax_nnx_model():
    x = data(6, 3, offset=1e4)
    stats = Standardizer.fit(x)
    model = Nnx(nnx.data(stats), nnx.Rngs(0))
    assert_close(nnx.jit(lambda m, x: m(x))(model, x), model.dense(stats.apply(x)))
    gradient = nnx.grad(lambda m: m(x).sum())(model)
    assert list(gradient) == ["dense"]


def test_a_variable_of_a_flax_nnx_model():
    x = data(8, 3, offset=5)
    model = Nnx(nnx.Variable(Standardizer.init(3)), nnx.Rngs(0))

    @nnx.jit
    def see(model, x):
        model.inputs.set_value(model.inputs.get_value().update(x))

    for batch in (x[:4], x[4:]):
        see(model, batch)
    assert_moments(model.inputs.get_value(), x)


def test_orbax_restores_it_with_a_flax_nnx_model(tmp_path):
    """From shapes alone, and to go on with."""
    x = data(8, 3, offset=5)
    make = lambda: Nnx(nnx.Variable(Standardizer.init(3)), nnx.Rngs(0))  # noqa: E731
    model = make()
    model.inputs.set_value(model.inputs.get_value().update(x[:5]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
    graph, shapes = nnx.split(nnx.eval_shape(make))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "model", shapes)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(again(x), model(x))
    assert_moments(again.inputs.get_value().update(x[5:]), x)


SEEN = Standardizer.init(3)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: SEEN.apply(jnp.ones((2, 4))),
            ValueError,
            r"of shape \(3,\), but axis=-1 of an input of shape \(2, 4\) holds "
            r"features of shape \(4,\): pass data with the same features",
        ),
        (lambda: SEEN.invert(jnp.ones((2, 4))), ValueError, "of an input of shape"),
        (lambda: SEEN.update(jnp.ones((3, 1))), ValueError, "of an input of shape"),
        (
            lambda: SEEN.merge(Standardizer.init(1)),
            ValueError,
            r"of shapes \(3,\) and \(1,\): fit both parts",
        ),
        (
            lambda: SEEN.merge(cast(Any, jnp.ones((2, 3)))),
            TypeError,
            "merge takes another Standardizer, got .*: pass a batch of data to update",
        ),
        (
            lambda: Standardizer.fit(jnp.ones(3), axis=1),
            ValueError,
            "axis=1 is out of range for an array of rank 1",
        ),
        (
            lambda: Standardizer.fit(jnp.ones(3), axis=cast(Any, 0.5)),
            TypeError,
            "axis must be an integer",
        ),
        (
            lambda: Standardizer.fit(jnp.ones((3, 2)), mask=jnp.ones(3)),
            ValueError,
            r"mask of shape \(3,\) does not broadcast",
        ),
        (
            lambda: Standardizer.fit(cast(Any, (jnp.ones((3, 2)) for _ in range(2)))),
            TypeError,
            "got an iterator, generator: start from Standardizer.init",
        ),
        (
            lambda: Standardizer.fit(jnp.ones((3, 2), jnp.complex64)),
            TypeError,
            "takes real data, got complex64",
        ),
        (
            lambda: Standardizer.fit(jnp.ones((3, 2)), axis_name="data"),
            ValueError,
            "axis_name='data' is not bound here",
        ),
        (
            lambda: Standardizer.fit(3.0),
            ValueError,
            "axis=-1 is out of range for a scalar, which has no axes: pass an array",
        ),
        (
            lambda: Standardizer.fit(jnp.ones(3), axis=cast(Any, None)),
            TypeError,
            "axis must be an integer or a sequence of integers, got None",
        ),
        (
            lambda: Standardizer.fit(np.ma.masked_less(np.ones((3, 2)), 0)),
            TypeError,
            "got a masked array of NumPy: pass x.data, and mask=",
        ),
        (
            lambda: Standardizer.fit(jnp.ones((3, 2)), mask=np.full((3, 2), 0.5)),
            ValueError,
            "mask must be boolean, or 0 and 1, got 0.5 .*: weights are no mask",
        ),
        (
            lambda: Standardizer.fit(jnp.ones((3, 2)), weights=jnp.ones(3)),
            ValueError,
            r"weights of shape \(3,\) does not broadcast .* to weigh whole examples",
        ),
        (
            lambda: SEEN.update(jnp.ones((3, 3)), weights=np.array([[1], [-2], [0]])),
            ValueError,
            "weights must be finite and not negative, got -2",
        ),
        (
            lambda: SEEN.update(jnp.ones((1, 3)), weights=cast(Any, "ab")),
            TypeError,
            "weights must be real numbers, got dtype <U2",
        ),
        (
            lambda: SEEN.update(jnp.ones((1, 3)), decay=1.5),
            ValueError,
            "decay must be from 0 to 1, got 1.5",
        ),
        (
            lambda: SEEN.update(jnp.ones((1, 3)), decay=cast(Any, [0.5, 0.5])),
            TypeError,
            "decay must be one real number",
        ),
        (
            lambda: SEEN.apply(jnp.ones((1, 3)), clip=0),
            ValueError,
            "clip must be over 0, got 0",
        ),
        (
            lambda: SEEN.apply(jnp.ones(3), dtype=np.int32),
            TypeError,
            "dtype must be one of real floating point, such as float32, got .*int32",
        ),
        (
            lambda: SEEN.invert(jnp.ones(3), dtype=np.float64),
            TypeError,
            "dtype=float64 needs jax_enable_x64.*: set it, or pass float32",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("dtype", [jnp.complex64, np.int32, "half a float", None])
def test_dtypes_that_moments_cannot_have(dtype):
    with pytest.raises(TypeError, match="dtype must be one of real floating point"):
        Standardizer.init(3, dtype=dtype)


@pytest.mark.parametrize(
    "shape, kind",
    [(None, TypeError), ("ab", TypeError), (1.5, TypeError)]
    + [((2, -1), ValueError), (-1, ValueError)],
)
def test_shapes_that_features_cannot_have(shape, kind):
    with pytest.raises(kind, match="feature_shape must "):
        Standardizer.init(shape)
    with pytest.raises(TypeError, match="axis must be an integer or a sequence"):
        Standardizer.init(3, axis=cast(Any, "b"))


@pytest.mark.parametrize(
    "x", [None, "ab", b"ab", {}, [[1, 2], [3]], [None], np.array(["a"]), object()]
)
def test_what_is_no_data(x):
    message = "the data must be one array of real numbers, got"
    for call in (Standardizer.fit, SEEN.update, SEEN.apply, SEEN.invert):
        with pytest.raises(TypeError, match=message):
            call(x)
    with pytest.raises(TypeError, match="merge takes another Standardizer"):
        SEEN.merge(x)
