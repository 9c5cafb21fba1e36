"""What is special to jaxnorm.nnx: attributes, graphs, metadata and promote_dtype.

The numbers are tested for both APIs in test_norm_modules.py.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from apis import (
    FEATURES,
    LINEN,
    NNX,
    SHAPE,
    applied,
    assert_close,
    assert_identical,
    names,
    sample,
)
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_norm_modules import CASES

import jaxnorm
import jaxnorm.nnx


def theirs(name, **kwargs):
    return NNX.theirs(name, **kwargs).make()


def ours(name, **kwargs):
    return NNX.ours(name, **kwargs).make()


def generic(name, **kwargs):
    return NNX.generic(name, **kwargs).make()


def moved(layer):
    """`layer` with every variable off its initial value."""
    rng = np.random.default_rng(0)
    nnx.update(
        layer,
        jax.tree.map(
            lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape).astype(a.dtype)),
            nnx.state(layer),
        ),
    )
    return layer


def plain(module):
    """Paths and arrays of its variables."""
    return {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(module))}


def described(module):
    """Path, Variable type, shape, dtype and metadata of every variable."""
    return {
        path: (type(v), v.shape, str(v.dtype), v.get_metadata())
        for path, v in nnx.to_flat_state(nnx.state(module))
    }


def call(layer, x, **kwargs):
    with jax.numpy_rank_promotion("allow"):
        return layer(x, **kwargs)


# Constructors and attributes.


@pytest.mark.parametrize("name", jaxnorm.nnx.__all__)
def test_constructors_name_their_arguments(name):
    """Each of them, to type checkers, which read the source, and to `help`."""
    kind = getattr(jaxnorm.nnx, name)
    if inspect.isclass(kind):
        own = inspect.signature(kind.__init__).parameters
        assert "__init__" in vars(kind)
        for p in own.values():
            assert p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        assert list(inspect.signature(kind).parameters) == list(own)[1:]


def test_signature_of_the_generic_module():
    parameters = inspect.signature(jaxnorm.nnx.Norm.__init__).parameters
    empty = inspect.Parameter.empty
    expected = {
        "self": empty,
        "norm": empty,
        "num_features": empty,
        # The generic module trains unless told otherwise, as Flax's batch norm does.
        "use_running_average": False,
        "dtype": None,
        "param_dtype": jnp.float32,
        "use_scale": True,
        "use_bias": True,
        "scale_init": None,
        "bias_init": None,
        "promote_dtype": promote_dtype,
        "rngs": None,
        "scale_metadata": {},
        "bias_metadata": {},
    }
    assert {k: p.default for k, p in parameters.items()} == expected
    assert list(parameters) == list(expected)
    for name in list(parameters)[3:]:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_attributes_are_flax_attributes(name, kwargs):
    """What a Flax layer lets others read, under the same names; its variables have the
    same types, shapes and metadata."""
    reference, layer = theirs(name, **kwargs), ours(name, **kwargs)
    layer.use_fast_variance = False
    for key, value in vars(reference).items():
        if isinstance(value, nnx.Variable):
            assert type(getattr(layer, key)) is type(value)
        elif not key.startswith("_"):
            assert getattr(layer, key) == value, key
    assert described(layer) == described(reference)


def test_attributes_can_be_set():
    """Models are changed after they are built: those attributes are not copies."""
    x = sample()
    bns = [moved(m("BatchNorm", axis_name="absent")) for m in (theirs, ours)]
    lns = [moved(m("LayerNorm")) for m in (theirs, ours)]
    for bn, ln in zip(bns, lns, strict=True):
        bn.axis_name, bn.momentum, bn.epsilon = None, 0.5, 0.1
        ln.reduction_axes, ln.epsilon, ln.dtype = (1, 2, 3), 0.1, jnp.bfloat16
        ln.bias = None
    run = nnx.jit(lambda layers, x: [call(layer, x) for layer in layers])
    assert_close(*run(bns, x))
    a, b = (plain(bn) for bn in bns)
    assert_close(a, b)
    y, expected = run(lns, x)
    assert y.dtype == expected.dtype
    assert_close(y, expected, 0.1)
    layer = ours("InstanceNorm")
    for layer.feature_axes in (0, (0, 3)):
        with pytest.raises(ValueError):
            layer(x)


@pytest.mark.parametrize("maker", [ours, generic])
def test_train_eval_and_views(maker):
    class Model(nnx.Module):
        def __init__(self):
            self.bn = maker("BatchNorm")
            self.ln = generic("LayerNorm")

        def __call__(self, x):
            return self.ln(self.bn(x))

    model, x = Model(), sample()
    before = plain(model)
    model.eval()
    assert model.bn.use_running_average is True
    y = model(x)
    assert_identical(plain(model), before)
    # Nothing is written, so that the model may be closed over by a transform.
    assert_close(jax.jit(lambda x: model(x))(x), y)
    model.train()
    assert model.bn.use_running_average is False
    # A view evaluates with the variables of the model, which goes on training.
    view = nnx.view(model, use_running_average=True)
    assert model.bn.use_running_average is False
    assert_identical(view(x), y)
    assert_identical(plain(model), before)
    assert np.abs(model(x) - y).max() > 0.1
    changed = plain(model)
    assert not np.array_equal(changed["bn", "mean"], before["bn", "mean"])
    assert_identical(plain(view), changed)
    model.set_attributes(use_running_average=True)
    assert model.bn.use_running_average is True


# Variables.


@names
def test_initializers_leave_the_random_stream_where_flax_does(name):
    """For the layers that follow."""

    def draws(maker, **kwargs):
        rngs = nnx.Rngs(7, params=3)
        maker(name, rngs=rngs, **kwargs)
        return int(rngs.params.count[...]), int(rngs.default.count[...])

    scale = {"scale_init": nnx.initializers.ones}
    variants = [{}, scale, {"use_scale": False}]
    if name != "RMSNorm":
        bias = {"bias_init": nnx.initializers.ones}
        variants += [bias, {**scale, **bias}, {**scale, "use_bias": False}]
        variants += [{**scale, **bias, "use_scale": False}]
    for variant in variants:
        for dtype in (jnp.float32, jnp.bfloat16):
            kwargs = {"param_dtype": dtype, **variant}
            assert draws(ours, **kwargs) == draws(theirs, **kwargs), kwargs


@names
def test_sharding_metadata(name):
    """nnx.with_partitioning and scale_metadata, on a mesh as Flax demands."""
    x = sample()
    ones = nnx.initializers.ones_init()
    variants = [
        {"scale_init": nnx.with_partitioning(ones, ("model",))},
        {"scale_metadata": {"out_sharding": ("model",), "tag": "scale"}},
    ]
    if name != "RMSNorm":
        zeros = nnx.initializers.zeros_init()
        variants[0]["bias_init"] = nnx.with_partitioning(zeros, ("model",))
        variants[1]["bias_metadata"] = {"out_sharding": (None,), "tag": "bias"}
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    makers = [ours, generic] if name == "BatchNorm" else [ours]
    layer = found = None
    with jax.set_mesh(mesh):
        for kwargs in variants:
            reference = theirs(name, **kwargs)
            specs = nnx.get_partition_spec(nnx.state(reference))
            for maker in makers:
                layer = maker(name, **kwargs)
                assert described(layer) == described(reference)
                assert layer.scale.get_metadata("out_sharding") == ("model",)
                assert layer.scale[...].sharding.spec == P("model")
                assert nnx.get_partition_spec(nnx.state(layer)) == specs
        if name in ("BatchNorm", "LayerNorm"):
            found = nnx.jit(call)(layer, x)
    if name in ("BatchNorm", "LayerNorm"):
        assert_close(found, ours(name)(x))


@names
def test_states_load_both_ways(name):
    pairs = []
    for source, target in ((theirs, ours), (ours, theirs), (ours, generic)):
        trained, fresh = moved(source(name)), target(name)
        nnx.update(fresh, nnx.state(trained))
        assert_identical(plain(fresh), plain(trained))
        # As plain dicts too, which is what a checkpoint holds.
        pure = nnx.to_pure_dict(nnx.state(trained))
        state = nnx.state(target(name))
        nnx.replace_by_pure_dict(state, pure)
        assert_identical(nnx.to_pure_dict(state), pure)
        pairs.append((fresh, trained))
    run = nnx.jit(lambda pairs, x: [[call(layer, x) for layer in p] for p in pairs])
    for found, expected in run(pairs, sample()):
        assert_close(found, expected)


# dtypes.


@names
def test_promote_dtype_is_called_as_flax_calls_it(name):
    calls = []

    def recorded(args, **kwargs):
        calls.append(([None if a is None else a.shape for a in args], kwargs))
        return promote_dtype(args, **kwargs)

    def found(maker, **kwargs):
        calls.clear()
        layer = maker(name, promote_dtype=recorded, **kwargs)
        jax.eval_shape(layer.output, sample())
        return calls[:]

    for kwargs in ({}, {"use_scale": False}):
        assert found(NNX.ours, **kwargs) == found(NNX.theirs, **kwargs)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("target", [None, "float16", "float32"])
@names
def test_promote_dtype_decides_the_dtype(name, target, dtype):
    """Of the result. The values are not its business: it would round them too early."""

    def promote(args, **_):
        if target is None:
            return args
        return tuple(None if a is None else a.astype(target) for a in args)

    kwargs = {"promote_dtype": promote, "dtype": dtype, "param_dtype": jnp.bfloat16}
    layers = NNX.ours(name, **kwargs), NNX.theirs(name, **kwargs)
    for x_dtype in ("float16", "bfloat16"):
        x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
        (y, _), (expected, _) = (jax.eval_shape(layer.output, x) for layer in layers)
        assert y == expected


def test_running_statistics_are_not_cast_down():
    x = 100 + 0.05 * sample()
    kwargs = {"dtype": jnp.bfloat16, "use_running_average": True}
    layers = NNX.ours("BatchNorm", **kwargs), LINEN.theirs("BatchNorm", **kwargs)
    exact = np.asarray(x, np.float64)
    stats = {"mean": exact.mean((0, 1, 2)), "var": exact.var((0, 1, 2))}
    params = {"scale": np.ones(FEATURES), "bias": np.zeros(FEATURES)}
    variables = {"params": params, "batch_stats": stats}
    variables = jax.tree.map(lambda a: a.astype(np.float32), variables)
    (y, _), (expected, _) = applied(layers, variables, x)
    assert_close(y, expected, 2**-6)


def test_parameters_along_several_axes():
    """Which Flax has in Linen only."""
    kwargs: dict[str, Any] = {"reduction_axes": (1, 3), "feature_axes": (1, 3)}
    norm, shape = jaxnorm.LayerNorm(**kwargs), (3, FEATURES)
    layer = NNX.ours("Norm", norm=norm, num_features=shape)
    layers = layer, LINEN.theirs("LayerNorm", **kwargs)
    assert_close(*applied(layers, layer.variables(), sample()))


# Inside models.


class Network(nnx.Module):
    """A small network, written for the namespace `lib`."""

    def __init__(self, lib, rngs):
        draw = nnx.initializers.normal(1.0)
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.bn = lib.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.ln = lib.LayerNorm(6, scale_init=draw, rngs=rngs)
        self.gn = lib.GroupNorm(6, 3, use_scale=False, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn(self.first(x)))
        x = x + self.gn(self.ln(x))
        return self.last(x.mean((1, 2)))


def test_a_model_moves_over():
    """Same names, initial values, training and evaluation with one changed import."""

    @nnx.jit
    def step(models, optimizers, x):
        def loss(model):
            return jnp.mean((call(model, x) - 1) ** 2)

        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.update(model, nnx.grad(loss)(model))

    models = [Network(lib, nnx.Rngs(0)) for lib in (nnx, jaxnorm.nnx)]
    reference, model = models
    assert described(model) == described(reference)
    assert_identical(plain(model), plain(reference))
    update = optax.sgd(0.05, momentum=0.9)
    optimizers = [nnx.Optimizer(m, update, wrt=nnx.Param) for m in models]
    for seed in range(3):
        step(models, optimizers, sample(seed=seed))
    # Flax's fast variance is in there, and three steps amplify its roundoff.
    assert_close(plain(model), plain(reference), 1e-3)
    for m in models:
        m.eval()
    evaluate = nnx.jit(lambda models, x: [call(m, x) for m in models])
    # A checkpoint of either model goes into the other.
    for source, target in (models, models[::-1]):
        nnx.update(target, nnx.state(source))
        assert_close(*evaluate(models, sample(seed=9)), tolerance=1e-4)


def test_abstract_construction_and_merging():
    """`nnx.eval_shape`, then `nnx.merge` with restored values: how one loads models."""
    x = sample()
    trained = moved(Network(jaxnorm.nnx, nnx.Rngs(0)))
    abstract = nnx.eval_shape(lambda: Network(jaxnorm.nnx, nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract)
    restored = nnx.merge(graphdef, jax.tree.map(jnp.copy, nnx.state(trained)))
    assert_identical(restored(x), trained(x))
    assert_identical(plain(restored), plain(trained))
    clone = nnx.clone(restored)
    clone.bn(x)
    assert np.abs(clone.bn.mean[...] - restored.bn.mean[...]).max() > 1e-3


# Under Flax's transforms.


class Layer(nnx.Module):
    def __init__(self, lib, rngs):
        def drawn(key, shape, dtype):
            words = jax.random.key_data(key).astype(dtype) * 2.0**-32
            return 1 + jnp.resize(words, shape)

        self.bn = lib.BatchNorm(6, momentum=0.9, scale_init=drawn, rngs=rngs)

    def __call__(self, x):
        return call(self.bn, x) + 1


def stacked(lib, count):
    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def create(rngs):
        return Layer(lib, rngs)

    return create(nnx.Rngs(0))


def apply(layer, x):
    return layer(x)


def under_remat(lib):
    remat = nnx.remat(apply)
    gradient = nnx.grad(lambda x, layer: jnp.sum(remat(layer, x) ** 3))
    return Layer(lib, nnx.Rngs(0)), lambda layer, x: gradient(x, layer)


def under_scan(lib):
    axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
    scan = nnx.scan(lambda x, layer: layer(x), **axes)
    return stacked(lib, 3), lambda layers, x: scan(x, layers)


def under_scan_over_time(lib):
    def step(carry, x):
        total, layer = carry
        y = layer(x)
        return (total + y.sum(), layer), y

    scan = nnx.scan(step)
    return Layer(lib, nnx.Rngs(0)), lambda layer, x: scan((0.0, layer), x)[1]


def under_vmap(lib):
    return stacked(lib, 4), nnx.vmap(apply)


def under_named_vmap(lib):
    bn = lib.BatchNorm(6, axis_name="example", rngs=nnx.Rngs(0))
    return bn, nnx.vmap(call, in_axes=(None, 0), axis_name="example")


@pytest.mark.parametrize(
    "transformed",
    [
        under_remat,
        under_scan,
        under_scan_over_time,
        under_vmap,
        under_named_vmap,
    ],
)
def test_transforms_are_flax(transformed):
    x = sample()
    layers, runs = zip(*[transformed(lib) for lib in (jaxnorm.nnx, nnx)], strict=True)

    @nnx.jit
    def run(layers, x):
        return [f(layer, x) for f, layer in zip(runs, layers, strict=True)]

    assert_close(*run(layers, x), tolerance=1e-4)
    # One update also under remat, which runs the forward pass twice.
    a, b = (plain(layer) for layer in layers)
    assert_close(a, b)


def test_remat_updates_once():
    layer = ours("BatchNorm", momentum=0.5)
    remat = nnx.remat(apply)
    x = sample()
    nnx.jit(nnx.grad(lambda layer, x: jnp.sum(remat(layer, x) ** 3)))(layer, x)
    assert_close(layer.mean[...], 0.5 * np.mean(x, (0, 1, 2)))
