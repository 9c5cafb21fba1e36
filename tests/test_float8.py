"""Results in float8: rounded once, saturated, and the largest magnitude beside."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import to_float8

DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
X = np.random.default_rng(0).normal(3, 2, (8, 40)).astype(jnp.bfloat16)
SCALE, BIAS = np.random.default_rng(1).normal(0, 100, (2, 40)).astype(np.float32)
NORMS = {
    "layer": (
        jaxnorm.LayerNorm(),
        {"scale": SCALE, "bias": BIAS},
        reference.layer_norm(X, SCALE, BIAS).y,
    ),
    "rms": (jaxnorm.RMSNorm(), {"scale": SCALE}, reference.rms_norm(X, SCALE).y),
}
UNIT = 1e-5  # of float32, for a norm of 40 numbers, relative to the largest


def by_definition(y: Any, scale: float, dtype: Any) -> np.ndarray:
    """By ml_dtypes' conversion of float64, which knows no saturation."""
    limit = float(jnp.finfo(dtype).max)
    return np.clip(np.asarray(y, np.float64) / scale, -limit, limit).astype(dtype)


def assert_rounded_once(q, y, scale, dtype):
    """That `q` is what some number in float32's reach of `y` is rounded to."""
    assert q.dtype == dtype and q.shape == y.shape
    reach = UNIT * abs(y).max()
    low, high = (by_definition(v, scale, dtype) for v in (y - reach, y + reach))
    found, low, high = (np.asarray(v).astype(np.float32) for v in (q, low, high))
    assert ((low <= found) & (found <= high)).all()
    assert (low == high).mean() > 0.95  # the test can tell


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [np.float32, jnp.bfloat16, np.float16])
def test_numbers_of_all_sizes(dtype, of, strict_dtypes):
    """Subnormal ones, ties and some beyond the limit; the scale is a power of two."""
    size = np.exp2(np.linspace(-16, 15, 1021))
    y = np.concatenate([size, -size, np.exp2(np.arange(-20, 15)) * 1.0625, [0]])
    y = y.astype(of)
    for scale in (0.25, 8.0):
        q, amax = jax.jit(to_float8, static_argnums=2)(y, scale, dtype)
        expected = by_definition(y, scale, dtype)
        np.testing.assert_array_equal(np.asarray(q), expected)
        assert q.dtype == dtype and amax.dtype == jnp.float32 and amax.shape == ()
        assert float(amax) == abs(y.astype(np.float64)).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("scale", [0.7, 0.01, 1e-4])
def test_norms(dtype, name, scale):
    """Of bfloat16, through float32: within the limits, and beyond them."""
    norm, params, y = NORMS[name]

    @jax.jit
    def both(x, params, scale):
        y = norm(x, params, {}, dtype=jnp.float32)[0]
        return to_float8(y, scale, dtype)

    q, amax = both(X, params, scale)
    assert_rounded_once(q, y, scale, dtype)
    np.testing.assert_allclose(amax, abs(y).max(), rtol=UNIT)
    saturated = abs(y) > 1.1 * scale * float(jnp.finfo(dtype).max)
    largest = abs(np.asarray(q).astype(np.float32)[saturated])
    assert (largest == float(jnp.finfo(dtype).max)).all()


def test_norms_of_both_flax_apis():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            norm = jaxnorm.linen.LayerNorm(dtype=jnp.float32, scale_init=constant)
            return to_float8(norm(x), scale)

    def constant(key, shape, dtype):
        return jnp.asarray(SCALE, dtype)

    def call(module, x, scale):
        return to_float8(module(x), scale)

    y = reference.layer_norm(X, SCALE).y
    block, module = (
        Block(),
        jaxnorm.nnx.LayerNorm(40, dtype=jnp.float32, rngs=nnx.Rngs(0)),
    )
    cast(Any, module.scale)[...] = jnp.asarray(SCALE)
    variables = block.init(jax.random.key(0), X, 1.0)
    for q, amax in (
        jax.jit(block.apply)(variables, X, jnp.ones(1)),
        nnx.jit(call)(module, X, jnp.ones(1)),
    ):
        assert_rounded_once(q, y, 1, jnp.float8_e4m3fn)
        np.testing.assert_allclose(amax, abs(y).max(), rtol=UNIT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_flax_does(dtype):
    y, scale = np.asarray(NORMS["rms"][2], np.float32), jnp.full(1, 0.3)
    q, amax = to_float8(y, scale, dtype)
    theirs = fp8_ops.quantize(jnp.asarray(y), dtype, scale, jnp.float32)
    np.testing.assert_array_equal(np.asarray(q), np.asarray(theirs))
    history = fp8_ops.compute_amax_history(y, jnp.zeros(2))
    assert history[0] == amax
    back = fp8_ops.dequantize(q, jnp.float32, scale)
    np.testing.assert_array_equal(back, q.astype(jnp.float32) * scale[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(dtype):
    y = np.array([[1, np.nan, -2], [np.inf, -np.inf, 3]], np.float32)
    q, amax = jax.jit(to_float8, static_argnums=2)(y, 1.0, dtype)
    limit = float(jnp.finfo(dtype).max)
    expected = np.array([[1, np.nan, -2], [limit, -limit, 3]])
    np.testing.assert_array_equal(np.asarray(q).astype(np.float32), expected)
    assert np.isnan(amax)
    assert to_float8(y[1], 1.0, dtype)[1] == np.inf


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (7,), (2, 3, 5)])
def test_shapes(shape):
    y = np.full(shape, -2.5, np.float32)
    for scale in (1, 1.0, np.float32(1), jnp.ones(()), jnp.ones(1)):
        q, amax = to_float8(y, scale)
        np.testing.assert_array_equal(np.asarray(q).astype(np.float32), y)
        assert amax == (2.5 if y.size else 0)


def test_float64():
    with jax.enable_x64(True):
        q, amax = to_float8(np.array([1 + 2**-4 + 2**-40, -2]), 1.0)
        assert amax.dtype == jnp.float64
        # A tie in float32, which float64 tells from one.
        np.testing.assert_array_equal(np.asarray(q).astype(float), [1.125, -2])


def test_the_largest_of_all_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    y = np.arange(-40, 24, dtype=np.float32).reshape(8, 8)

    def local(y, axis_name):
        q, amax = to_float8(y, 1.0, axis_name=axis_name)
        return q, amax[None]

    for name, expected in (("data", [40] * 8), (("data",), [40] * 8), (None, None)):
        q, amax = jax.jit(
            jax.shard_map(
                lambda y, name=name: local(y, name),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P("data"),
            )
        )(y)
        assert amax.tolist() == (expected or abs(y).max(1).tolist())
        np.testing.assert_array_equal(np.asarray(q), np.asarray(to_float8(y, 1.0)[0]))
    _, amax = jax.vmap(lambda y: to_float8(y, 1.0, axis_name="i"), axis_name="i")(y)
    assert amax.tolist() == [40] * 8
    assert (
        jax.vmap(lambda y: to_float8(y, 1.0))(y)[1].tolist() == abs(y).max(1).tolist()
    )
    explicit = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(explicit):
        q, amax = jax.jit(to_float8)(jax.device_put(y, P("data")), 1.0)
    assert q.sharding.spec == P("data", None) and amax == 40


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("argument", [0, 1])
def test_derivatives_are_refused(of, argument):
    """Those of what is cast would be float8, and here all 0."""

    def loss(y, scale):
        return 1e-4 * to_float8(y, scale)[of].astype(jnp.float32).sum()

    with pytest.raises(
        TypeError, match="has no derivative, .*jax.custom_vjp, or train"
    ):
        jax.grad(loss, argument)(jnp.ones((2, 3)), 1.0)
    with pytest.raises(TypeError, match="has no derivative"):
        jax.jvp(jax.jit(loss), (jnp.ones(3), 1.0), (jnp.ones(3), 1.0))
    stopped = jax.grad(lambda y: loss(jax.lax.stop_gradient(y), 1.0) + y.sum())
    np.testing.assert_array_equal(stopped(jnp.ones(3)), np.ones(3))


def test_flax_trains_after_a_norm():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            product = fp8_ops.Fp8DirectDotGeneralOp
            return nn.Dense(16, dot_general_cls=product)(jaxnorm.linen.RMSNorm()(x))

    block = Block()
    x = X.astype(np.float32)
    variables = block.init(jax.random.key(0), x)
    grads = jax.jit(jax.grad(lambda v: cast(Any, block.apply(v, x)).var()))(variables)
    assert abs(grads["params"]["RMSNorm_0"]["scale"]).min() > 0
    amax = grads[fp8_ops.OVERWRITE_WITH_GRADIENT]["Dense_0"]["Fp8DirectDotGeneralOp_0"][
        "input_amax_history"
    ]
    y = jaxnorm.rms_norm(x)
    assert float(amax[0]) == float(to_float8(y, 1.0)[1])


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ((1.0, 1.0, jnp.float32), TypeError, "dtype must be jnp.*e4m3fn or .* float32"),
        ((1.0, 1.0, "e4m3"), TypeError, "dtype must be .*e5m2, got 'e4m3'"),
        ((1.0, 1.0, jnp.float8_e5m2fnuz), TypeError, "got .* float8_e5m2fnuz"),
        ((1.0, 1.0, None), TypeError, "dtype must be jnp.*, got None"),
        ((1.0, 0.0), ValueError, "scale must be over 0, got 0.0"),
        ((1.0, float("nan")), ValueError, "scale must be a number, got nan"),
        ((1.0, jnp.ones(3)), TypeError, r"scale must be one real number, .*\(3,\)"),
        ((1.0, jnp.ones((1, 1))), TypeError, "scale must be one real number"),
        ((1.0, True), TypeError, "scale must be one real number, got True"),
        ((1j, 1.0), TypeError, "y must be of real numbers, got complex64"),
        (("y", 1.0), TypeError, "y must be an array of numbers, got 'y'"),
    ],
)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        to_float8(*arguments)
    with pytest.raises(ValueError, match="axis_name='data' is not bound here"):
        to_float8(1.0, 1.0, axis_name="data")


@pytest.mark.parametrize("dtype", [*DTYPES, jnp.float8_e4m3fnuz, jnp.float4_e2m1fn])
def test_norms_send_there_whoever_asks_them_for_float8(dtype):
    message = "dtype must be a dtype of 16 bits or more, got .*jaxnorm.to_float8"
    for call in (
        lambda: jaxnorm.LayerNorm()(X, {}, {}, dtype=dtype),
        lambda: jaxnorm.LayerNorm().init_params((40,), dtype),
        lambda: jaxnorm.linen.RMSNorm(dtype=dtype).init(jax.random.key(0), X),
        lambda: jaxnorm.linen.RMSNorm(param_dtype=dtype).init(jax.random.key(0), X),
        lambda: jaxnorm.nnx.LayerNorm(40, dtype=dtype, rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(TypeError, match=message):
            call()
