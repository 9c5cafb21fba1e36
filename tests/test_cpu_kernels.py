"""The kernels for CPUs beside float64, over sizes and numbers of every kind."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm._cpu import library
from jaxnorm._primitives._views import View, view

pytestmark = pytest.mark.skipif(
    library.problem() is not None, reason=str(library.problem())
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Of sums, to the sum of what is summed without its sign: roundoff in lanes and blocks.
SUMMED = {"float32": 2e-6, "float64": 1e-14} | dict.fromkeys(DTYPES[1:3], 2e-6)
# Of results in the dtype of x, to the largest.
ROUNDED = {"float32": 3e-6, "bfloat16": 8e-3, "float16": 1e-3, "float64": 1e-13}
VIEWS = {
    "channels last": (1, 1000, 64, 1),
    "three channels": (2, 57, 3, 1),
    "two channels, many": (1, 40001, 2, 1),
    "an odd number": (1, 33, 701, 1),
    "many channels, few of each": (1, 3, 20011, 1),
    "examples": (4, 300, 130, 1),
    "channels first": (3, 5, 7, 11),
    "short runs": (2, 3, 2, 2),
    "short runs of many examples": (2, 33, 5, 7),
    "images of 7 by 7": (1, 64, 64, 49),
    "long runs": (2, 3, 2, 9001),
    "one run": (1, 1, 1, 100003),
    "one of each": (5, 1, 7, 1),
    "one in all": (1, 1, 1, 1),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def sizes(view):
    return {k: np.int64(v) for k, v in view._asdict().items()}


def accumulated(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def small(view, x):
    return jax.ShapeDtypeStruct((view.outer, view.kept), accumulated(x))


def moments(view, x, center=True):
    call = jax.ffi.ffi_call("jaxnorm_moments", [small(view, x)] * 3)
    return [np.array(v) for v in call(x, center=center, **sizes(view))]


def sums(view, x, g, mean):
    call = jax.ffi.ffi_call("jaxnorm_sums", [small(view, x)] * 2)
    return [np.asarray(v) for v in call(x, g, mean, **sizes(view))]


def normal(shape, dtype, mean=0.0, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(mean + rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(name, dtype):
    v = View(*VIEWS[name])
    x = normal(v, dtype, 3.0)
    wide = np.asarray(x, np.float64)
    mean, var, residue = moments(v, x)
    limit = SUMMED[dtype]
    exact = wide.mean((1, 3))
    assert np.abs((mean + residue.astype(np.float64)) - exact).max() <= 5 * limit
    assert np.abs(var - wide.var((1, 3))).max() <= limit * max(1, wide.var())
    none, square, nothing = moments(v, x, center=False)
    np.testing.assert_allclose(square, (wide**2).mean((1, 3)), rtol=limit)
    assert not none.any() and not nothing.any()


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), ("bfloat16", "float32")])
def test_sums(name, dtypes):
    v = View(*VIEWS[name])
    x, g = normal(v, dtypes[0], 3.0), normal(v, dtypes[1], seed=1)
    mean = jnp.asarray(normal((v.outer, v.kept), accumulated(x), 3.0))
    wide, along = np.asarray(x, np.float64), np.asarray(g, np.float64)
    tilted = along * (wide - np.asarray(mean, np.float64)[:, None, :, None])
    for found, terms in zip(sums(v, x, g, mean), (along, tilted), strict=True):
        room = SUMMED[dtypes[0]] * np.abs(terms).sum((1, 3))
        assert (np.abs(found - terms.sum((1, 3))) <= room).all()


FAR = {
    "channels": (1, 30000, 16, 1),
    "runs": (2, 1, 3, 30000),
    "both": (1, 40, 3, 700),
    "short runs": (1, 700, 3, 49),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("first", [None, 0.0])
def test_the_variance_far_from_zero(name, first):
    """mean / std = 1e4, also where the first element is an outlier."""
    v = View(*FAR[name])
    x = normal(v, "float32", 1e4)
    if first is not None:
        x = x.at[:, 0, :, 0].set(first)
    mean, var, residue = moments(v, x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(var, wide.var((1, 3)), rtol=1e-6)
    exact = wide.mean((1, 3))
    np.testing.assert_allclose(mean.astype(np.float64) + residue, exact, rtol=1e-11)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("value", [0.1, 1e30, -3.0])
def test_constants_are_exact(name, value):
    v = View(*VIEWS[name])
    x = jnp.full(v, value, jnp.float32)
    mean, var, residue = moments(v, x)
    assert (mean == np.float32(value)).all() and not var.any() and not residue.any()


@pytest.mark.parametrize("name", ["channels last", "three channels", "channels first"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_set(name, value):
    v = View(*VIEWS[name])
    x = normal(v, "float32")
    spoilt = x.at[0, -1, 1, -1].set(value)
    for found, clean in zip(moments(v, spoilt), moments(v, x), strict=True):
        assert not np.isfinite(found[0, 1])
        found[0, 1] = clean[0, 1]
        np.testing.assert_array_equal(found, clean)
    g = normal(v, "float32", seed=1)
    mean = jnp.zeros((v.outer, v.kept))
    mean = mean.astype(jnp.float32)
    plain, tilted = sums(v, spoilt, g, mean)
    assert np.isfinite(plain).all() and not np.isfinite(tilted[0, 1])
    assert np.isfinite(np.delete(tilted, 1, 1)).all()


def test_nothing():
    for v in (View(0, 5, 3, 1), View(2, 5, 0, 1), View(2, 0, 3, 1), View(2, 5, 3, 0)):
        x = jnp.zeros(v, jnp.float32)
        for found in moments(v, x):
            np.testing.assert_array_equal(found, np.zeros((v.outer, v.kept)))
        mean = jnp.zeros((v.outer, v.kept), jnp.float32)
        for found in sums(v, x, x, mean):
            np.testing.assert_array_equal(found, np.zeros((v.outer, v.kept)))


ROWS = [(1, 10, 64), (3, 7, 49), (2, 1, 3), (1, 5, 20011), (4, 100, 130), (1, 3001, 33)]


def row_norm(x, epsilon, scale, bias, center, shared):
    outer, rows, features = x.shape
    given = [v for v in (scale, bias) if v is not None]
    row = jax.ShapeDtypeStruct((outer, rows), accumulated(x))
    y = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = jax.ffi.ffi_call("jaxnorm_row_norm", [y, row, row, row])
    return call(x, epsilon, *given, **row_attributes(x, scale, bias, center, shared))


def row_attributes(x, scale, bias, center, shared):
    outer, rows, features = map(np.int64, x.shape)
    return dict(
        outer=outer,
        rows=rows,
        features=features,
        param_outer=np.int64(1) if shared else outer,
        center=center,
        has_scale=scale is not None,
        has_bias=bias is not None,
    )


def row_gradient(x, dy, epsilon, stats, scale, bias, moving, center, shared):
    params = (1 if shared else x.shape[0], x.shape[2])
    param = jax.ShapeDtypeStruct(params, accumulated(x))
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    results += [param for v in (scale, bias) if v is not None]
    call = jax.ffi.ffi_call("jaxnorm_row_gradient", results)
    given = [v for v in (scale, *moving) if v is not None]
    attributes = row_attributes(x, scale, bias, center, shared)
    moved = moving[0] is not None
    return call(x, dy, epsilon, *stats, *given, has_moments=moved, **attributes)


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_rows(shape, dtype, center, shared):
    x, dy = normal(shape, dtype, 2.0), normal(shape, dtype, seed=1)
    wide = accumulated(x)
    params = (1 if shared else shape[0], shape[2])
    scale, bias = normal(params, wide, 1.0, 2), normal(params, wide, 0.0, 3)
    moving = [normal(shape[:2], wide, 0.0, seed) for seed in (4, 5)]
    epsilon = jnp.asarray(1e-3, wide)
    y, *stats = row_norm(x, epsilon, scale, bias, center, shared)
    grads = row_gradient(x, dy, epsilon, stats, scale, bias, moving, center, shared)

    x, dy, scale, bias, *moving = (
        np.asarray(v, np.float64) for v in (x, dy, scale, bias, *moving)
    )
    n, across = shape[2], (0, 1) if shared else (1,)
    mean = x.mean(-1, keepdims=True) * center
    away = x - mean
    rstd = 1 / np.sqrt((away**2).mean(-1, keepdims=True) + float(epsilon))
    x_hat, gain = away * rstd, scale[:, None]
    d = dy * gain
    level = d.mean(-1, keepdims=True) * center
    dx = rstd * (d - level - x_hat * (d * x_hat).mean(-1, keepdims=True))
    dmean, dvar = (v[..., None] for v in moving)
    dx += (center * dmean + 2 * dvar * away) / n
    of_params = [(dy * x_hat).sum(across), dy.sum(across)]
    close(y, x_hat * gain + bias[:, None], ROUNDED[dtype])
    close(grads[0], dx, ROUNDED[dtype])
    for found, exact in zip(grads[1:], of_params, strict=True):
        most = np.abs(dy).sum(across).max() * max(1, np.abs(x_hat).max())
        error = np.abs(np.asarray(found).reshape(exact.shape) - exact).max()
        assert error <= SUMMED[dtype] * most


def close(found, exact, rounding):
    error = np.abs(np.asarray(found, np.float64) - exact).max()
    assert error <= rounding * np.abs(exact).max()


@pytest.mark.parametrize(
    "given", [*itertools.product([True, False], [True, False], [True, False])]
)
def test_rows_without_parameters(given):
    """As with a scale of 1, a bias of 0, and moments that nothing was made of."""
    with_scale, with_bias, with_moments = given
    x, dy = normal((2, 5, 70), "float32"), normal((2, 5, 70), "float32", seed=1)
    ones, zeros = jnp.ones((1, 70), jnp.float32), jnp.zeros((1, 70), jnp.float32)
    none = [jnp.zeros((2, 5), jnp.float32)] * 2
    epsilon = jnp.asarray(1e-6, jnp.float32)
    scale, bias = ones if with_scale else None, zeros if with_bias else None
    moving = none if with_moments else [None, None]
    y, *stats = row_norm(x, epsilon, scale, bias, True, True)
    whole, *_ = row_norm(x, epsilon, ones, zeros, True, True)
    np.testing.assert_array_equal(y, whole)
    found = row_gradient(x, dy, epsilon, stats, scale, bias, moving, True, True)
    dx, *params = row_gradient(x, dy, epsilon, stats, ones, zeros, none, True, True)
    expected = [v for v, on in zip(params, (with_scale, with_bias), strict=True) if on]
    np.testing.assert_allclose(found[0], dx, atol=1e-6)
    for a, b in zip(found[1:], expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_far_from_zero_and_constant():
    x = normal((1, 30, 1000), "float32", 1e4)
    epsilon = jnp.asarray(0, jnp.float32)
    y, *_ = row_norm(x, epsilon, None, None, True, True)
    wide = np.asarray(x, np.float64)
    exact = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    close(y, exact, 1e-6)
    x, bias = jnp.full((1, 30, 1000), 0.1, jnp.float32), normal((1, 1000), "float32")
    epsilon = jnp.asarray(1e-6, jnp.float32)
    y, *_ = row_norm(x, epsilon, None, bias, True, True)
    np.testing.assert_array_equal(y[0], np.broadcast_to(bias, (30, 1000)))


def test_squares_past_the_largest_number_give_nan():
    x = jnp.asarray([[[1e30, -1e30, 2e30]]], jnp.float32)
    y, *_ = row_norm(x, jnp.asarray(1e-6, jnp.float32), None, None, True, True)
    assert np.isnan(np.asarray(y)).all()


HALVES = """
import jax, jax.numpy as jnp, numpy as np, hashlib
from jaxnorm._cpu import library
import jaxnorm
assert library.problem() is None
x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 40, 40, 96)), "float32")
stats = jaxnorm.init_stats(96)
norms = [
    lambda x: jaxnorm.batch_norm(x, stats, use_running_average=False)[0],
    jaxnorm.layer_norm,
    lambda x: jaxnorm.group_norm(x, jnp.ones(96)),
    lambda x: jaxnorm.instance_norm(x, jnp.ones(40), axis=1),
]
for norm in norms:
    both = jax.jit(lambda x: jax.value_and_grad(lambda x: jnp.sin(norm(x)).sum())(x)[1])
    print(hashlib.sha256(np.asarray(both(x)).tobytes()).hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads():
    def bits(cpus):
        command = ["taskset", "-c", cpus, sys.executable, "-c", HALVES]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()

    one, two = bits("0"), bits("0,1")
    assert len(one) == 4 and one == two


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_every_number_of_half_precision_is_widened_and_rounded(kind):
    """All bit patterns, as rows of one element, whose mean is that element."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), kind)
    v = View(2**16, 1, 1, 1)
    mean, *_ = moments(v, x.reshape(v))
    wide = np.asarray(x, np.float32)
    finite = np.isfinite(wide)
    wide[np.abs(wide) < np.finfo(np.float32).tiny] = 0  # as anywhere in XLA on a CPU
    np.testing.assert_array_equal(mean[finite, 0], wide[finite])
    assert not np.isfinite(mean[~finite]).any()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_results_are_rounded_to_nearest_even(kind):
    """Rows of two numbers 1 and -1, scaled: y is the scale and its negative."""
    rng = np.random.default_rng(0)
    scale = rng.standard_normal(4000) * 10.0 ** rng.integers(-9, 6, 4000)
    ulp = float(jnp.finfo(kind).eps)
    ties = [1 + n * ulp / 2 for n in (1, 3, 5, 7)]
    rest = [1e30, 65519.0, 65520.0, np.inf, np.nan]
    scale = np.array([*scale, *ties, *rest], np.float32)
    params = jnp.asarray(np.repeat(scale, 2)[None])
    rows = jnp.tile(jnp.asarray([1.0, -1.0], kind), len(scale))[None, None]
    y, *_ = row_norm(rows, jnp.float32(0), params, None, True, True)
    found = np.asarray(y[0, 0, ::2], np.float32)
    expected = np.asarray(jnp.asarray(scale).astype(kind), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "shape, reduce, expected",
    [
        ((8, 4, 4, 16), (0, 1, 2), (1, 128, 16, 1)),
        ((8, 16, 4, 4), (0, 2, 3), (1, 8, 16, 16)),
        ((8, 4, 4, 2, 8), (1, 2, 4), (8, 16, 2, 8)),
        ((8, 16, 4, 4), (2, 3), (1, 1, 128, 16)),
        ((8, 4, 4, 16), (1, 2), (8, 16, 16, 1)),
        ((8, 16), (1,), (1, 1, 8, 16)),
        ((8, 1, 16), (1,), (1, 1, 128, 1)),
        ((), (), (1, 1, 1, 1)),
        ((2, 3, 4, 5, 6), (0, 2, 4), None),
    ],
)
def test_views(shape, reduce, expected):
    assert view(shape, reduce) == (None if expected is None else View(*expected))


@pytest.mark.parametrize("name", FAR)
def test_float64_far_from_zero(name):
    """Where a mean in float64 is rounded by as much as these batches differ."""
    v = View(*FAR[name])
    x = normal(v, "float64", 1e9)
    mean, var, residue = moments(v, x)
    near = np.asarray(x) - 1e9  # exact
    np.testing.assert_allclose(var, near.var((1, 3)), rtol=1e-12)
    np.testing.assert_allclose((mean - 1e9) + residue, near.mean((1, 3)), atol=1e-12)
