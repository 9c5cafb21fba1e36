"""Shapes that `jax.export` leaves open: exported once, the numbers of any size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from norms import NORMS, assert_close, moved, problem

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

PLATFORMS = ("cpu", "cuda", "tpu")


def exported(f, *args):
    """`f` for all platforms at once, of nothing that only JAX's own runtime has."""
    program = export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    calls = program.mlir_module().split("custom_call @")[1:]
    assert all(call.startswith("shape_assertion(") for call in calls)
    return program


def like(tree):
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(jnp.shape(v), v.dtype), tree)


def opened(shape, fixed=(), constraints=()):
    """Floats of `shape`, with a letter for each size but those of the axes `fixed`."""
    fixed = {a % len(shape) for a in fixed}
    sizes = (str(n) if a in fixed else "bhwlm"[a] for a, n in enumerate(shape))
    shape = export.symbolic_shape(", ".join(sizes), constraints=constraints)
    return jax.ShapeDtypeStruct(shape, np.float32)


def close(actual, desired, summed=1000):
    compare = functools.partial(assert_close, summed=summed, size=10)
    jax.tree.map(compare, actual, desired)


def all_calls(row, x, params, stats, mask, cotangent):
    """Training with a mask and without one, its gradients, and evaluation."""
    inputs = row.inputs(x)
    for k in {"domain", "segment_ids"} & inputs.keys():
        inputs[k] = jnp.arange(x.shape[0]) % 2
    results = []
    for where in (None, mask):
        call = functools.partial(row.norm, stats=stats, mask=where, **inputs)
        y, pull, new = jax.vjp(call, x, params, has_aux=True)
        results += [y, new, *pull(cotangent)]
        if row.norm.has_stats:
            results += call(x, params, use_running_average=True)
    return results


# Of each kind the row that comes first is also run, not only exported.
RUN = {type(row.norm): name for name, row in reversed(NORMS.items())}.values()


@pytest.mark.parametrize("name", NORMS)
def test_any_norm_of_open_batch_and_space(name):
    row = NORMS[name]
    features = row.norm.axes(row.shape).feature
    f = functools.partial(all_calls, row)
    p = problem(row)
    x = opened(row.shape, features, ["b >= 3"])
    last = 1 if row.positions else x.shape[-1]
    mask = jax.ShapeDtypeStruct((*x.shape[:-1], last), bool)
    program = exported(f, x, like(p.params), like(p.stats), mask, x)
    if name in RUN:
        shape = tuple(n if a in features else n + 3 for a, n in enumerate(row.shape))
        p = problem(row, shape)
        args = p.x, p.params, moved(row, shape), p.mask, p.cotangent
        close(program.call(*args), jax.jit(f)(*args), p.x.size)


@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer_space", "iter"])
def test_sizes_that_follow_from_open_ones(name):
    """Such as products, and halves, which may be 0 for all that JAX knows."""
    row = NORMS[name]
    p = problem(row)

    def f(x, params, stats):
        x = x[:, 1::2, 1:]
        x = x.reshape(x.shape[0] * x.shape[1], 1, x.shape[2], 6)
        mask = x[..., :1] > 0
        return all_calls(row, x, params, stats, mask, x)

    x = opened(row.shape, [-1], ["b >= 2"])
    exported(f, x, like(p.params), like(p.stats))


@pytest.mark.parametrize("norm", [jaxnorm.LayerNorm(), jaxnorm.BatchNorm()])
def test_open_features(norm):
    x = opened((2, 3))
    params = dict.fromkeys(("scale", "bias"), jax.ShapeDtypeStruct(x.shape[1:], "f4"))
    stats = {"mean": params["bias"], "var": params["scale"]} if norm.has_stats else {}

    def f(x, params, stats):
        y, pull, new = jax.vjp(lambda *a: norm(*a, stats), x, params, has_aux=True)
        return y, new, pull(y)

    program = exported(f, x, params, stats)
    p = problem(NORMS["batch"], (5, 7))
    args = p.x, p.params, p.stats if norm.has_stats else {}
    close(program.call(*args), jax.jit(f)(*args))


ACTIVATED = {
    "last": (jaxnorm.BatchNorm(activation="relu"), (2, 3, 4, 8)),
    "first": (jaxnorm.InstanceNorm(activation="relu", axis=1), (2, 4, 3, 5)),
    "group": (jaxnorm.GroupNorm(activation="relu", num_groups=2), (2, 3, 4, 8)),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_relu_and_residual(name):
    norm, shape = ACTIVATED[name]
    axis = norm.axes(shape).feature
    stats = norm.init_stats((shape[axis[0]],))

    def f(x, residual):
        call = functools.partial(norm, params={}, stats=stats)
        alone, reverse = jax.vjp(lambda x: call(x)[0], x)
        y, pull = jax.vjp(lambda x, r: call(x, residual=r)[0], x, residual)
        return alone, reverse(residual), y, pull(residual)

    x = opened(shape, axis)
    program = exported(f, x, x)
    args = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    close(program.call(*args), jax.jit(f)(*args))


def test_constants_become_zero_and_outputs_are_exact_far_from_zero():
    norms = jaxnorm.BatchNorm(), jaxnorm.InstanceNorm(), jaxnorm.GroupNorm(num_groups=2)

    def f(x):
        return [norm(x, {}, norm.init_stats((4,)))[0] for norm in norms]

    program = exported(f, opened((2, 3, 4), [-1]))
    shape = (5, 130, 4)
    for value in (5144.123, -1e4 / 3, 7.7):
        for y in program.call(np.full(shape, value, np.float32)):
            np.testing.assert_array_equal(y, 0)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) + np.float32(1e4)
    with jax.enable_x64(True):
        exact = f(x.astype(np.float64))
    for y, expected in zip(program.call(x), exact, strict=True):
        assert_close(y, expected, summed=16)


def test_standardized_inputs():
    def f(inputs, x, mask):
        seen = inputs.update(x).update(x, mask=mask)
        seen = seen.update(x, weights=mask / 4, decay=0.5)
        return seen, seen.apply(x, mask=mask), seen.invert(x)

    x = opened((2, 3, 4), [-1], ["b >= 2"])
    inputs = jaxnorm.Standardizer.init(4)
    mask = jax.ShapeDtypeStruct((x.shape[0], 1, 1), bool)
    program = exported(f, like(inputs), x, mask)
    for size in (2, 7):
        v = np.random.default_rng(size).normal(size=(size, size + 1, 4))
        args = inputs, v.astype(np.float32), np.arange(size).reshape(-1, 1, 1) > 0
        close(program.call(*args), f(*args))


@pytest.mark.parametrize("check_vma", [True, False])
def test_synchronized_over_devices(check_vma):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    norm = jaxnorm.GroupNorm(num_groups=2, axis_name="d")
    spec = P(None, "d")

    def step(x):
        y, pull = jax.vjp(lambda x: norm(x, {}, {})[0], x)
        return y, *pull(jnp.sin(y))

    f = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=spec,
        out_specs=(spec, spec),
        check_vma=check_vma,
    )
    shape = export.symbolic_shape("b, 4*h, 6")
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))
    export.export(jax.jit(f))(x)  # JAX cannot run it yet, nor a plain psum


MODULES = {
    "BatchNorm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
    "LayerNorm": {"reduction_axes": (1, 2, 3)},
}


def linen_layer(name):
    settings = MODULES[name] | ({"feature_axes": -1} if name == "LayerNorm" else {})
    layer = getattr(jaxnorm.linen, name)(**settings)
    variables = layer.init(jax.random.key(0), np.ones((2, 3, 3, 8), np.float32))
    return lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]


def nnx_layer(name):
    layer = getattr(jaxnorm.nnx, name)(8, **MODULES[name], rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    return lambda x: nnx.merge(graph, jax.tree.map(jnp.asarray, state))(x)


@pytest.mark.parametrize("of", [linen_layer, nnx_layer])
def test_modules_of_any_image_size(of):
    layers = [of(name) for name in MODULES]

    def f(x):
        ys, pull = jax.vjp(lambda x: [layer(x) for layer in layers], x)
        return ys, pull([jnp.sin(y) for y in ys])

    program = exported(f, opened((2, 3, 3, 8), [-1]))
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 8)).astype(np.float32)
    close(program.call(x), jax.jit(f)(x))


def test_kernels_that_are_asked_for_are_no_part_of_a_program():
    """Also where sizes are open: the formula runs, and its gradient."""

    def loss(x):
        group = functools.partial(jaxnorm.group_norm, implementation="triton")
        y = jaxnorm.layer_norm(x, implementation="triton")
        return (group(y, num_groups=2, activation="silu") ** 3).sum()

    program = exported(jax.grad(loss), opened((2, 3, 3, 8), [-1]))
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 8)).astype(np.float32)
    close(program.call(x), jax.jit(jax.grad(loss))(x))


MUST_BE_KNOWN = [
    (
        lambda x: jaxnorm.virtual_batch_norm(x, size=3),
        r"size=3 examples of reference do not fit in an input of shape \(b, h, c\): "
        r'give jax.export.symbolic_shape "b >= 3"',
    ),
    (
        lambda x: jaxnorm.group_norm(x, num_groups=2),
        r"num_groups=2 does not divide the c features: .* such as 2\*k in jax.export",
    ),
    (
        lambda x: jaxnorm.IterNorm().init_stats(x.shape[-1:]),
        r"group_size=64 does not divide the c features: .* such as 64\*k in jax.export",
    ),
    (
        lambda x: jaxnorm.layer_norm(x, mask=x[:, 0, :1] > 0),
        r"mask of shape \(b, 1\) does not broadcast to the input of shape \(b, h, c\)",
    ),
    (
        lambda x: jaxnorm.instance_norm(x[:, :1]),
        r"InstanceNorm over an input of shape \(b, 1, c\) would take each variance of",
    ),
    (
        lambda x: jax.vmap(
            lambda x: jaxnorm.layer_norm(x, axis_name="d"), axis_name="d"
        )(x),
        "axis_name='d' maps an axis whose size is open, over which JAX cannot sum",
    ),
]


@pytest.mark.parametrize("call, message", MUST_BE_KNOWN)
def test_what_must_be_known(call, message):
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, c"), np.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, x)
