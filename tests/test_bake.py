"""Baking: plain layers compute what the wrapped ones do, and nothing else is left."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import assert_identical, sample
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.linen import bake

WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")
names = pytest.mark.parametrize("name", WRAPPERS)
X = sample((2, 4, 4, 3))


def plain(layer, **settings):
    """What the layer is without its wrapper."""
    return lambda x, **call: layer(x)


def drawn(tree):
    """Arrays like those of `tree`, off their initial values and positive."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape).astype(a.dtype)), tree
    )


def described(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def assert_close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all() and np.abs(want).max() > 0.1
    limit = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=limit)


# ---- Linen ------------------------------------------------------------------------


def wrapped(layer, kind, **settings):
    return kind(layer, **settings)


def unwrapped(layer, kind, **settings):
    return plain(layer)


class Net(nn.Module):
    """Wrappers of every kind, at every place."""

    def setup(self):
        standardized = jaxnorm.linen.WeightStandardization
        self.stem = standardized(nn.Conv(4, (3, 3)), scaled=True)
        self.branches = [
            jaxnorm.linen.WeightNorm(nn.Dense(4), use_scale=use_scale)
            for use_scale in (True, False)
        ]
        self.body = Body(wrapped)

    def __call__(self, x):
        x = self.stem(x)
        return self.body(sum(branch(x) for branch in self.branches))


class Normed(nn.Module):
    """Layers in a layer, and statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        return nn.Dense(4)(jaxnorm.linen.BatchNorm(True)(jnp.tanh(x)))


class Body(nn.Module):
    wrap: Any

    @nn.compact
    def __call__(self, x):
        linen = jaxnorm.linen
        many = self.wrap(
            Normed(name="many"), kind=linen.WeightNorm, variable_filter=["many/first"]
        )
        x = nn.Dense(4)(many(x))
        every = {"variable_filter": None, "feature_axes": None, "name": "every"}
        x = self.wrap(nn.Dense(4), kind=linen.WeightNorm, **every)(x)
        settings = {"n_steps": 2, "collection_name": "spectra"}
        last = self.wrap(nn.Dense(3), kind=linen.SpectralNorm, **settings)
        return last(x, update_stats=False)


class Placed(Net):
    """The same without them: layers in `setup` have the names of its attributes."""

    def setup(self):
        self.stem = nn.Conv(4, (3, 3))
        self.branches = [nn.Dense(4), nn.Dense(4)]
        self.body = Body(unwrapped)


@pytest.mark.parametrize("transform", [lambda net: net, nn.remat, nn.jit])
def test_the_model_without_wrappers_takes_what_is_baked(transform):
    model, without = transform(Net)(), Placed()
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    before = jax.tree.map(np.array, variables)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), X)
    baked = bake(model.apply, variables, shapes)
    expected = jax.eval_shape(without.init, jax.random.key(0), X)
    assert described(baked) == described(expected)
    assert_close(without.apply(baked, X), model.apply(variables, X))
    assert_identical(variables, before)
    jax.tree.map(lambda v: v.delete(), baked)  # in buffers of its own
    assert_identical(variables, before)


@names
def test_kernels_are_those_of_the_functions(name):
    """Also of a wrapper that is the whole model."""
    wrapper = getattr(jaxnorm.linen, name)(nn.Dense(4))
    flags: Any = {"update_stats": False} if name == "SpectralNorm" else {}
    init = functools.partial(wrapper.init, **flags)
    variables = drawn(jax.eval_shape(init, jax.random.key(0), X))
    params, stats = variables["params"], variables.get("batch_stats", {})
    kernel = np.asarray(params["layer_instance"]["kernel"], np.float64)
    scale = np.asarray(params.get("layer_instance/kernel/scale", 1), np.float64)
    if name == "WeightNorm":
        kernel = kernel / np.sqrt((kernel**2).sum(0)) * scale
    elif name == "WeightStandardization":
        kernel = (kernel - kernel.mean(0)) / np.sqrt(kernel.var(0) + 1e-6) * scale
    else:
        v = kernel @ np.asarray(stats["layer_instance/kernel/u"], np.float64)[0]
        kernel = kernel / np.linalg.norm(v / np.linalg.norm(v) @ kernel)
    baked = bake(wrapper.apply, variables, X, **flags)
    assert {*baked} == {"params"} and {*baked["params"]} == {"kernel", "bias"}
    assert_close(baked["params"]["kernel"], kernel, 2e-6)


def test_a_sequence_of_layers():
    wrap = jaxnorm.linen.WeightNorm
    model = nn.Sequential([wrap(nn.Dense(4)), nn.relu, wrap(nn.Dense(2))])
    without = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    variables = drawn(model.init(jax.random.key(0), X))
    baked = bake(model.apply, variables, X)
    assert_close(without.apply(baked, X), model.apply(variables, X))


def test_folding_goes_on():
    class Model(nn.Module):
        wrap: Any = jaxnorm.linen.WeightStandardization
        norms: bool = True

        @nn.compact
        def __call__(self, x):
            x = self.wrap(nn.Conv(4, (3, 3)))(x)
            return jaxnorm.linen.BatchNorm(True)(x) if self.norms else x

    model, without = Model(), Model(wrap=plain)
    variables = drawn(model.init(jax.random.key(0), X))
    baked = bake(model.apply, variables, X)
    pairs = jaxnorm.models.find_pairs(without.apply, baked, X)
    folded = jaxnorm.models.fold(baked, pairs)
    served = Model(wrap=plain, norms=False).apply(folded, X)
    assert_close(served, model.apply(variables, X))


def test_boxes_and_dtypes_stay():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(4, kernel_init=init, param_dtype=jnp.bfloat16)
    model = jaxnorm.linen.WeightNorm(layer, dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), X)
    kernel = bake(model.apply, variables, X)["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    assert kernel.value.dtype == jnp.bfloat16


class Stacked(nn.Module):
    use_scale: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(x.shape[-1], name="dense")
        return jaxnorm.linen.WeightNorm(layer, use_scale=self.use_scale)(x), None


def test_stacked_layers_are_baked_one_by_one():
    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.scan(Stacked, length=3, **axes)(use_scale=True)
    variables = drawn(model.init(jax.random.key(0), X))
    with pytest.raises(ValueError, match=r"(?s)\(3, 3\).*\(3, 3, 3\).*jax\.vmap"):
        bake(model.apply, variables, X)
    one = Stacked(use_scale=True).apply
    baked = jax.vmap(lambda variables: bake(one, variables, X))(variables)
    dense = nn.scan(lambda layer, x: (layer(x), None), length=3, **axes)
    y, _ = nn.apply(dense, nn.Dense(3))({"params": baked["params"]["dense"]}, X)
    assert_close(y, model.apply(variables, X)[0])


def wrapped_and_plain(dense, x):
    return dense(jaxnorm.linen.WeightNorm(dense)(x))


def wrapped_by_two(dense, x):
    return jaxnorm.linen.WeightNorm(dense)(jaxnorm.linen.WeightNorm(dense)(x))


def wrapped_twice(dense, x):
    wrapper = jaxnorm.linen.WeightNorm(dense)
    return jaxnorm.linen.WeightStandardization(wrapper)(x)


def wrapped_by_flax(dense, x):
    return nn.WeightNorm(dense)(x)


class Own(jaxnorm.linen.WeightNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


class OneLayer(nn.Module):
    call: Any

    @nn.compact
    def __call__(self, x, more=True):
        return self.call(nn.Dense(x.shape[-1], name="dense"), x) if more else x


@pytest.mark.parametrize(
    "call, words",
    [
        (wrapped_and_plain, "'dense' is also called without its wrapper"),
        (wrapped_by_two, "by the wrappers at 'WeightNorm_1' and 'WeightNorm_0'"),
        (wrapped_twice, "'WeightNorm_0' is called within that at 'WeightStandard"),
        (wrapped_by_flax, "flax.linen.*take the class from jaxnorm.linen"),
        (lambda dense, x: Own(dense)(x), "Own, whose kernels jaxnorm does not know"),
        (lambda dense, x: dense(x), "called no WeightNorm.*nothing to bake"),
    ],
)
def test_what_cannot_be_baked_is_said(call, words):
    model = OneLayer(call)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=words):
        bake(model.apply, variables, X)


def test_wrappers_that_are_not_reached_are_named():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, second=True):
            x = jaxnorm.linen.WeightNorm(nn.Dense(3))(x)
            layer = jaxnorm.linen.SpectralNorm(nn.Dense(3))
            return layer(x, update_stats=False) if second else x

    variables = Two().init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="reaches no wrapper.*Dense_1/kernel/u.*argu"):
        bake(Two().apply, variables, X, second=False)


@pytest.mark.parametrize(
    "apply, variables, words",
    [
        (nn.Dense(3), {}, r"pass its method, bake\(model\.apply"),
        (nnx.Linear(3, 3, rngs=nnx.Rngs(0)), {}, r"jaxnorm\.nnx\.bake\(model\)"),
        (3, {}, "apply must be a function"),
        (print, 3, "variables must be nested mappings"),
        (print, {"params": "words"}, "must hold arrays"),
    ],
)
def test_other_kinds_of_arguments_are_named(apply, variables, words):
    with pytest.raises(TypeError, match=words):
        bake(apply, variables, X)


# ---- NNX --------------------------------------------------------------------------


class Wrapped(nnx.Module):
    """A wrapped layer in two places, and one in two wrappers."""

    def __init__(self, name, rngs, **settings):
        wrap = functools.partial(getattr(jaxnorm.nnx, name), rngs=rngs, **settings)
        self.stem = wrap(nnx.Conv(3, 4, (3, 3), rngs=rngs))
        self.layers = nnx.List([wrap(nnx.Linear(4, 4, rngs=rngs)), nnx.relu])
        self.again = self.layers[0]
        self.both = jaxnorm.nnx.WeightStandardization(
            wrap(nnx.Linear(4, 4, rngs=rngs)), rngs=rngs
        )

    def __call__(self, x):
        return self.both(self.again(self.layers[0](self.stem(x))))


@names
def test_an_nnx_model_becomes_one_of_plain_layers(name):
    model = Wrapped(name, nnx.Rngs(0))
    model.eval()
    state = nnx.state(model, nnx.Param)
    nnx.update(model, drawn(state))
    before = jax.tree.map(np.array, nnx.state(model))
    baked = jaxnorm.nnx.bake(model)
    assert [type(m) for m in (baked.stem, baked.again, baked.both)] == [
        nnx.Conv,
        nnx.Linear,
        nnx.Linear,
    ]
    assert baked.again is baked.layers[0]
    left = jax.tree.leaves(nnx.state(baked), is_leaf=is_variable)
    assert [type(v) for v in left] == [nnx.Param] * 6
    assert_close(baked(X), model(X))
    jax.tree.map(lambda v: v.delete(), nnx.state(baked))  # in buffers of its own
    assert_identical(jax.tree.map(np.array, nnx.state(model)), before)


def is_variable(v):
    return isinstance(v, nnx.Variable)


def test_an_nnx_wrapper_may_be_the_model_and_hold_statistics():
    rngs = nnx.Rngs(0)
    layer = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), jaxnorm.nnx.BatchNorm(4, rngs=rngs)
    )
    model = jaxnorm.nnx.WeightNorm(layer, rngs=rngs)
    model(X)  # moves the statistics
    model.eval()
    baked = jaxnorm.nnx.bake(model)
    assert type(baked) is nnx.Sequential
    assert_close(baked(X), model(X))
    folded = jaxnorm.nnx.fold(baked, X)
    assert_close(folded(X), model(X))


def test_stacked_nnx_layers_are_baked_one_by_one():
    def make(rngs):
        return jaxnorm.nnx.WeightNorm(nnx.Linear(3, 3, rngs=rngs), rngs=rngs)

    def called(layers, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)

    stacked = nnx.vmap(make)(nnx.Rngs(0).split(3))
    baked = nnx.vmap(jaxnorm.nnx.bake)(stacked)
    assert type(baked) is nnx.Linear
    assert_close(called(baked, X), called(stacked, X))


class OwnNNX(jaxnorm.nnx.WeightNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


class Shared(nnx.Module):
    def __init__(self, layer, wrapper, another):
        self.wrapper, self.another = wrapper(layer, rngs=nnx.Rngs(0)), another(layer)


def nnx_models():
    layer, ours = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jaxnorm.nnx.WeightNorm
    again = functools.partial(ours, rngs=nnx.Rngs(1))
    both = "also holds at '(wrapper|another)/layer_instance/kernel"
    held = "'wrapper' normalizes a parameter that the model also holds at 'another"
    return [
        (layer, "holds no WeightNorm.*nothing to bake"),
        (nnx.SpectralNorm(layer, rngs=nnx.Rngs(0)), "flax.nnx.*jaxnorm.nnx"),
        (OwnNNX(layer, rngs=nnx.Rngs(0)), "OwnNNX, whose kernels"),
        (Shared(layer, ours, lambda layer: layer), held),
        (Shared(layer, ours, again), both),
        (Shared(layer, ours, lambda layer: layer.kernel), held),
    ]


@pytest.mark.parametrize("case", range(6))
def test_what_an_nnx_model_cannot_bake_is_said(case):
    model, words = nnx_models()[case]
    with pytest.raises(ValueError, match=words):
        jaxnorm.nnx.bake(model)


def test_a_shared_bias_stays_shared():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    baked = jaxnorm.nnx.bake(Shared(layer, jaxnorm.nnx.WeightNorm, lambda v: v.bias))
    assert baked.wrapper.bias is baked.another
