"""Pallas kernels, interpreted on a CPU, against float64 written from the definition.

Triton's interpreter is in every jax; Mosaic's has come with jax 0.11. What they compute
is tested here, not what a GPU's compiler makes of it.
"""

import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm._kernels import columns, rows, spread, support, tiles

pytestmark = pytest.mark.usefixtures("strict_dtypes")
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
EPSILON = 1e-5


def backend(name: str) -> dict[str, Any]:
    """How to run the kernels of a backend on a CPU; skips where there is no way."""
    if name == "triton":
        return {"backend": name, "interpret": True}
    mosaic = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(mosaic, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} cannot interpret kernels of Mosaic GPU")
    return {"backend": name, "interpret": mosaic.InterpretGPUParams()}


def normal(*shape: int, dtype: str = "float32", mean=0.3, std=1.5, seed=0):
    values = np.random.default_rng(seed).normal(mean, std, shape)
    return jnp.asarray(values, dtype)


def assert_close(got, want, *, summed: int, dtype: str = "float32"):
    """Within the roundoff of `dtype` and that of as many float32 sums, by norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    tolerance = UNIT[dtype] + 4 * UNIT["float32"] * math.sqrt(summed)
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def rows_reference(x, dy, skip, scale, center):
    """dx, dscale, dbias in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    skip = 0.0 if skip is None else np.asarray(skip, np.float64)
    scale = 1.0 if scale is None else np.asarray(scale, np.float64)
    mean = x.mean(1, keepdims=True) if center else 0.0
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPSILON)
    x_hat = (x - mean) * rstd
    d = dy * scale
    dx = d - x_hat * (d * x_hat).mean(1, keepdims=True)
    dx = dx - d.mean(1, keepdims=True) if center else dx
    return dx * rstd + skip, (dy * x_hat).sum(0), dy.sum(0)


def columns_reference(x, dy, vectors, activation):
    """The sums of `columns.gradient_sums` in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    mean, slope, shift = (np.asarray(v, np.float64)[:, None] for v in vectors)
    z = (x - mean) * slope + shift
    gate = 1 / (1 + np.exp(-z))
    by_activation = {"relu": z > 0, "silu": gate + z * gate * (1 - gate)}
    d = dy * by_activation[activation]
    return d.sum(1), (d * (x - mean)).sum(1)


def backward(x, dy, scale, skip=None, *, center=True, sums=True, **run) -> Any:
    """The kernel of rows, of one batch, with sums for both parameters or none."""
    settings = {"center": center, "with_scale": sums, "with_bias": sums, **run}
    given = [None if v is None else v[None] for v in (x, dy, skip, scale)]
    dx, *sums_of = rows.backward(*given, jnp.float32(EPSILON), **settings)
    return dx[0], *(None if v is None else v[0] for v in sums_of)


ROWS = [
    *(
        ("triton", shape)
        for shape in ((1, 5), (37, 64), (70, 100), (9, 768), (3, 8192))
    ),
    *(("mosaic", shape) for shape in ((1, 128), (40, 256), (9, 768))),
]


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("name", "shape"), ROWS)
def test_rows(name, shape, dtype):
    run = backend(name)
    x, dy, skip = (normal(*shape, dtype=dtype, seed=k) for k in (1, 2, 3))
    scale = normal(shape[1], seed=4)
    for center, added in ((True, None), (False, None), (True, skip), (False, skip)):
        dx, dscale, dbias = backward(x, dy, scale, added, center=center, **run)
        assert dx.dtype == dtype
        assert dscale.dtype == dbias.dtype == jnp.float32
        want = rows_reference(x, dy, added, scale, center)
        assert_close(dx, want[0], summed=shape[1], dtype=dtype)
        assert_close(dscale, want[1], summed=shape[0] + shape[1])
        assert_close(dbias, want[2], summed=shape[0])


@pytest.mark.parametrize("name", ["triton", "mosaic"])
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_without_parameters(name, scaled):
    x, dy = normal(6, 128, seed=1), normal(6, 128, seed=2)
    scale = normal(128, seed=3) if scaled else None
    dx, *sums = backward(x, dy, scale, sums=False, **backend(name))
    assert_close(dx, rows_reference(x, dy, None, scale, True)[0], summed=128)
    assert sums == [None, None]


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_rows_far_from_zero(name, mean):
    """The kernel takes the moments again, about an element of the row."""
    x = normal(5, 768 if name == "mosaic" else 700, mean=mean, std=1.0)
    dy, scale = normal(*x.shape, seed=1), normal(x.shape[1], seed=2)
    found = backward(x, dy, scale, **backend(name))
    for v, want in zip(found, rows_reference(x, dy, None, scale, True), strict=True):
        assert_close(v, want, summed=700)
    dx, dscale, _ = backward(
        jnp.full((3, 384), 0.1), x[:3, :384], None, **backend(name)
    )
    assert not np.any(dscale)
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("rows_of", [512, 2048, 8192])
def test_no_multiprocessor_is_idle_for_want_of_rows(rows_of):
    """Partial sums cost less than multiprocessors that wait."""
    programs = tiles.programs(1, rows_of, 1, 2)
    least = min(tiles.MULTIPROCESSORS, rows_of // tiles.LEAST_STEPS)
    assert least <= programs <= 2 * tiles.MULTIPROCESSORS


def test_kernels_where_jax_has_64_bits():
    run = backend("triton")
    with jax.enable_x64(True):
        x, dy = normal(40, 100, seed=1), normal(40, 100, seed=2)
        ones = jnp.ones((1, 100), jnp.float32)
        found = backward(x, dy, ones[0], **run)
        settings = {"activation": "silu", **run}
        sums = columns.gradient_sums(x[None], dy[None], ones, ones, ones, **settings)
    want = rows_reference(x, dy, None, np.ones(100), True)
    for v in (*found, *sums):
        assert v.dtype == jnp.float32
    for v, w in zip(found, want, strict=True):
        assert_close(v, w, summed=140)


def test_what_is_not_finite_stays_in_its_row():
    x = normal(40, 100).at[7].set(jnp.nan)
    dx, _, _ = backward(x, x, None, sums=False, **backend("triton"))
    finite = np.all(np.isfinite(np.asarray(dx)), axis=1)
    np.testing.assert_array_equal(finite, np.arange(40) != 7)


def test_rows_that_are_not_there_are_in_no_sum():
    """Blocks are filled up with zeros, of which the variance is 0, and epsilon, too."""
    x, dy = normal(5, 64, seed=1), normal(5, 64, seed=2)
    settings = {"center": True, "with_scale": True, "with_bias": True}
    run = settings | backend("triton")
    found = rows.backward(x[None], dy[None], None, None, jnp.float32(0), **run)
    assert all(np.isfinite(v).all() for v in found if v is not None)


COLUMNS = [
    *(("triton", s) for s in ((2, 49, 64), (3, 81, 20), (1, 1, 32), (2, 640, 96))),
    *(("mosaic", s) for s in ((2, 64, 64), (1, 640, 128))),
]


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(("name", "shape"), COLUMNS)
def test_columns(name, shape, dtype):
    run = backend(name)
    x, dy = (normal(*shape, dtype=dtype, seed=k) for k in (1, 2))
    batch, space, features = shape
    vectors = [normal(batch, features, seed=k) for k in (3, 4, 5)]
    for activation in columns.ACTIVATIONS:
        got = columns.gradient_sums(x, dy, *vectors, activation=activation, **run)
        want = columns_reference(x, dy, vectors, activation)
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, summed=4 * space)  # four roundings of each, or so


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_columns_far_from_zero(name):
    """What relu cuts off is what it cut off in the forward pass."""
    x = normal(2, 1024, 128, mean=1e4, std=1.0)
    dy = normal(*x.shape, seed=1)
    mean = jnp.asarray(np.asarray(x, np.float64).mean(1), jnp.float32)
    vectors = mean, normal(2, 128, seed=2), normal(2, 128, seed=3)
    got = columns.gradient_sums(x, dy, *vectors, activation="relu", **backend(name))
    want = columns_reference(x, dy, vectors, "relu")
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, summed=1024)


def rows_alone(x, dy, scale):
    return backward(x, dy, scale, **backend("triton"))


def columns_alone(x, dy, *vectors):
    settings = {"activation": "silu", **backend("triton")}
    return columns.gradient_sums(x, dy, *vectors, **settings)


def assert_alike(got, want):
    for g, w in zip(got, want, strict=True):
        assert np.isfinite(w).all()
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-4)


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def sharding(*spec):
    return NamedSharding(mesh(), P(*spec))


@pytest.mark.parametrize("spec", [("data",), (("data", "model"),), (None, "model")])
def test_sharded_rows_stay_where_they_are(spec):
    x, dy, scale = normal(64, 128, seed=1), normal(64, 128, seed=2), normal(128, seed=3)
    sharded = jax.device_put((x, dy), sharding(*spec))
    call = jax.jit(rows_alone).lower(*sharded, scale).compile()
    assert_alike(call(*sharded, scale), rows_alone(x, dy, scale))
    gathers = "all-gather" in str(call.as_text())
    assert gathers == (spec == (None, "model"))  # whole rows are needed


@pytest.mark.parametrize(
    "spec", [("data",), (None, "data"), (None, None, "data"), ("model", "data")]
)
def test_sharded_columns_stay_where_they_are(spec):
    x, dy = normal(4, 16, 64, seed=1), normal(4, 16, 64, seed=2)
    vectors = [normal(4, 64, seed=k) for k in (3, 4, 5)]
    sharded = jax.device_put((x, dy), sharding(*spec))
    call = jax.jit(columns_alone).lower(*sharded, *vectors).compile()
    assert_alike(call(*sharded, *vectors), columns_alone(x, dy, *vectors))
    assert "f32[4,16,64]" not in "".join(
        line for line in str(call.as_text()).splitlines() if " all-gather" in line
    )


def test_parts_that_do_not_fit_are_whole_examples():
    seen = []

    def sums(x):
        seen.append(x.shape)
        return (jnp.sum(x, axis=1),)

    def call(x):
        signature = spread.Signature(("bsc",), ("bc",))
        return spread.call(sums, signature, [x], fits=lambda s: s[1] == 16)[0]

    x = normal(4, 16, 64)
    sharded = jax.device_put(x, sharding("model", "data"))
    np.testing.assert_allclose(jax.jit(call)(sharded), x.sum(1), rtol=1e-4, atol=1e-5)
    assert seen[-1] == (2, 16, 64)


def test_rows_that_do_not_divide_evenly():
    x, dy, scale = normal(30, 128, seed=1), normal(30, 128, seed=2), normal(128, seed=3)

    @jax.jit
    def uneven(x, dy, scale):
        x, dy = (jax.lax.with_sharding_constraint(v, sharding("data")) for v in (x, dy))
        return rows_alone(jnp.cos(x), jnp.cos(dy), scale)  # what pads parts is not 0

    assert_alike(uneven(x, dy, scale), rows_alone(jnp.cos(x), jnp.cos(dy), scale))


def test_rows_older_than_the_mesh():
    x, dy, scale = normal(64, 128, seed=1), normal(64, 128, seed=2), normal(128, seed=3)
    want = rows_alone(x, dy, scale)

    @jax.jit
    def call(x, dy):
        x, dy = (jax.lax.with_sharding_constraint(v, P("data")) for v in (x, dy))
        return rows_alone(x, dy, scale)

    with jax.set_mesh(mesh()):
        assert_alike(call(x, dy), want)


REASONS = [
    (
        "rows",
        "triton",
        (8, 64),
        ("float64",),
        "bfloat16, float16, float32, got float64",
    ),
    ("rows", "triton", (8, 64), ("int32",), "got int32"),
    ("rows", "triton", (8, 64), ("float32", "complex64"), "got complex64"),
    ("rows", "triton", (8, 8193), ("float32",), "8193 features .* at most 8192"),
    ("rows", "mosaic", (8, 100), ("float32",), "multiple of 128, got 100"),
    ("rows", "mosaic", (2**20, 2048), ("float32",), "2\\*\\*31 elements"),
    ("rows", "triton", (0, 64), ("float32",), "is empty"),
    ("rows", "triton", (8,), ("float32",), r"\(rows, features\), got shape \(8,\)"),
    ("columns", "triton", (8, 64), ("float32",), r"\(batch, space, features\)"),
    ("columns", "mosaic", (2, 12, 64), ("float32",), "multiple of 16, got 12"),
    ("columns", "mosaic", (2, 49, 512), ("float32",), "multiple of 8, got 49"),
]


@pytest.mark.parametrize(("pattern", "name", "shape", "dtypes", "says"), REASONS)
def test_reasons(pattern, name, shape, dtypes, says):
    with pytest.raises(ValueError, match=f"the {name} kernel does not fit: .*{says}"):
        support.require(pattern, name, shape, *dtypes)


def test_no_reason():
    assert support.why_unfit("rows", "triton", (8, 100), "bfloat16") is None
    assert support.why_unfit("rows", "triton", (2**22, 4096), "bfloat16") is None
    assert support.why_unfit("rows", "mosaic", (8, 384), "float16", "float32") is None
    assert support.why_unfit("columns", "triton", (2, 49, 3), "float32") is None
    assert support.why_unfit("columns", "mosaic", (2, 48, 192), "float32") is None


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="pattern='diagonals' is none of"):
        support.why_unfit("diagonals", "triton", (8, 8), "float32")
    with pytest.raises(ValueError, match="backend='cuda' is none of"):
        support.why_unfit("rows", "cuda", (8, 8), "float32")
    x, vector = normal(1, 4, 8), normal(1, 8)
    with pytest.raises(ValueError, match="activation='tanh' is none of"):
        given = x, x, vector, vector, vector
        columns.gradient_sums(*given, activation="tanh", backend="triton")


def test_a_kernel_that_does_not_fit_raises():
    x = normal(2, 10000)
    with pytest.raises(ValueError, match="at most 8192"):
        backward(x, x, None, **backend("triton"))
    with pytest.raises(ValueError, match="got float64"), jax.enable_x64(True):
        backward(x[:, :8].astype(jnp.float64), x[:, :8], None, **backend("triton"))


@pytest.mark.parametrize("name", support.BACKENDS)
def test_a_backend_that_jax_lacks_is_a_reason(name, monkeypatch):
    support.unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, support.BACKENDS[name][0], None)
    says = support.why_unfit("rows", name, (8, 128), "float32")
    assert says is not None and "cannot import" in says and jax.__version__ in says
    monkeypatch.undo()
    support.unavailable.cache_clear()
    monkeypatch.setitem(support.BACKENDS, name, (support.BACKENDS[name][0], ("gone",)))
    says = support.why_unfit("rows", name, (8, 128), "float32")
    assert says is not None and "has no ['gone']" in says
    support.unavailable.cache_clear()


def test_pallas_is_imported_by_need_only():
    code = (
        "import sys, jaxnorm, jaxnorm._kernels.rows, jaxnorm._kernels.columns\n"
        "assert not [k for k in sys.modules if 'experimental.pallas' in k]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
