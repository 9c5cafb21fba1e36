"""Layer and RMS norm of a sum, which they return as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from norms import assert_close

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.usefixtures("strict_dtypes")
FUNCTIONS = {"LayerNorm": jaxnorm.layer_norm, "RMSNorm": jaxnorm.rms_norm}


def arrays(*shape, dtype=np.float32, count=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(1, 2, shape), dtype) for _ in range(count)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_sum_and_its_norm(name):
    x, r = arrays(4, 6, 16)
    norm = FUNCTIONS[name]
    s, y = norm(x, residual=r)
    np.testing.assert_array_equal(s, x + r)
    np.testing.assert_array_equal(y, norm(x + r))
    s, y = norm(x, residual=0)
    np.testing.assert_array_equal(s, x)
    np.testing.assert_array_equal(y, norm(x))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_sum(name, dtype):
    x, r, ds, dy = arrays(4, 6, 16, dtype=dtype, count=4)
    norm = FUNCTIONS[name]

    def ours(x, r):
        return norm(x, residual=r)

    def plain(x, r):
        s = x + r
        return s, norm(s)

    found = jax.vjp(ours, x, r)[1]((ds, dy))
    wide = [v.astype(jnp.float32) for v in (x + r, 0 * r, ds, dy)]
    exact = jax.vjp(plain, *wide[:2])[1](tuple(wide[2:]))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, dtype=dtype, summed=32, size=8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_derivatives_are_those_of_the_sum(name):
    """Second ones, under vmap, and where the sum alone is read on."""
    x, r, v = arrays(3, 2, 8, count=3)
    norm = FUNCTIONS[name]

    def ours(x, r):
        s, y = norm(x, residual=r)
        return (jnp.sin(s) * y**3).sum()

    def plain(x, r):
        return (jnp.sin(x + r) * norm(x + r) ** 3).sum()

    def second(f, x, r, v):
        return jax.jvp(jax.grad(f), (x, r), (v, v))[1]

    found, want = (
        jax.vmap(lambda *a, f=f: second(f, *a))(x, r, v) for f in (ours, plain)
    )
    assert_close(found, want, summed=64, size=np.abs(want).max())
    alone = jax.grad(lambda x: (norm(x, residual=r)[0] ** 2).sum())(x)
    np.testing.assert_allclose(alone, 2 * (x + r), rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_of_both_apis(name):
    x, r = arrays(4, 6, 16)
    want = FUNCTIONS[name](x, np.ones(16, np.float32), residual=r)
    module = getattr(jaxnorm.linen, name)()
    variables = module.init(jax.random.key(0), x, residual=r)
    layer = getattr(jaxnorm.nnx, name)(16, rngs=nnx.Rngs(0))
    generic = jaxnorm.nnx.Norm(getattr(jaxnorm, name)(), (16,))
    for found in (
        module.apply(variables, x, residual=r),
        layer(x, residual=r),
        generic(x, residual=r),
    ):
        for a, b in zip(found, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert layer(x).shape == x.shape


def test_masks_exclude_from_the_norm_and_not_from_the_sum():
    x, r = arrays(3, 8)
    mask = np.arange(8) < 5
    poisoned = x.at[:, 5:].set(jnp.nan)
    s, y = jaxnorm.layer_norm(poisoned, residual=r, mask=mask)
    np.testing.assert_array_equal(s[:, :5], (x + r)[:, :5])
    np.testing.assert_array_equal(y, jaxnorm.layer_norm(x + r, mask=mask))


def test_dtypes_widen_to_that_of_the_stream():
    x, r = arrays(3, 8)
    s, y = jaxnorm.rms_norm(x.astype(jnp.bfloat16), residual=r)
    assert s.dtype == y.dtype == jnp.float32
    norm = jaxnorm.RMSNorm()
    (s, y), _ = norm(x, {}, {}, residual=r, dtype=jnp.bfloat16)
    assert (s.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)


def test_devices_share_the_statistics_of_the_sum():
    x, r = arrays(3, 8)
    norm = jaxnorm.LayerNorm(axis_name="d")
    parts = [jnp.stack(jnp.split(v, 2, 1)) for v in (x, r)]
    call = jax.vmap(lambda x, r: norm(x, {}, {}, residual=r)[0], axis_name="d")
    s, y = (jnp.concatenate([*v], 1) for v in call(*parts))
    np.testing.assert_array_equal(s, x + r)
    assert_close(y, jaxnorm.layer_norm(x + r), summed=8)


def test_explicit_meshes():
    x, r = arrays(4, 8)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        found = jaxnorm.layer_norm(*jax.device_put([x], P("d")), residual=r)
        assert [str(jax.typeof(v)) for v in found] == ["float32[4@d,8]"] * 2
    for a, b in zip(found, jaxnorm.layer_norm(x, residual=r), strict=True):
        assert_close(a, b, summed=8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_cannot_be_added_raises(name):
    x, r = arrays(4, 8)
    with pytest.raises(ValueError, match=r"residual has shape \(8,\), but the input"):
        FUNCTIONS[name](x, residual=r[0])
    with pytest.raises(ValueError, match=r"residual has shape \(\), but the input"):
        FUNCTIONS[name](x, residual=1)


def test_partial_rms_norm_of_a_sum():
    x, r = arrays(4, 8)
    s, y = jaxnorm.rms_norm(x, residual=r, first_features=4)
    np.testing.assert_array_equal(s, x + r)
    np.testing.assert_array_equal(y, jaxnorm.rms_norm(x + r, first_features=4))
