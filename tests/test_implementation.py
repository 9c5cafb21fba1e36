"""Kernels for GPUs where they are asked for, interpreted: as the formula without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import lowered_as
from norms import assert_close, changed
from test_activation import EXACT

import jaxnorm
from jaxnorm._kernels import support
from jaxnorm._primitives import gpu
from jaxnorm._primitives.activated import ACTIVATED_TANGENT
from jaxnorm._primitives.rows import ROW_TANGENT

CASES = {
    "layer": (jaxnorm.LayerNorm(), (6, 5, 256)),
    "rms": (jaxnorm.RMSNorm(epsilon=1e-3), (16, 128)),
    "group relu": (jaxnorm.GroupNorm(num_groups=2, activation="relu"), (2, 8, 8, 32)),
    "group silu": (jaxnorm.GroupNorm(num_groups=8, activation="silu"), (2, 16, 64)),
    "instance": (jaxnorm.InstanceNorm(activation="silu"), (2, 4, 8, 32)),
}


@pytest.fixture(autouse=True)
def interpreted():
    """What is meant for NVIDIA's GPUs runs on this CPU, its kernels interpreted."""
    kernels = {
        ROW_TANGENT: gpu.row_gradient(interpret=True),
        ACTIVATED_TANGENT: gpu.activated_gradient(interpret=True),
    }
    with lowered_as("cuda", kernels):
        yield


def problem(name, dtype=np.float32, mean=0.5):
    norm, shape = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(mean, 2, shape).astype(dtype)
    dy = rng.normal(0.5, 2, shape).astype(dtype)
    params = {
        k: rng.uniform(0.5, 2, shape[-1:]).astype(np.float32) for k in norm.param_names
    }
    return changed(norm, implementation="triton"), x, params, dy


def by_formula(norm):
    return changed(norm, implementation="xla")


def gradients(norm, x, params, dy):
    @jax.jit
    def both(x, params, dy):
        y, pull = jax.vjp(lambda x, params: norm(x, params, {})[0], x, params)
        return y, *pull(dy)

    return both(x, params, dy)


def exact(norm, x, params):
    """The float64 reference, with the activation by hand."""
    kinds = {
        jaxnorm.LayerNorm: reference.layer_norm,
        jaxnorm.RMSNorm: reference.rms_norm,
        jaxnorm.InstanceNorm: reference.instance_norm,
    }
    ref = kinds.get(type(norm))
    if ref is None:
        ref = functools.partial(reference.group_norm, num_groups=norm.num_groups)
    args = [params[k] for k in norm.param_names]
    y = ref(np.asarray(x, np.float64), *args, epsilon=norm.epsilon).y
    return EXACT[norm.activation](y) if getattr(norm, "activation", None) else y


def wide_gradients(norm, *args):
    """Those of the formula in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), args)
        return jax.tree.map(np.asarray, gradients(by_formula(norm), *wide))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mean", [0.5, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_values_and_gradients(name, dtype, mean):
    """Also far from 0, where relu must cut off what it cut off in the forward pass."""
    norm, x, params, dy = problem(name, dtype, 0.5 if name == "rms" else mean)
    y, dx, dparams = gradients(norm, x, params, dy)
    _, ex, eparams = wide_gradients(norm, x, params, dy)
    assert y.dtype == dtype
    assert_close(y, exact(norm, x, params), dtype=dtype, summed=4, size=2)
    assert_close(dx, ex, dtype=dtype, summed=4, size=4)
    for k, v in dparams.items():
        assert v.dtype == params[k].dtype
        size = 1 + np.abs(eparams[k]).max()
        assert_close(v, eparams[k], dtype=jnp.float32, summed=x.size, size=size)


def loss(norm, dy, x, params):
    return (jnp.sin(norm(x, params, {})[0]) * dy).sum()


@pytest.mark.parametrize("name", CASES)
def test_every_derivative(name):
    """Forward, second and third derivatives, in any order."""
    norm, shape = CASES[name]
    norm = changed(norm, implementation="triton")
    features = 8
    shape = (2, *[4] * (len(shape) - 2), features)
    rng = np.random.default_rng(1)
    x, dy, v, w = (rng.normal(1, 2, shape).astype(np.float32) for _ in range(4))
    params = {k: np.full(features, 1.5, np.float32) for k in norm.param_names}

    def along(norm, x, v, w):
        f = functools.partial(loss, norm, dy, params=params)
        slope = jax.jvp(f, (x,), (v,))[1]
        reverse = jax.grad(lambda x: (jax.grad(f)(x) * v).sum())(x)
        forward = jax.jvp(jax.grad(f), (x,), (v,))[1]
        third = jax.grad(lambda x: (jax.jvp(jax.grad(f), (x,), (v,))[1] * w).sum())(x)
        return slope, reverse, forward, third

    found = along(norm, x, v, w)
    with jax.enable_x64(True):
        wide = (np.asarray(a, np.float64) for a in (x, v, w))
        exact = jax.tree.map(np.asarray, along(by_formula(norm), *wide))
    for a, b in zip(found, exact, strict=True):
        size = 10 * np.abs(b).max()
        assert_close(a, b, dtype=jnp.float32, summed=x.size, size=size)


@pytest.mark.parametrize("name", CASES)
def test_batches_of_vmap(name):
    """Gradients of each, and of the sum, where rows of all examples are rows of one."""
    norm, x, params, dy = problem(name)
    x, dy = (np.stack([v, v[::-1]]) for v in (x, dy))

    def each(norm, x, dy):
        return jax.grad(functools.partial(loss, norm, dy), (0, 1))(x, params)

    def whole(norm, x, dy):
        mapped = jax.vmap(functools.partial(loss, norm), (0, 0, None))
        return jax.grad(lambda x, p: mapped(dy, x, p).sum(), (0, 1))(x, params)

    def of_each(norm):
        return jax.vmap(functools.partial(each, norm))

    for way in (of_each, functools.partial(functools.partial, whole)):
        f, formula = way(norm), way(by_formula(norm))
        said = str(jaxnorm.models.implementations(f, x, dy))
        assert "a kernel for NVIDIA's GPUs" in said
        found, want = (jax.tree.leaves(g(x, dy)) for g in (f, formula))
        for a, b in zip(found, want, strict=True):
            size = 4 * np.abs(b).max()
            assert_close(a, b, dtype=jnp.float32, summed=x.size, size=size)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_vectors_of_vmap_are_rows(name):
    """Though each has the shape of its parameters."""
    norm, x, params, dy = problem(name)
    x, dy = (v.reshape(-1, v.shape[-1]) for v in (x, dy))
    mapped = jax.vmap(functools.partial(loss, norm), (0, 0, None))
    f = jax.grad(lambda x, params: mapped(dy, x, params).sum(), (0, 1))
    assert str(jaxnorm.models.implementations(f, x, params)).count(gpu.NAME) == 1
    want = jax.grad(functools.partial(loss, norm, dy), (0, 1))(x, params)
    for a, b in zip(*map(jax.tree.leaves, (f(x, params), want)), strict=True):
        assert_close(a, b, dtype=jnp.float32, summed=x.size, size=np.abs(b).max())


@pytest.mark.parametrize("mean", [100, 1e4])
@pytest.mark.parametrize("name", ["layer", "rms", "group relu", "instance"])
def test_far_from_zero(name, mean):
    """By roundoff of the deviations, and not of the mean."""
    norm, x, params, dy = problem(name, mean=mean)
    y, dx, *_ = gradients(norm, x, params, dy)
    with jax.enable_x64(True):
        wide = (np.asarray(v, np.float64) for v in (x, dy))
        wide = [*wide, jax.tree.map(np.float64, params)]
        want = gradients(by_formula(norm), wide[0], wide[2], wide[1])[:2]
        want = jax.tree.map(np.asarray, want)
    for a, b in zip((y, dx), want, strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 4e-7 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", CASES)
def test_sharded_arrays_stay_where_they_are(name, kind):
    norm, x, params, dy = problem(name)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    want = gradients(norm, x, params, dy)
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), P("data"))

        def both(x, params, dy):
            y, pull = jax.vjp(lambda x, params: norm(x, params, {})[0], x, params)
            return y, *pull(dy)

        compiled = jax.jit(both).lower(x, params, dy).compile()
        found = compiled(x, params, dy)
    assert "all-gather" not in str(compiled.as_text())
    # An interpreted kernel walks its grid; JAX parts none on an explicit mesh.
    assert ("while" in str(compiled.as_text())) == (kind == AxisType.Auto)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        size = 4 * np.abs(b).max()
        assert_close(a, b, dtype=jnp.float32, summed=x.size, size=size)


@pytest.mark.parametrize("name", ["layer", "group silu"])
def test_each_device_of_a_shard_map_takes_its_part(name):
    norm, x, params, dy = problem(name)
    kinds = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    want, _ = jax.grad(functools.partial(loss, norm, dy), (0, 1))(x, params)

    def part(x, dy, params):
        return jax.grad(functools.partial(loss, norm, dy))(x, params)

    specs = {"in_specs": (P("data"), P("data"), P()), "out_specs": P("data")}
    x, dy = jax.device_put((x, dy), NamedSharding(mesh, P("data", None, "model")))
    for names in ({"data", "model"}, {"data"}):
        f = jax.jit(jax.shard_map(part, mesh=mesh, axis_names=names, **specs))
        assert_close(f(x, dy, params), want, dtype=jnp.float32, summed=x.size, size=10)
    # f, manual over "data" alone: what XLA spreads over the other axis stays spread.
    assert "all-gather" not in str(f.lower(x, dy, params).compile().as_text())


def test_a_program_for_several_platforms():
    """The formula, which needs no jaxnorm where it runs."""
    norm, x, params, dy = problem("layer")
    f = jax.jit(functools.partial(gradients, norm))
    exported = jax.export.export(f, platforms=["cuda", "cpu", "tpu"])(x, params, dy)
    for a, b in zip(
        jax.tree.leaves(exported.call(x, params, dy)),
        jax.tree.leaves(gradients(norm, x, params, dy)),
        strict=True,
    ):
        assert_close(a, b, dtype=jnp.float32, summed=x.size, size=np.abs(b).max())


@pytest.mark.parametrize("kind", [jaxnorm.LayerNorm, jaxnorm.RMSNorm])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_the_gradient_of_a_residual_is_added_by_the_kernel(kind, dtype):
    norm = kind(implementation="triton")
    rng = np.random.default_rng(0)
    x, r, ds, dy = (rng.normal(0.5, 2, (12, 128)).astype(dtype) for _ in range(4))
    params = {k: np.full(128, 1.5, np.float32) for k in norm.param_names}

    def step(norm, x, r, ds, dy):
        call = functools.partial(norm, params=params, stats={})
        (s, y), pull = jax.vjp(lambda x, r: call(x, residual=r)[0], x, r)
        return s, y, *pull((ds, dy))

    both = jax.jit(functools.partial(step, norm))
    s, y, dx, dr = both(x, r, ds, dy)
    assert "row_gradient" in (
        said := str(jaxnorm.models.implementations(both, x, r, ds, dy))
    )
    assert "add" not in said and "NVIDIA" in said
    np.testing.assert_array_equal(s, x + r)
    np.testing.assert_array_equal(dx, dr)
    with jax.enable_x64(True):
        wide = [np.asarray(v, np.float64) for v in (s, 0 * s, ds, dy)]
        _, ey, ex, _ = step(by_formula(norm), *wide)
    assert_close(y, ey, dtype=dtype, summed=4, size=4)
    assert_close(dx, ex, dtype=dtype, summed=4, size=8)


def test_a_kernel_is_taken_only_where_asked_for():
    norm, x, params, dy = problem("group silu", jnp.bfloat16)

    def said(implementation):
        asked = changed(norm, implementation=implementation)
        f = functools.partial(gradients, asked)
        return str(jaxnorm.models.implementations(f, x, params, dy))

    assert "a kernel for NVIDIA's GPUs" in said("triton")
    assert "a kernel" not in said(None).replace("no kernel", "")
    assert "a kernel" not in said("xla").replace("no kernel", "")


UNFIT = {
    "kernels take bfloat16, float16, float32, got float64": ("layer", "wide"),
    "a row of 10000 features does not fit": ("long", {}),
    "is empty": ("empty", {}),
    "the kernel takes one epsilon, and gives no gradient of it": ("silu", "epsilon"),
    "the kernel does not reduce": ("channels first", {}),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_does_not_fit_gets_the_formula_and_says_why(message):
    what, how = UNFIT[message]
    group = functools.partial(jaxnorm.GroupNorm, num_groups=2, implementation="triton")
    layer = jaxnorm.LayerNorm(implementation="triton")
    norm, shape = {
        "layer": (layer, (4, 128)),
        "long": (layer, (2, 10000)),
        "empty": (layer, (0, 128)),
        "silu": (group(activation="silu"), (2, 4, 8)),
        "channels first": (group(activation="silu", axis=1), (2, 8, 4)),
    }[what]

    def f(norm, x, epsilon):
        own = changed(norm, epsilon=epsilon) if how == "epsilon" else norm
        return jnp.sin(own(x, {}, {})[0]).sum()

    with jax.enable_x64(how == "wide"):
        x = np.random.default_rng(0).normal(size=shape)
        x = x if how == "wide" else x.astype(np.float32)
        epsilon, by = np.asarray(1e-5, x.dtype), (0, 1) if how == "epsilon" else (0,)
        gradient, formula = (
            jax.grad(functools.partial(f, n), by) for n in (norm, by_formula(norm))
        )
        assert message in str(jaxnorm.models.implementations(gradient, x, epsilon))
        found, want = jax.jit(gradient)(x, epsilon), jax.jit(formula)(x, epsilon)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, dtype=jnp.float32, summed=8, size=np.abs(b).max(initial=0))


def test_another_implementation_raises():
    with pytest.raises(ValueError, match="implementation='cuda' is none of"):
        jaxnorm.layer_norm(np.ones((2, 8)), implementation="cuda")


@pytest.mark.parametrize(
    ("backend", "capability", "says"),
    [
        ("triton", "gfx942", "kernels are for NVIDIA's GPUs, this one is gfx942"),
        ("triton", "7.5", "triton needs compute capability 8.0, this GPU has 7.5"),
        ("triton", "8.0", None),
        ("mosaic", "8.9", "mosaic needs compute capability 9.0, this GPU has 8.9"),
        ("mosaic", "10.0", None),
    ],
)
def test_which_gpus(monkeypatch, backend, capability, says):

    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert support.why_not_on_this_gpu(backend) == says


@pytest.mark.parametrize("case", ["not centered", "parameters along space"])
def test_groups_of_other_kinds(case):
    """The kernel's sums without the mean, or the formula where it cannot see scales."""
    x, dy = (np.random.default_rng(k).normal(1, 2, (2, 16, 8)) for k in (0, 1))
    if case == "not centered":
        axes, shape = jaxnorm.Axes.per_example((2, 16, 8), -1), (8,)
    else:
        axes, shape = jaxnorm.Axes.over((2, 16, 8), (1,), (1, 2)), (16, 8)
    scale = np.random.default_rng(2).uniform(0.5, 2, shape)

    def f(implementation, x, scale):
        how = {"epsilon": 1e-5, "activation": "silu", "implementation": implementation}
        how["center"] = case != "not centered"
        y, _ = jaxnorm.normalize(x, {"scale": scale}, axes, **how)
        return (y * dy.astype(y.dtype)).sum()

    narrow = x.astype(np.float32), scale.astype(np.float32)
    found = jax.grad(functools.partial(f, "triton"), (0, 1))(*narrow)
    with jax.enable_x64(True):
        exact = jax.grad(functools.partial(f, "xla"), (0, 1))(x, scale)
    for a, b in zip(found, exact, strict=True):
        size = 4 * np.abs(b).max()
        assert_close(a, b, dtype=jnp.float32, summed=x.size, size=size)
