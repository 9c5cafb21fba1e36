"""Masks: every way to broadcast, the same as removal, and NaN underneath."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import MOMENTS as NORMS
from norms import RUNNING, assert_close, expected, problem

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")
every_norm = pytest.mark.parametrize("name", NORMS)


def mask_shapes(shape):
    """Some of the shapes that NumPy broadcasts to `shape`, of every rank."""
    yield ()
    yield shape[1:]
    yield (shape[0], *[1] * (len(shape) - 1))
    yield (*shape[:-1], 1)
    yield tuple(1 if a == 1 else n for a, n in enumerate(shape))


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group"])
def test_masks_broadcast_as_in_numpy(name):
    row = NORMS[name]
    p = problem(row)
    call = jax.jit(row.norm)
    full = functools.partial(call, p.x, p.params, p.stats)
    rng = np.random.default_rng(0)
    for shape in mask_shapes(row.shape):
        mask = rng.random(shape) > 0.3
        whole = np.broadcast_to(mask, row.shape)
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=30),
            full(mask=mask),
            full(mask=whole),
        )


@pytest.mark.parametrize("name", ["batch", "layer", "group"])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32, jnp.bfloat16])
def test_masks_of_zeros_and_ones(name, dtype):
    row = NORMS[name]
    p = problem(row)
    call = jax.jit(functools.partial(row.norm, p.x, p.params, p.stats))
    jax.tree.map(
        functools.partial(assert_close, summed=p.x.size, size=30),
        call(mask=p.mask.astype(dtype)),
        call(mask=p.mask),
    )


@every_norm
def test_what_lies_under_a_mask_changes_nothing(name):
    row = NORMS[name]
    p = problem(row)

    @jax.jit
    def all_of_it(x):
        def f(x, params):
            return row.norm(x, params, p.stats, mask=p.mask)

        (y, stats), vjp = jax.vjp(f, x, p.params)
        return y, stats, vjp((p.cotangent, jax.tree.map(jnp.ones_like, stats)))

    clean = all_of_it(p.x)
    for poison in (np.nan, np.inf, 1e30):
        poisoned = all_of_it(np.where(p.mask, p.x, np.float32(poison)))
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(poisoned))
        jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
        y, _, (dx, _) = jax.tree.map(np.asarray, poisoned)
        np.testing.assert_array_equal(y[~p.mask], 0)
        np.testing.assert_array_equal(dx[~p.mask], 0)


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "instance"])
def test_masked_equals_removed(name):
    """Whole positions are masked, so that what remains is an array again."""
    row = NORMS[name]
    axis = 0 if name == "batch" else 3 if name in ("layer", "rms") else 1
    p = problem(row)
    keep = np.arange(row.shape[axis]) % 3 != 1
    keep[-1] = False
    shape = tuple(n if a == axis else 1 for a, n in enumerate(row.shape))
    removed = np.compress(keep, p.x, axis=axis)
    weights = p.cotangent

    def f(x, weights, mask):
        def loss(x):
            y, stats = row.norm(x, {}, p.stats, mask=mask)
            return (y * weights).sum(), (y, stats)

        (_, (y, stats)), dx = jax.value_and_grad(loss, has_aux=True)(x)
        return y, dx, stats

    y, dx, stats = jax.jit(f)(p.x, weights, keep.reshape(shape))
    short = jax.jit(f)(removed, np.compress(keep, weights, axis=axis), None)
    close = functools.partial(assert_close, summed=p.x.size, size=10)
    close(np.compress(keep, y, axis=axis), short[0])
    close(np.compress(keep, dx, axis=axis), short[1])
    jax.tree.map(close, stats, short[2])


@every_norm
def test_padding_changes_nothing(name):
    """Rows of padding appended and masked, as in a ragged last batch."""
    row = NORMS[name]
    p = problem(row)
    pad = np.full((8, *row.shape[1:]), np.nan, np.float32)
    x = np.concatenate([p.x, pad])
    mask = np.arange(16).reshape(-1, *[1] * (len(row.shape) - 1)) < 8
    y, stats = jax.jit(row.norm)(x, p.params, p.stats, mask=mask)
    plain, plain_stats = jax.jit(row.norm)(p.x, p.params, p.stats)
    assert_close(np.asarray(y)[:8], plain, summed=p.x.size)
    np.testing.assert_array_equal(np.asarray(y)[8:], 0)
    jax.tree.map(assert_close, stats, plain_stats)


@every_norm
def test_nothing_valid(name):
    row = NORMS[name]
    p = problem(row)
    x = np.full(row.shape, np.nan, np.float32)

    @jax.jit
    def f(x):
        def total(x):
            y, stats = row.norm(x, p.params, p.stats, mask=False)
            return y.sum(), stats

        return jax.value_and_grad(total, has_aux=True)(x)

    (total, stats), dx = f(x)
    assert total == 0
    np.testing.assert_array_equal(dx, 0)
    jax.tree.map(np.testing.assert_array_equal, stats, p.stats)


@every_norm
def test_one_example_fully_masked(name):
    """The statistics of the others are not harmed, whoever shares them."""
    row = NORMS[name]
    p = problem(row)
    mask = p.mask.copy()
    mask[2] = False
    y, stats = jax.jit(row.norm)(p.x, p.params, p.stats, mask=mask)
    ref = expected(row, p.x, p.params, mask)
    assert_close(y, ref.y, summed=p.x.size, size=300)
    assert all(np.isfinite(v).all() for v in stats.values())


@pytest.mark.parametrize("name", RUNNING)
def test_evaluation_masks_too(name):
    row = RUNNING[name]
    p = problem(row)
    x = np.where(p.mask, p.x, np.float32(np.nan))
    call = jax.jit(functools.partial(row.norm, use_running_average=True))
    y, _ = call(x, p.params, p.stats, mask=p.mask)
    plain, _ = call(p.x, p.params, p.stats)
    np.testing.assert_array_equal(y, np.where(p.mask, plain, 0))


@every_norm
@pytest.mark.parametrize(
    "mask, error, message",
    [
        (np.ones((3,), bool), ValueError, r"mask of shape \(3,\) does not broadcast"),
        (np.ones((2, 8, 4, 2, 6), bool), ValueError, "does not broadcast to the input"),
        (np.ones((8, 1, 1, 1), np.complex64), TypeError, "mask must be boolean, or 0"),
    ],
)
def test_bad_masks(name, mask, error, message):
    row = NORMS[name]
    p = problem(row, dtype=jnp.float32)
    if row.shape[-1] == mask.shape[-1]:
        mask = np.ones((5,), bool)
        message = r"mask of shape \(5,\) does not broadcast"
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda x: row.norm(x, p.params, p.stats, mask=mask), p.x)


@every_norm
def test_weights_are_no_mask(name):
    row = NORMS[name]
    p = problem(row)
    weights = np.full((1,) * len(row.shape), 0.5, np.float32)
    for mask in (weights, jnp.asarray(weights), 4 * weights, np.int32(-1), np.nan):
        with pytest.raises(ValueError, match="mask must be .* weights are no mask"):
            jax.eval_shape(
                lambda x, mask=mask: row.norm(x, p.params, p.stats, mask=mask), p.x
            )
    with pytest.raises(TypeError, match="mask must be boolean, or 0 and 1, got"):
        row.norm(p.x, p.params, p.stats, mask=cast(Any, "rows"))


def test_bad_masks_of_the_parts():
    axes = jaxnorm.BatchNorm().axes((4, 3))
    with pytest.raises(ValueError, match="does not broadcast to the input of shape"):
        jaxnorm.moments(jnp.ones((4, 3)), axes, mask=jnp.ones((4,), bool))
    with pytest.raises(ValueError, match=r"axes are for an array of shape \(4, 3\)"):
        jaxnorm.moments(jnp.ones((4, 2)), axes)
