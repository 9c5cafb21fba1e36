"""Pallas kernels, interpreted on a CPU, against float64 written from the definition.

Triton's interpreter is in every jax; Mosaic's has come with jax 0.11. What they compute
is tested here, not what a GPU's compiler makes of it.
"""

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm._kernels import columns, rows, spread, support

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


def rows_reference(x, dy, scale, bias, center):
    """y, mean, rstd, dx, dscale, dbias in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    scale = 1.0 if scale is None else np.asarray(scale, np.float64)
    bias = 0.0 if bias is None else np.asarray(bias, np.float64)
    mean = x.mean(1, keepdims=True) if center else np.zeros((len(x), 1))
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPSILON)
    x_hat = (x - mean) * rstd
    d = dy * scale
    dx = d - x_hat * (d * x_hat).mean(1, keepdims=True)
    dx = dx - d.mean(1, keepdims=True) if center else dx
    y = x_hat * scale + bias
    sums = (dy * x_hat).sum(0), dy.sum(0)
    return y, mean[:, 0], rstd[:, 0], dx * rstd, *sums


def columns_reference(x, dy, vectors, activation):
    """The sums of `columns.gradient_sums` in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    mean, slope, shift = (np.asarray(v, np.float64)[:, None] for v in vectors)
    z = x * slope + shift
    gate = 1 / (1 + np.exp(-z))
    by_activation = {None: 1.0, "relu": z > 0, "silu": gate + z * gate * (1 - gate)}
    d = dy * by_activation[activation]
    return d.sum(1), (d * (x - mean)).sum(1)


def forward(x, scale, bias, *, center=True, dtype=None, **run):
    dtype = x.dtype if dtype is None else dtype
    return rows.forward(
        x, scale, bias, epsilon=EPSILON, center=center, dtype=dtype, **run
    )


def backward(x, dy, scale, mean, rstd, *, with_bias=True, **run):
    settings = {"center": mean is not None, "with_bias": with_bias, **run}
    return rows.backward(x, dy, scale, mean, rstd, **settings)


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
    x, dy = (normal(*shape, dtype=dtype, seed=k) for k in (1, 2))
    scale, bias = normal(shape[1], seed=3), normal(shape[1], seed=4)
    for center in (True, False):
        y, mean, rstd = forward(x, scale, bias, center=center, **run)
        got = backward(x, dy, scale, mean, rstd, **run)
        assert (mean is None) == (not center)
        assert y.dtype == got[0].dtype == dtype
        assert rstd.dtype == got[1].dtype == got[2].dtype == jnp.float32
        want = rows_reference(x, dy, scale, bias, center)
        features = functools.partial(assert_close, summed=shape[1])
        features(y, want[0], dtype=dtype)
        features(rstd, want[2])
        features(got[0], want[3], dtype=dtype)
        if center:
            features(mean, want[1])
        assert_close(got[1], want[4], summed=shape[0] + shape[1])
        assert_close(got[2], want[5], summed=shape[0])


@pytest.mark.parametrize("name", ["triton", "mosaic"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_rows_without_scale_or_bias(name, scaled, biased):
    run = backend(name)
    x, dy = normal(6, 128, seed=1), normal(6, 128, seed=2)
    scale = normal(128, seed=3) if scaled else None
    bias = normal(128, seed=4) if biased else None
    y, mean, rstd = forward(x, scale, bias, **run)
    settings = {"with_bias": biased, **run}
    dx, dscale, dbias = backward(x, dy, scale, mean, rstd, **settings)
    want = rows_reference(x, dy, scale, bias, True)
    assert_close(y, want[0], summed=128)
    assert_close(dx, want[3], summed=128)
    assert (dscale is None, dbias is None) == (not scaled, not biased)
    if scaled:
        assert_close(dscale, want[4], summed=128)
    if biased:
        assert_close(dbias, want[5], summed=128)


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_rows_far_from_zero(name):
    run = backend(name)
    x = normal(5, 768 if name == "mosaic" else 700, mean=1e4, std=1.0)
    y, mean, rstd = forward(x, None, None, **run)
    want = rows_reference(x, x, None, None, True)
    assert_close(rstd, want[2], summed=1)
    assert_close(mean, want[1], summed=1)
    assert_close(y, want[0], summed=700)
    y, _, rstd = forward(jnp.full((3, 384), 0.1), None, None, **run)
    assert not np.any(y)
    np.testing.assert_allclose(rstd, EPSILON**-0.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_rows_take_a_traced_epsilon_and_return_another_dtype(name):
    run = backend(name)
    x = normal(4, 128, dtype="bfloat16")
    call = functools.partial(rows.forward, x, None, None, center=True, **run)
    traced = jax.jit(lambda epsilon: call(epsilon=epsilon, dtype=jnp.float32))
    y, _, _ = traced(jnp.float32(EPSILON))
    assert y.dtype == jnp.float32
    assert_close(y, rows_reference(x, x, None, None, True)[0], summed=128)


def test_kernels_where_jax_has_64_bits():
    run = backend("triton")
    with jax.enable_x64(True):
        x, dy = normal(40, 100, seed=1), normal(40, 100, seed=2)
        y, mean, rstd = forward(x, None, None, **run)
        dx, _, dbias = backward(x, dy, None, mean, rstd, **run)
        moments = columns.moments(x[None], **run)
        slope = jnp.ones((1, 100), jnp.float32)
        settings = {"activation": "silu", **run}
        sums = columns.gradient_sums(
            x[None], dy[None], moments[0], slope, slope, **settings
        )
    want = rows_reference(x, dy, None, None, True)
    for v in (y, mean, rstd, dx, dbias, *moments, *sums):
        assert v.dtype == jnp.float32
    assert_close(y, want[0], summed=100)
    assert_close(dx, want[3], summed=100)


def test_what_is_not_finite_stays_in_its_row():
    run = backend("triton")
    x = normal(40, 100).at[7].set(jnp.nan)
    y, mean, rstd = forward(x, None, None, **run)
    dx, _, _ = backward(x, x, None, mean, rstd, with_bias=False, **run)
    for v in (y, dx):
        finite = np.all(np.isfinite(np.asarray(v)), axis=1)
        np.testing.assert_array_equal(finite, np.arange(40) != 7)


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
    exact = np.asarray(x, np.float64)
    mean, var = columns.moments(x, **run)
    assert mean.dtype == var.dtype == jnp.float32
    assert_close(mean, exact.mean(1), summed=space)
    if space == 1:
        assert not np.any(var)
    else:
        assert_close(var, exact.var(1), summed=space)
    for activation in columns.ACTIVATIONS if dtype != "float16" else (None,):
        got = columns.gradient_sums(x, dy, *vectors, activation=activation, **run)
        want = columns_reference(x, dy, vectors, activation)
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, summed=space)


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_column_moments_far_from_zero(name):
    run = backend(name)
    x = normal(2, 1024, 64, mean=1e4, std=1.0)
    mean, var = columns.moments(x, **run)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(var, exact.var(1), rtol=1e-5)
    np.testing.assert_allclose(mean, exact.mean(1), rtol=2e-7)
    constant = columns.moments(jnp.full((2, 1024, 64), 0.1), **run)
    np.testing.assert_array_equal(constant[0], np.float32(0.1))
    np.testing.assert_array_equal(constant[1], 0)


def test_column_moments_where_one_place_is_zero():
    """A pivot far from the mean costs accuracy, so it must not be one for all data."""
    x = normal(1, 4096, 128, mean=100.0, std=1.0).at[:, 0].set(0)
    _, var = columns.moments(x, **backend("triton"))
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(var, exact.var(1), rtol=1e-4)


def rows_there_and_back(name: str) -> Callable[..., tuple[Any, ...]]:
    run = backend(name)

    def call(x, dy, scale, bias):
        y, mean, rstd = forward(x, scale, bias, **run)
        return y, mean, *backward(x, dy, scale, mean, rstd, **run)

    return call


def columns_there_and_back(name: str) -> Callable[..., tuple[Any, ...]]:
    run = backend(name)

    def call(x, dy, slope, shift):
        mean, var = columns.moments(x, **run)
        last = slope, shift
        sums = columns.gradient_sums(x, dy, mean, *last, activation="silu", **run)
        return mean, var, *sums

    return call


def assert_alike(got, want):
    for g, w in zip(got, want, strict=True):
        assert np.isfinite(w).all()
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["triton", "mosaic"])
@pytest.mark.parametrize(
    "axes", [(0, 0, None), (0, 0, 0), (None, None, 0), (0, None, 0)]
)
def test_vmapped_rows_equal_a_loop(name, axes):
    run = rows_there_and_back(name)
    given = normal(2, 5, 128, seed=1), normal(2, 5, 128, seed=2), normal(2, 128, seed=3)
    bias = normal(128, seed=4)
    given = [v if a == 0 else v[0] for v, a in zip(given, axes, strict=True)]

    def one(i):
        own = [v if a is None else v[i] for v, a in zip(given, axes, strict=True)]
        return run(*own, bias)

    got = jax.vmap(run, (*axes, None))(*given, bias)
    assert_alike(got, stacked([one(0), one(1)]))


def test_rows_vmapped_twice_equal_loops():
    """The parameters of each of two models, on three inputs."""
    run = rows_there_and_back("triton")
    x, dy = normal(2, 3, 5, 128, seed=1), normal(2, 3, 5, 128, seed=2)
    scales, bias = normal(2, 128, seed=3), normal(128, seed=4)
    inner = jax.vmap(run, (0, 0, None, None))
    got = jax.vmap(inner, (0, 0, 0, None))(x, dy, scales, bias)
    loops = [
        stacked([run(x[i, j], dy[i, j], scales[i], bias) for j in range(3)])
        for i in range(2)
    ]
    assert_alike(got, stacked(loops))


def stacked(calls):
    """Each result of several calls as one array."""
    return [np.stack(v) for v in zip(*calls, strict=True)]


def test_vmapped_columns_equal_a_loop():
    run = columns_there_and_back("triton")
    x, dy = normal(3, 2, 9, 20, seed=1), normal(3, 2, 9, 20, seed=2)
    slope, shift = normal(2, 20, seed=3), normal(3, 2, 20, seed=4)
    got = jax.vmap(run, (0, 0, None, 0))(x, dy, slope, shift)
    one = [run(x[i], dy[i], slope, shift[i]) for i in range(3)]
    assert_alike(got, stacked(one))


def mesh(kind: AxisType):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(("data", "model")), P(None, "model")])
def test_sharded_rows_stay_where_they_are(kind, spec):
    run = rows_there_and_back("triton")
    x, dy = normal(64, 128, seed=1), normal(64, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)
    sharded = jax.device_put((x, dy), NamedSharding(mesh(kind), spec))
    call = jax.jit(run).lower(*sharded, *params).compile()
    assert_alike(call(*sharded, *params), run(x, dy, *params))
    gathers = "all-gather" in str(call.as_text())
    assert gathers == (spec == P(None, "model"))  # whole rows are needed


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "data"), P(None, None, "data"), P("model", "data")]
)
def test_sharded_columns_stay_where_they_are(kind, spec):
    run = columns_there_and_back("triton")
    x, dy = normal(4, 16, 64, seed=1), normal(4, 16, 64, seed=2)
    vectors = normal(4, 64, seed=3), normal(4, 64, seed=4)
    sharded = jax.device_put((x, dy), NamedSharding(mesh(kind), spec))
    call = jax.jit(run).lower(*sharded, *vectors).compile()
    assert_alike(call(*sharded, *vectors), run(x, dy, *vectors))
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
    sharded = jax.device_put(x, NamedSharding(mesh(AxisType.Auto), P("model", "data")))
    np.testing.assert_allclose(jax.jit(call)(sharded), x.sum(1), rtol=1e-4, atol=1e-5)
    assert seen[-1] == (2, 16, 64)


def test_rows_that_do_not_divide_evenly():
    run = rows_there_and_back("triton")
    x, dy = normal(30, 128, seed=1), normal(30, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)
    sharding = NamedSharding(mesh(AxisType.Auto), P("data"))

    @jax.jit
    def uneven(x, dy, scale, bias):
        x, dy = (jax.lax.with_sharding_constraint(v, sharding) for v in (x, dy))
        return run(jnp.cos(x), jnp.cos(dy), scale, bias)  # what pads the parts is not 0

    assert_alike(uneven(x, dy, *params), run(jnp.cos(x), jnp.cos(dy), *params))


def test_rows_in_shard_map_are_of_each_device():
    run = rows_there_and_back("triton")
    x, dy = normal(64, 128, seed=1), normal(64, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)
    call = jax.shard_map(
        lambda *a: [v if v.ndim > 1 else v[None] for v in run(*a)],
        mesh=mesh(AxisType.Auto),
        in_specs=(P("data"), P("data"), P(), P()),
        out_specs=P("data"),
        check_vma=False,  # Triton's interpreter does not keep track
    )
    y, _, dx, dscale, dbias = call(x, dy, *params)
    want = run(x, dy, *params)
    assert_alike((y, dx), (want[0], want[2]))
    assert_alike((dscale.sum(0), dbias.sum(0)), want[3:])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_where_some_axes_of_the_mesh_are_mapped(kind):
    run = rows_there_and_back("triton")
    x, dy = normal(64, 128, seed=1), normal(64, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)

    def part(x, dy, scale, bias):
        *per_row, dscale, dbias = run(x, dy, scale, bias)
        return *per_row, jax.lax.psum(dscale, "data"), jax.lax.psum(dbias, "data")

    with jax.set_mesh(mesh(kind)):
        sharded = jax.device_put((x, dy), P("data"))
        call = jax.shard_map(
            part,
            in_specs=(P("data"), P("data"), P(), P()),
            out_specs=(P("data"), P("data"), P("data"), P(), P()),
            axis_names={"data"},
            check_vma=False,
        )
        assert_alike(jax.jit(call)(*sharded, *params), run(x, dy, *params))


def test_rows_older_than_the_mesh():
    run = rows_there_and_back("triton")
    x, dy = normal(64, 128, seed=1), normal(64, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)
    want = run(x, dy, *params)

    @jax.jit
    def call(x, dy):
        x, dy = (jax.lax.with_sharding_constraint(v, P("data")) for v in (x, dy))
        return run(x, dy, *params)

    with jax.set_mesh(mesh(AxisType.Auto)):
        assert_alike(call(x, dy), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_vmapped_over_a_sharded_axis(kind):
    run = rows_there_and_back("triton")
    x, dy = normal(8, 4, 128, seed=1), normal(8, 4, 128, seed=2)
    params = normal(128, seed=3), normal(128, seed=4)
    mapped = jax.jit(jax.vmap(run, (0, 0, None, None)))
    sharded = jax.device_put((x, dy), NamedSharding(mesh(kind), P("data")))
    with jax.set_mesh(mesh(kind)):
        call = mapped.lower(*sharded, *params).compile()
    assert "all-gather" not in str(call.as_text())
    assert_alike(call(*sharded, *params), mapped(x, dy, *params))


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
    ("rows", "triton", (2**20, 2048), ("float32",), "2\\*\\*31 elements"),
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
    assert support.why_unfit("rows", "mosaic", (8, 384), "float16", "float32") is None
    assert support.why_unfit("columns", "triton", (2, 49, 3), "float32") is None
    assert support.why_unfit("columns", "mosaic", (2, 48, 192), "float32") is None


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="pattern='diagonals' is none of"):
        support.why_unfit("diagonals", "triton", (8, 8), "float32")
    with pytest.raises(ValueError, match="backend='cuda' is none of"):
        support.why_unfit("rows", "cuda", (8, 8), "float32")
    x = normal(1, 4, 8)
    vector = normal(1, 8)
    call = functools.partial(columns.gradient_sums, x, x, vector, backend="triton")
    with pytest.raises(ValueError, match="activation='tanh' is none of"):
        call(activation="tanh")
    with pytest.raises(
        ValueError, match="activation='relu' needs both slope and shift"
    ):
        call(activation="relu")


def test_a_kernel_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="at most 8192"):
        forward(normal(2, 10000), None, None, **backend("triton"))
    with pytest.raises(ValueError, match="got float64"), jax.enable_x64(True):
        scale = jnp.ones(8, jnp.float64)
        forward(normal(2, 8), scale, None, **backend("triton"))
    x = normal(2, 8)
    with pytest.raises(ValueError, match="center=True needs the mean"):
        rows.backward(
            x, x, None, None, x[:, 0], center=True, with_bias=False, backend="triton"
        )


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
