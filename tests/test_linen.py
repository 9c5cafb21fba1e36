"""What is special to jaxnorm.linen: collections, names, boxes and lifted transforms.

The numbers are tested for both APIs in test_norm_modules.py.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import (
    LINEN,
    NAMES,
    SHAPE,
    applied,
    assert_close,
    assert_identical,
    initial,
    names,
    sample,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen

ours, theirs, generic = LINEN.ours, LINEN.theirs, LINEN.generic


@names
def test_fields_extend_flax(name):
    """Fields are what `clone`, `copy` and pretty printers see."""
    fields = [f.name for f in dataclasses.fields(getattr(nn, name))]
    own = [f.name for f in dataclasses.fields(getattr(jaxnorm.linen, name))]
    assert [f for f in own if f in fields] == fields


def test_signature_of_the_generic_module():
    expected = {
        "norm": inspect.Parameter.empty,
        "use_running_average": None,
        "dtype": None,
        "param_dtype": jnp.float32,
        "use_scale": True,
        "use_bias": True,
        "scale_init": None,
        "bias_init": None,
    }
    parameters = inspect.signature(jaxnorm.linen.Norm).parameters.items()
    found = [(k, p.default) for k, p in parameters]
    assert found[: len(expected)] == list(expected.items())


def test_arguments_in_flax_positions():
    positions = (None, 1, 0.5, 1e-2, jnp.bfloat16, jnp.float16, False)

    def run(x, lib):
        module = lib.BatchNorm(*positions)
        y, variables = module.init_with_output(jax.random.key(0), x, False)
        return y, variables, module.momentum, module.epsilon

    libs = jaxnorm.linen, nn
    runs = [functools.partial(run, lib=lib) for lib in libs]
    found, expected = (jax.eval_shape(f, sample()) for f in runs)
    assert found == expected
    # The torch habit: the first position of Flax's layer norm is epsilon.
    assert jaxnorm.linen.LayerNorm(12).epsilon == 12


def test_own_arguments_survive_cloning():
    module = jaxnorm.linen.BatchNorm(use_running_average=False, unbiased=True)
    clone = module.clone(momentum=0.5)
    assert (clone.unbiased, clone.momentum) == (True, 0.5)
    assert clone == jaxnorm.linen.BatchNorm(False, momentum=0.5, unbiased=True)
    assert hash(clone) == hash(clone.clone())


def test_training_needs_a_mutable_collection():
    x = sample()
    module, reference = ours("BatchNorm").make(), theirs("BatchNorm").make()
    variables = theirs("BatchNorm").variables()
    with pytest.raises(Exception) as expected:
        reference.apply(variables, x)
    with pytest.raises(expected.type, match="batch_stats"):
        module.apply(variables, x)
    # Evaluation does not.
    module.clone(use_running_average=True).apply(variables, x)


def test_initializers_of_several_axes():
    calls = []

    def recorded(key, shape, dtype):
        calls.append((jax.random.key_data(key).shape, tuple(shape), dtype))
        return jnp.full(shape, 3, dtype)

    kwargs = {"scale_init": recorded, "bias_init": recorded, "axis": (1, 3)}
    kwargs["param_dtype"] = jnp.bfloat16
    layers = ours("BatchNorm", **kwargs), theirs("BatchNorm", **kwargs)
    found, expected = initial(layers, sample())
    assert calls[:2] == calls[2:] and len(calls) == 4
    assert_identical(found, expected)


@names
def test_partitioned_parameters(name):
    def drawn(key, shape, dtype):
        return jnp.resize(jax.random.key_data(key), tuple(shape)).astype(dtype)

    kwargs = {"scale_init": nn.with_partitioning(drawn, names=("model",))}
    if name != "RMSNorm":
        kwargs["bias_init"] = nn.with_logical_partitioning(drawn, names=("embed",))
    layers = [maker(name, **kwargs) for maker in (theirs, ours, generic)]
    expected, *found = initial(layers, sample())
    for variables in found:
        # The structure of the tree holds the boxes and their names.
        assert_identical(variables, expected)
        assert isinstance(variables["params"]["scale"], nn.Partitioned)
        assert nn.get_partition_spec(variables) == nn.get_partition_spec(expected)
    boxed, unboxed = (
        [y for y, _ in applied(layers, variables, sample())]
        for variables in (expected, nn.unbox(expected))
    )
    assert_identical(boxed, unboxed)
    assert_close(boxed[1:], boxed[:1] * 2, 1e-4)


def test_partitioned_parameters_on_a_mesh():
    """Parameters come out on their devices, and normalize as ever."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    ones = nn.with_partitioning(nn.initializers.ones, ("model",), mesh=mesh)
    layer, plain = ours("LayerNorm", scale_init=ones), ours("LayerNorm")
    variables, expected = initial([layer, plain], sample())
    assert nn.unbox(variables)["params"]["scale"].sharding.spec == P("model")
    y, _ = layer.apply(variables, sample())
    assert_close(y, plain.apply(expected, sample())[0])


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("force", [True, False])
def test_running_statistics_are_float32(x_dtype, param_dtype, force):
    """Unlike Flax's, also with force_float32_reductions=False; and they stay so."""
    kwargs = {"param_dtype": param_dtype, "dtype": "bfloat16"}
    layer = ours("BatchNorm", force_float32_reductions=force, **kwargs)
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    variables = jax.eval_shape(layer.init, x)
    stats = jax.ShapeDtypeStruct((6,), jnp.float32)
    assert variables["batch_stats"] == {"mean": stats, "var": stats}
    y, updated = jax.eval_shape(layer.apply, variables, x)
    assert y.dtype == jnp.bfloat16
    assert updated == variables


def test_a_summary_of_one_example():
    """`tabulate` on a batch of one says nothing but the table."""
    for layer in (ours("BatchNorm"), generic("BatchNorm")):
        table = layer.make().tabulate(jax.random.key(0), jnp.ones((1, 6)))
        assert "batch_stats" in table


# Inside models.


def network(lib):
    """A small residual network, written for the namespace `lib`."""

    class Block(nn.Module):
        norm: Callable[..., nn.Module]

        @nn.compact
        def __call__(self, x):
            y = nn.relu(self.norm()(nn.Dense(6)(x)))
            return x + self.norm(scale_init=nn.initializers.zeros_init())(y)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            # Flax's own examples pass the norm on as such a partial.
            norm = functools.partial(
                lib.BatchNorm, use_running_average=not train, momentum=0.9
            )
            x = Block(norm, name="first")(x)
            x = x + lib.LayerNorm(scale_init=nn.initializers.normal(1.0))(x)
            x = lib.GroupNorm(num_groups=3)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    return Network()


def test_a_model_moves_over():
    """Same names, initial values, training and evaluation with one changed import."""
    models = network(nn), network(jaxnorm.linen)
    run = jax.numpy_rank_promotion("allow")

    @jax.jit
    def init(key):
        with run:
            return [m.init(key, sample(), train=True) for m in models]

    @jax.jit
    def steps(states, x):
        def step(model, variables):
            def loss(params):
                given = {**variables, "params": params}
                y, new = model.apply(given, x, train=True, mutable=["batch_stats"])
                return jnp.mean((y - 1) ** 2), new

            by, new = jax.grad(loss, has_aux=True)(variables["params"])
            moved = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], by)
            return {**new, "params": moved}

        with run:
            return [step(*pair) for pair in zip(models, states, strict=True)]

    @jax.jit
    def evaluate(variables, x):
        with run:
            return [m.apply(variables, x, train=False) for m in models]

    states = init(jax.random.key(0))
    assert_identical(*states)
    assert "BatchNorm_0" in states[1]["params"]["first"]
    assert set(states[1]["params"]) > {"LayerNorm_0", "GroupNorm_0"}
    for seed in range(3):
        states = steps(states, sample(seed=seed))
    # Flax's fast variance is in there, and three steps amplify its roundoff.
    assert_close(*states, tolerance=1e-3)
    # A checkpoint of either model goes into the other.
    for trained in states:
        assert_close(*evaluate(trained, sample()), tolerance=1e-4)


def test_automatic_names():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in NAMES:
                x = ours(name).make()(x)
                x = generic(name).make()(x)
            return x

    variables = jax.eval_shape(Model().init, jax.random.key(0), sample())
    own = {f"{name}_0" for name in NAMES}
    assert set(variables["params"]) == own | {f"Norm_{i}" for i in range(len(NAMES))}


def test_one_module_called_twice_updates_twice():
    """A siamese network: each call moves the running statistics once."""

    class Twice(nn.Module):
        def setup(self):
            self.norm = jaxnorm.linen.BatchNorm(False, momentum=0.5)

        def __call__(self, a, b):
            return self.norm(a) + self.norm(b)

    a, b = sample(seed=1), sample(seed=2)
    variables = Twice().init(jax.random.key(0), a, b)
    _, updated = Twice().apply(variables, a, b, mutable=["batch_stats"])
    axes = (0, 1, 2)
    expected = 0.5 * (0.5 * np.mean(a, axes)) + 0.5 * np.mean(b, axes)
    assert_close(updated["batch_stats"]["norm"]["mean"], expected)


# Under Flax's transforms.


def lifted(transform, lib):
    """A model that applies batch norm under the named transform."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return lib.BatchNorm(use_running_average=False, momentum=0.9)(x) + 1, None

    stacked = {
        "variable_axes": {"params": 0, "batch_stats": 0},
        "split_rngs": {"params": True},
    }
    shared = {
        "variable_axes": {"params": None, "batch_stats": None},
        "split_rngs": {"params": False},
        "axis_name": "example",
    }

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            match transform:
                case "scan over layers":
                    return nn.scan(Layer, length=3, **stacked)()(x, None)[0]
                case "vmap over an ensemble":
                    return nn.vmap(Layer, **stacked)()(x)[0]
                case "vmap over examples":
                    norm = nn.vmap(lib.BatchNorm, **shared)
                    return norm(False, momentum=0.9, axis_name="example")(x)
                case "remat":
                    return nn.remat(Layer)()(x)[0]
                case "remat of the norm":
                    return nn.remat(lib.BatchNorm)(False, momentum=0.9)(x)
                case "jit":
                    return nn.jit(Layer)()(x)[0]

    return Model()


@pytest.mark.parametrize(
    ("transform", "differentiated"),
    [
        ("scan over layers", False),
        ("vmap over an ensemble", False),
        ("vmap over examples", False),
        # Remat runs the forward pass twice in a gradient, and must update once.
        ("remat", True),
        ("remat of the norm", True),
        ("jit", True),
    ],
)
def test_transforms_are_flax(transform, differentiated):
    x = sample()
    models = lifted(transform, jaxnorm.linen), lifted(transform, nn)

    def outcome(model, variables, x):
        def loss(params, x):
            given = {**variables, "params": params}
            y, new = model.apply(given, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, new)

        if differentiated:
            return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return loss(variables["params"], x)[1]

    @jax.jit
    def run(x):
        with jax.numpy_rank_promotion("allow"):
            init, reference = (m.init(jax.random.key(0), x) for m in models)
            variables = jax.tree.map(lambda a: a + 0.5, init)
            return init, reference, [outcome(m, variables, x) for m in models]

    init, reference, outcomes = run(x)
    assert_identical(init, reference)
    assert_close(*outcomes, tolerance=1e-4)


def test_scan_over_time_carries_the_statistics():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            y = jaxnorm.linen.BatchNorm(False, momentum=0.5)(x)
            return carry + y.sum(), y

    scanned = nn.scan(
        Cell,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )

    @jax.jit
    def run(xs):
        start = jnp.zeros(())
        variables = Cell().init(jax.random.key(0), start, xs[0])
        return scanned().apply(variables, start, xs, mutable=["batch_stats"])[1]

    mean = np.zeros(6)
    for x in np.asarray(sample()):
        mean = 0.5 * mean + 0.5 * np.mean(x, (0, 1))
    assert_close(run(sample())["batch_stats"]["BatchNorm_0"]["mean"], mean)
