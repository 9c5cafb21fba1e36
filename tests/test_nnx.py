"""jaxnorm.nnx against flax.nnx: a user changes one import, and nothing else.

Flax NNX is the reference wherever it is right, with its two-pass variance. It is wrong
in more places than Linen: those tests, at the end of this file, compare with Linen.
"""

import functools
import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

FEATURES = 6
SHAPE = (4, 3, 4, FEATURES)
NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")

# What a class needs before it can be called on an array of SHAPE.
NEEDED = {"GroupNorm": {"num_groups": 2}}

# One settings value per class, for the generic module.
SETTINGS = {
    "BatchNorm": {"momentum": 0.9},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
}

# Constructor arguments that change the result, with at least one row for each of them.
CASES = [
    ("BatchNorm", {"momentum": 0.9}),
    ("BatchNorm", {"axis": 1, "num_features": 3, "epsilon": 1e-2}),
    ("BatchNorm", {"use_running_average": True, "use_bias": False}),
    ("BatchNorm", {"use_scale": False, "use_bias": False}),
    ("LayerNorm", {"epsilon": 1e-2}),
    ("LayerNorm", {"reduction_axes": (1, 2, 3), "use_scale": False}),
    ("LayerNorm", {"reduction_axes": (1, 2), "use_bias": False}),
    ("LayerNorm", {"feature_axes": 1, "num_features": 3}),
    ("RMSNorm", {"epsilon": 1e-2}),
    ("RMSNorm", {"reduction_axes": (1, 2, 3), "feature_axes": 1, "num_features": 3}),
    ("RMSNorm", {"use_scale": False}),
    ("GroupNorm", {"num_groups": 3, "epsilon": 1e-2}),
    ("GroupNorm", {"num_groups": None, "group_size": 3}),
    ("GroupNorm", {"use_scale": False, "use_bias": False}),
    ("InstanceNorm", {"epsilon": 1e-2}),
    ("InstanceNorm", {"feature_axes": 1, "num_features": 3}),
    ("InstanceNorm", {"use_scale": False, "use_bias": False}),
]

cases = pytest.mark.parametrize(
    ("name", "kwargs"), CASES, ids=[f"{name}-{kwargs}" for name, kwargs in CASES]
)
names = pytest.mark.parametrize("name", NAMES)


def sample(shape=SHAPE, seed=0):
    """Float32 values whose mean is not 0 and whose deviation is not 1."""
    return 2 * jax.random.normal(jax.random.key(seed), shape) + 1


def sample_mask():
    """Every fifth element is masked: along each axis of SHAPE at least two are not."""
    return (jnp.arange(np.prod(SHAPE)) % 5 > 0).reshape(SHAPE)


def make(lib, name, num_features=FEATURES, **kwargs):
    kwargs = {**NEEDED.get(name, {}), "rngs": nnx.Rngs(0), **kwargs}
    return getattr(lib, name)(num_features, **kwargs)


def theirs(name, **kwargs):
    """Flax's layer, with the variance that is right."""
    return make(nnx, name, **{"use_fast_variance": False, **kwargs})


def ours(name, **kwargs):
    return make(jaxnorm.nnx, name, **kwargs)


def generic(name, **kwargs):
    norm = getattr(jaxnorm, name)(**SETTINGS[name])
    kwargs = {"use_running_average": False, "rngs": nnx.Rngs(0), **kwargs}
    return jaxnorm.nnx.Norm(norm, FEATURES, **kwargs)


def randomize(layer, seed=0):
    """Moves every variable off its initial value, keeping it positive."""
    rng = np.random.default_rng(seed)

    def move(a):
        return jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype)

    nnx.update(layer, jax.tree.map(move, nnx.state(layer)))
    return layer


def pair(name, **kwargs):
    """Flax's layer and jaxnorm's, with the variables of the former in both."""
    reference = randomize(theirs(name, **kwargs))
    layer = ours(name, **kwargs)
    nnx.update(layer, nnx.state(reference))
    return reference, layer


def promotion(layer):
    """Flax may promote ranks, jaxnorm must not need to."""
    module = type(layer).__module__
    return jax.numpy_rank_promotion("allow" if module.startswith("flax.") else "raise")


def call(layer, x, **kwargs):
    with promotion(layer):
        return layer(x, **kwargs)


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, state, x, **kwargs):
    layer = nnx.merge(graphdef, state)
    return call(layer, x, **kwargs), plain(nnx.state(layer))


def forward(layer, x, **kwargs):
    """Output and state after the call; the layer itself stays as it is.

    Compiled: layers with the same attributes share the compilation.
    """
    return _forward(*nnx.split(layer), x, **kwargs)


@functools.partial(jax.jit, static_argnames="graphdef")
def _outcome(graphdef, state, x, **kwargs):
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    if "mask" in kwargs:
        # What stands at masked elements is padding: a loss does not read it.
        weights = jnp.where(kwargs["mask"], weights, 0)

    def loss(layer, x):
        y = call(layer, x, **kwargs)
        return jnp.sum(weights * y), y

    layer = nnx.merge(graphdef, state)
    by = nnx.grad(loss, argnums=(0, 1), has_aux=True)
    (by_layer, by_x), y = by(layer, x)
    return y, plain(nnx.state(layer)), plain(by_layer), by_x


def outcome(layer, x, **kwargs):
    """As `forward`, and gradients by the parameters and the input."""
    return _outcome(*nnx.split(layer), x, **kwargs)


def plain(state):
    """Paths and arrays of a state."""
    return {path: v.get_value() for path, v in nnx.to_flat_state(state)}


def described(module):
    """Path, Variable type, shape, dtype and metadata of every variable."""
    return {
        path: (type(v), v.shape, str(v.dtype), v.get_metadata())
        for path, v in nnx.to_flat_state(nnx.state(module))
    }


def assert_close(got, want, tolerance=1e-5):
    """Equal trees of finite numbers, up to a few hundred float32 roundoffs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        # Apart from the comparison, to which NaN equals NaN.
        assert np.isfinite(g).all() and np.isfinite(w).all()
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def assert_identical(got, want):
    """Equal trees: names, shapes, dtypes and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert np.isfinite(np.asarray(g, np.float64)).all()
        assert np.array_equal(g, w)


# The same constructor and call arguments.


def assert_extends(flax_function, our_function):
    """Flax's parameters first, unchanged; the rest keyword-only and optional."""
    flax_parameters = list(inspect.signature(flax_function).parameters.values())
    our_parameters = list(inspect.signature(our_function).parameters.values())
    count = len(flax_parameters)
    for f, o in zip(flax_parameters, our_parameters, strict=False):
        assert (o.name, o.kind) == (f.name, f.kind)
        assert o.default is f.default or o.default == f.default, f.name
    assert len(our_parameters) >= count
    for o in our_parameters[count:]:
        assert o.kind is inspect.Parameter.KEYWORD_ONLY, o.name
        assert o.default is not inspect.Parameter.empty, o.name


@names
def test_signatures_extend_flax(name):
    flax_class, our_class = getattr(nnx, name), getattr(jaxnorm.nnx, name)
    assert_extends(flax_class.__init__, our_class.__init__)
    assert_extends(flax_class.__call__, our_class.__call__)
    if name == "BatchNorm":
        assert_extends(flax_class.set_view, our_class.set_view)


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


def test_own_arguments_are_in_the_signature():
    """Where `help` and editors find them."""
    parameters = inspect.signature(jaxnorm.nnx.BatchNorm.__init__).parameters
    assert parameters["unbiased"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["unbiased"].default is False


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


@cases
def test_attributes_are_flax_attributes(name, kwargs):
    """What a Flax layer lets others read, under the same names."""
    reference, layer = theirs(name, **kwargs), ours(name, **kwargs)
    layer.use_fast_variance = False
    for key, value in vars(reference).items():
        if isinstance(value, nnx.Variable):
            assert type(getattr(layer, key)) is type(value)
        elif not key.startswith("_"):
            assert getattr(layer, key) == value, key


def test_attributes_can_be_set():
    """Models are changed after they are built: those attributes are not copies."""
    x = sample()
    reference, layer = pair("BatchNorm", axis_name="absent")
    for bn in (reference, layer):
        bn.axis_name, bn.momentum, bn.epsilon = None, 0.5, 0.1
    assert_close(forward(layer, x), forward(reference, x))
    reference, layer = pair("LayerNorm")
    for ln in (reference, layer):
        ln.reduction_axes, ln.epsilon, ln.dtype = (1, 2, 3), 0.1, jnp.bfloat16
        ln.bias = None
    y, expected = forward(layer, x)[0], forward(reference, x)[0]
    assert y.dtype == expected.dtype
    assert_close(y, expected, 0.1)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GroupNorm", {"num_groups": 4}),
        ("GroupNorm", {"num_groups": None, "group_size": 4}),
        ("GroupNorm", {"num_groups": None}),
        ("GroupNorm", {"group_size": 3}),
        ("GroupNorm", {"num_groups": 0}),
    ],
)
def test_what_flax_refuses_to_construct(name, kwargs):
    with pytest.raises(ValueError):
        theirs(name, **kwargs)
    with pytest.raises(ValueError):
        ours(name, **kwargs)


@pytest.mark.parametrize("axes", [0, (0, 3)])
def test_instance_norm_keeps_its_batch_axis(axes):
    for layer in (theirs("InstanceNorm", feature_axes=axes), ours("InstanceNorm")):
        layer.feature_axes = axes
        with pytest.raises(ValueError):
            layer(sample())


@pytest.mark.parametrize("at_call", [None, False, True])
@pytest.mark.parametrize("constructor", [None, False, True])
@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_use_running_average(which, constructor, at_call):
    """The call has the last word; one of the two is needed."""
    x = sample()
    kwargs = {"use_running_average": constructor}
    reference, layer = pair("BatchNorm", momentum=0.9, **kwargs)
    if which == "Norm":
        layer = generic("BatchNorm", **kwargs)
        nnx.update(layer, nnx.state(reference))
    if constructor is None and at_call is None:
        with pytest.raises(ValueError) as error:
            reference(x)
        with pytest.raises(error.type, match="use_running_average"):
            layer(x)
        return
    expected = call(reference, x, use_running_average=at_call)
    assert_close(call(layer, x, use_running_average=at_call), expected)
    assert_close(plain(nnx.state(layer)), plain(nnx.state(reference)))


@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_train_eval_and_views(which):
    class Model(nnx.Module):
        def __init__(self):
            self.bn = ours(which) if which == "BatchNorm" else generic("BatchNorm")
            self.ln = generic("LayerNorm")

        def __call__(self, x):
            return self.ln(self.bn(x))

    model, x = Model(), sample()
    before = plain(nnx.state(model))
    model.eval()
    assert model.bn.use_running_average is True
    y = model(x)
    assert_identical(plain(nnx.state(model)), before)
    # Nothing is written, so that the model may be closed over by a transform.
    assert_close(jax.jit(lambda x: model(x))(x), y)
    model.train()
    assert model.bn.use_running_average is False
    # A view evaluates with the variables of the model, which goes on training.
    view = nnx.view(model, use_running_average=True)
    assert model.bn.use_running_average is False
    assert_identical(view(x), y)
    assert_identical(plain(nnx.state(model)), before)
    assert np.abs(model(x) - y).max() > 0.1
    changed = plain(nnx.state(model))
    assert not np.array_equal(changed["bn", "mean"], before["bn", "mean"])
    assert_identical(plain(nnx.state(view)), changed)
    model.set_attributes(use_running_average=True)
    assert model.bn.use_running_average is True


# The same variables.


@cases
def test_variables_are_flax_variables(name, kwargs):
    reference, layer = theirs(name, **kwargs), ours(name, **kwargs)
    assert described(layer) == described(reference)
    assert_identical(plain(nnx.state(layer)), plain(nnx.state(reference)))
    for key in ("scale", "bias"):
        if hasattr(reference, key) and getattr(reference, key) is None:
            assert getattr(layer, key) is None


def random_variants(name):
    """Constructor arguments that differ in which parameters are drawn at random."""
    scale = {"scale_init": nnx.initializers.normal(1.0)}
    if name == "RMSNorm":
        return [{}, scale, {"use_scale": False}]
    bias = {"bias_init": nnx.initializers.uniform(1.0)}
    return [
        {},
        scale | bias,
        bias,
        scale | {"use_bias": False},
        scale | bias | {"use_scale": False},
    ]


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@names
def test_random_initializers_draw_what_flax_draws(name, param_dtype):
    """And leave the random stream where Flax leaves it, for the layers that follow."""
    for variant in random_variants(name):
        counts, states = [], []
        for maker in (theirs, ours):
            rngs = nnx.Rngs(7, params=3)
            layer = maker(name, param_dtype=param_dtype, rngs=rngs, **variant)
            counts.append((int(rngs.params.count[...]), int(rngs.default.count[...])))
            states.append(plain(nnx.state(layer)))
        assert counts[1] == counts[0], variant
        assert_identical(states[1], states[0])


@names
def test_random_initializers_of_the_generic_module(name):
    """The same seed gives it the same values, whichever parameters are random."""
    for variant in random_variants(name):
        named = ours(name, rngs=nnx.Rngs(3), **variant)
        layer = generic(name, rngs=nnx.Rngs(3), **variant)
        assert_identical(plain(nnx.state(layer)), plain(nnx.state(named)))


def test_initializers_are_called_as_flax_calls_them():
    calls = []

    def recorded(key, shape, dtype):
        calls.append((np.asarray(jax.random.key_data(key)).tolist(), shape, dtype))
        return jnp.full(shape, 3, dtype)

    kwargs = {"scale_init": recorded, "bias_init": recorded}
    for name in ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm"):
        theirs(name, param_dtype=jnp.bfloat16, **kwargs)
        from_flax = calls[:]
        calls.clear()
        ours(name, param_dtype=jnp.bfloat16, **kwargs)
        assert calls == from_flax
        calls.clear()


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
    expected, _ = forward(ours(name), x)
    for kwargs in variants:
        with jax.set_mesh(mesh):
            reference, layer = theirs(name, **kwargs), ours(name, **kwargs)
            assert described(layer) == described(reference)
            assert layer.scale.get_metadata("out_sharding") == ("model",)
            assert layer.scale[...].sharding.spec == P("model")
            specs = nnx.get_partition_spec(nnx.state(reference))
            assert nnx.get_partition_spec(nnx.state(layer)) == specs
            if name in ("BatchNorm", "LayerNorm"):
                assert_close(forward(layer, x)[0], expected)


def test_sharding_metadata_of_the_generic_module():
    ones = nnx.with_partitioning(nnx.initializers.ones_init(), ("model",))
    metadata = {
        "scale_metadata": {"out_sharding": ("model",), "tag": "scale"},
        "bias_metadata": {"out_sharding": (None,), "tag": "bias"},
    }
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    with jax.set_mesh(mesh):
        for kwargs in ({"scale_init": ones}, metadata):
            found = generic("BatchNorm", **kwargs)
            assert described(found) == described(theirs("BatchNorm", **kwargs))
            scale = nnx.state(found)["scale"][...]
            assert scale.sharding.spec == P("model")


@names
def test_states_load_both_ways(name):
    x = sample()
    for source, target in ((theirs, ours), (ours, theirs), (ours, generic)):
        trained, fresh = randomize(source(name)), target(name)
        nnx.update(fresh, nnx.state(trained))
        assert_identical(plain(nnx.state(fresh)), plain(nnx.state(trained)))
        assert_close(call(fresh, x), call(trained, x))
        # As plain dicts too, which is what a checkpoint holds.
        pure = nnx.to_pure_dict(nnx.state(trained))
        state = nnx.state(target(name))
        nnx.replace_by_pure_dict(state, pure)
        assert_identical(plain(state), plain(nnx.state(trained)))


# The same numbers.


@cases
def test_values_are_flax(name, kwargs):
    reference, layer = pair(name, **kwargs)
    x = sample()
    assert_close(forward(layer, x), forward(reference, x))


def test_axes_may_be_lists():
    reference, layer = pair("LayerNorm", reduction_axes=[1, 2])
    layer.feature_axes = [3]
    x = sample()
    assert_close(nnx.jit(call)(layer, x), nnx.jit(call)(reference, x))


@pytest.mark.parametrize("name", ["BatchNorm", "GroupNorm"])
def test_gradients_are_flax(name):
    reference, layer = pair(name)
    x = sample()
    assert_close(outcome(layer, x), outcome(reference, x))


@names
def test_masked_values_and_gradients_are_flax(name):
    x, mask = sample(), sample_mask()
    reference, layer = pair(name)
    y, *rest = outcome(layer, x, mask=mask)
    y_flax, *rest_flax = outcome(reference, x, mask=mask)
    assert_close(y, jnp.where(mask, y_flax, 0))
    assert_close(rest, rest_flax)


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "int32"])
@names
def test_dtypes_are_flax(name, x_dtype):
    """Shapes and dtypes only: nothing is computed."""
    without = {"use_scale": False}
    if name != "RMSNorm":
        without["use_bias"] = False

    def run(maker, **kwargs):
        def construct_and_call(x):
            layer = maker(name, **kwargs)
            before = plain(nnx.state(layer))
            y = call(layer, x)
            return y, before, plain(nnx.state(layer))

        y, before, after = jax.eval_shape(
            construct_and_call, jax.ShapeDtypeStruct(SHAPE, x_dtype)
        )
        # Running statistics keep their dtype, at least float32.
        assert after == before
        for key in ("mean", "var"):
            if (key,) in after:
                assert after[key,].dtype == jnp.float32
        return y, after

    for dtype in (None, jnp.float32, jnp.bfloat16):
        for param_dtype in (jnp.float32, jnp.bfloat16):
            kwargs = {"dtype": dtype, "param_dtype": param_dtype}
            assert run(ours, **kwargs) == run(theirs, **kwargs), kwargs
        kwargs = {"dtype": dtype, **without}
        assert run(ours, **kwargs) == run(theirs, **kwargs), kwargs


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@names
def test_no_implicit_dtype_promotion(name, dtype):
    """Nor is any needed under JAX's strict setting, which Flax does not bear."""
    x = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    expected = jax.eval_shape(lambda x: ours(name, dtype=dtype)(x), x)
    with jax.numpy_dtype_promotion("strict"):
        for maker in (ours, generic):
            y = jax.eval_shape(lambda x, maker=maker: maker(name, dtype=dtype)(x), x)
            assert y == expected


@pytest.mark.parametrize("x_dtype", ["bfloat16", "int32"])
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
def test_values_of_other_dtypes_are_flax(name, x_dtype):
    """Where Flax NNX casts nothing down, which is with dtype=None."""
    x = (3 * sample()).astype(x_dtype)
    reference, layer = pair(name)
    found, expected = forward(layer, x), forward(reference, x)
    assert found[0].dtype == expected[0].dtype
    assert_close(found, expected)


@names
def test_promote_dtype_is_called_as_flax_calls_it(name):
    calls = []

    def recorded(args, **kwargs):
        calls.append(([None if a is None else a.shape for a in args], kwargs))
        return promote_dtype(args, **kwargs)

    x = sample()
    variants = [{}, {"use_scale": False}]
    for kwargs in variants:
        reference, layer = pair(name, promote_dtype=recorded, **kwargs)
        call(reference, x)
        from_flax = calls[:]
        calls.clear()
        call(layer, x)
        assert calls == from_flax
        calls.clear()


@pytest.mark.parametrize("dtype", [None, jnp.float32])
@pytest.mark.parametrize("target", ["nothing", "float16", "float32"])
@names
def test_promote_dtype_decides_the_dtype(name, target, dtype):
    """Of the result. The values are not its business: it would round them too early."""

    def promote(args, **_):
        if target == "nothing":
            return args
        return tuple(None if a is None else a.astype(target) for a in args)

    def run(maker, x):
        kwargs = {"promote_dtype": promote, "dtype": dtype}
        return call(maker(name, param_dtype=jnp.bfloat16, **kwargs), x)

    for x_dtype in ("float16", "bfloat16"):
        x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
        y, expected = (
            jax.eval_shape(functools.partial(run, maker), x) for maker in (ours, theirs)
        )
        assert y == expected


def test_running_statistics_after_each_step():
    """Against Flax and the definition, after 1, 2 and 5 steps."""
    layer, reference = (
        ours("BatchNorm", momentum=0.8),
        theirs("BatchNorm", momentum=0.8),
    )
    run = nnx.jit(call)
    mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    axes = (0, 1, 2)
    for step in range(5):
        x = sample(seed=step)
        exact = np.asarray(x, np.float64)
        mean = 0.8 * mean + 0.2 * exact.mean(axes)
        var = 0.8 * var + 0.2 * exact.var(axes)
        assert_close(run(layer, x), run(reference, x))
        assert_close(plain(nnx.state(layer)), plain(nnx.state(reference)))
        assert_close((layer.mean[...], layer.var[...]), (mean, var))


# Inside models.


class Network(nnx.Module):
    """A small residual network, written for the namespace `lib`."""

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
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        optimizer.update(model, nnx.grad(loss)(model))

    models = [Network(lib, nnx.Rngs(0)) for lib in (nnx, jaxnorm.nnx)]
    reference, model = models
    assert described(model) == described(reference)
    assert_identical(plain(nnx.state(model)), plain(nnx.state(reference)))
    for m in models:
        optimizer = nnx.Optimizer(m, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
        for seed in range(3):
            step(m, optimizer, sample(seed=seed))
    # Flax's fast variance is in there, and three steps amplify its roundoff.
    assert_close(plain(nnx.state(model)), plain(nnx.state(reference)), 1e-3)
    x = sample(seed=9)
    for m in models:
        m.eval()
    # A checkpoint of either model goes into the other.
    for source, target in (models, models[::-1]):
        nnx.update(target, nnx.state(source))
        assert_close(forward(model, x), forward(reference, x), 1e-4)


def test_abstract_construction_and_merging():
    """`nnx.eval_shape`, then `nnx.merge` with restored values: how one loads models."""
    x = sample()
    trained = randomize(Network(jaxnorm.nnx, nnx.Rngs(0)))
    abstract = nnx.eval_shape(lambda: Network(jaxnorm.nnx, nnx.Rngs(0)))
    graphdef, _ = nnx.split(abstract)
    restored = nnx.merge(graphdef, nnx.state(trained))
    assert_identical(forward(restored, x), forward(trained, x))
    clone = nnx.clone(restored)
    clone.bn(x)
    assert np.abs(clone.bn.mean[...] - restored.bn.mean[...]).max() > 1e-3


# Under Flax's transforms.


class Layer(nnx.Module):
    def __init__(self, lib, rngs):
        draw = nnx.initializers.normal(1.0)
        self.bn = lib.BatchNorm(6, momentum=0.9, scale_init=draw, rngs=rngs)

    def __call__(self, x):
        return self.bn(x) + 1


def stacked(lib, count):
    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def create(rngs):
        return Layer(lib, rngs)

    return create(nnx.Rngs(0))


def apply(layer, x):
    return layer(x)


def under_remat(lib, x):
    layer = Layer(lib, nnx.Rngs(0))
    remat = nnx.remat(apply)
    gradient = nnx.jit(nnx.grad(lambda x, layer: jnp.sum(remat(layer, x) ** 3)))
    return gradient(x, layer), layer


def under_scan(lib, x):
    layers = stacked(lib, 3)
    scan = nnx.scan(
        lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return nnx.jit(scan)(x, layers), layers


def under_scan_over_time(lib, x):
    layer = Layer(lib, nnx.Rngs(0))

    def step(carry, x):
        total, layer = carry
        y = layer(x)
        return (total + y.sum(), layer), y

    scan = nnx.scan(step)
    return nnx.jit(lambda layer, x: scan((0.0, layer), x)[1])(layer, x), layer


def under_vmap(lib, x):
    layers = stacked(lib, 4)
    return nnx.jit(nnx.vmap(apply))(layers, x), layers


def under_named_vmap(lib, x):
    bn = lib.BatchNorm(6, axis_name="example", rngs=nnx.Rngs(0))
    run = nnx.vmap(apply, in_axes=(None, 0), axis_name="example")
    return nnx.jit(run)(bn, x), bn


@pytest.mark.parametrize(
    "run",
    [
        under_remat,
        under_scan,
        under_scan_over_time,
        under_vmap,
        under_named_vmap,
    ],
)
def test_transforms_are_flax(run):
    x = sample()
    y, layer = run(jaxnorm.nnx, x)
    expected, reference = run(nnx, x)
    assert_close(y, expected, 1e-4)
    # One update also under remat, which runs the forward pass twice.
    assert_close(plain(nnx.state(layer)), plain(nnx.state(reference)))


def test_remat_updates_once():
    layer = ours("BatchNorm", momentum=0.5)
    remat = nnx.remat(apply)
    x = sample()
    nnx.jit(nnx.grad(lambda layer, x: jnp.sum(remat(layer, x) ** 3)))(layer, x)
    assert_close(layer.mean[...], 0.5 * np.mean(x, (0, 1, 2)))


@pytest.mark.parametrize("name", ["BatchNorm", "GroupNorm"])
def test_axis_name_is_flax(name):
    """Shards of equal size, unmasked: the case in which Flax is right."""
    x = sample((4, 2, 3, 6))

    def run(layer):
        graphdef, state = nnx.split(layer)

        def one(state, x):
            layer = nnx.merge(graphdef, state)
            return call(layer, x), plain(nnx.state(layer))

        return jax.jit(jax.vmap(one, (None, 0), axis_name="d"))(state, x)

    reference, layer = pair(name, axis_name="d")
    assert_close(run(layer), run(reference))


def test_axis_index_groups_are_flax():
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    x = sample((8, 6))

    def run(layer):
        graphdef, state = nnx.split(layer)
        mapped = jax.shard_map(
            lambda state, x: call(nnx.merge(graphdef, state), x),
            mesh=mesh,
            in_specs=(P(), P("d")),
            out_specs=P("d"),
            check_vma=False,
        )
        return jax.jit(mapped)(state, x)

    groups = [[0, 1], [2, 3]]
    reference, layer = pair("BatchNorm", axis_name="d", axis_index_groups=groups)
    y = run(layer)
    assert_close(y, run(reference))
    # And the groups do matter.
    layer.axis_name = layer.axis_index_groups = None
    assert np.abs(y - forward(layer, x)[0]).max() > 0.1


# jaxnorm's own: the generic module, traced modes, other running averages.


@names
def test_the_generic_module_is_the_named_one(name):
    x, mask = sample(), sample_mask()
    named = randomize(ours(name, **({} if name == "GroupNorm" else SETTINGS[name])))
    layer = generic(name)
    nnx.update(layer, nnx.state(named))
    found = forward(layer, x, mask=mask)
    assert_close(found, forward(named, x, mask=mask), 1e-6)
    if name != "BatchNorm":
        # A model that is given its norm passes a mode that this one does not have.
        y = call(layer, x)
        assert_identical(call(layer, x, use_running_average=True), y)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
def test_arguments_of_the_generic_module(name):
    x = sample()
    kwargs = {
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
        "scale_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.normal(1.0),
    }
    for drop in ({}, {"use_scale": False}, {"use_bias": False}):
        named, layer = ours(name, **kwargs, **drop), generic(name, **kwargs, **drop)
        assert described(layer) == described(named)
        y, expected = call(layer, x), call(named, x)
        assert y.dtype == expected.dtype == jnp.bfloat16
        assert_close(y, expected, 2**-7)


def test_parameters_along_several_axes():
    """Which Flax has in Linen only."""
    norm = jaxnorm.LayerNorm(reduction_axes=(1, 3), feature_axes=(1, 3))
    layer = jaxnorm.nnx.Norm(norm, (3, FEATURES), rngs=nnx.Rngs(0))
    randomize(layer)
    kwargs = {"reduction_axes": (1, 3), "feature_axes": (1, 3)}
    x = sample()
    expected, _ = linen("LayerNorm", layer, **kwargs)(x)
    assert_close(forward(layer, x)[0], expected)


@pytest.mark.parametrize("maker", [ours, generic])
def test_traced_use_running_average(maker):
    """One trace serves training and evaluation."""
    x = sample()
    traces = []

    @nnx.jit
    def run(layer, flag):
        traces.append(flag)
        return call(layer, x, use_running_average=flag)

    for flag in (True, False):
        traced, static = randomize(maker("BatchNorm")), randomize(maker("BatchNorm"))
        before = plain(nnx.state(traced))
        y = run(traced, jnp.asarray(flag))
        assert_close(y, call(static, x, use_running_average=flag), 1e-6)
        assert_close(plain(nnx.state(traced)), plain(nnx.state(static)), 1e-6)
        if flag:
            assert_identical(plain(nnx.state(traced)), before)
    assert len(traces) == 1


def test_unbiased_running_variance():
    """n / (n - 1) in the running variance alone, n counting valid elements."""
    x, mask = sample((5, 6)), jnp.arange(5)[:, None] < 4
    for kwargs, count in (({}, 5), ({"mask": mask}, 4)):
        layer = ours("BatchNorm", momentum=0.9, unbiased=True)
        biased = ours("BatchNorm", momentum=0.9)
        assert described(layer) == described(biased)
        assert_close(call(layer, x, **kwargs), call(biased, x, **kwargs), 1e-6)
        var = 0.9 + 0.1 * np.var(np.asarray(x, np.float64)[:count], 0, ddof=1)
        assert_close(layer.var[...], var)


def test_cumulative_average():
    """momentum=None: each batch counts the same, and those without values not."""
    layer = ours("BatchNorm", momentum=None)
    assert isinstance(layer.count, nnx.BatchStat)
    assert set(plain(nnx.state(layer, nnx.BatchStat))) == {
        ("mean",),
        ("var",),
        ("count",),
    }
    description, batches = described(layer), []
    for step in range(4):
        x = sample((5, 6), seed=step)
        batches.append(np.asarray(x, np.float64))
        call(layer, x)
        assert described(layer) == description
        assert_close(layer.mean[...], np.mean([b.mean(0) for b in batches], 0))
        assert_close(layer.var[...], np.mean([b.var(0) for b in batches], 0))
        assert np.all(np.asarray(layer.count[...]) == step + 1)
        state = plain(nnx.state(layer))
        call(layer, x, mask=jnp.zeros((5, 1), bool))
        assert_identical(plain(nnx.state(layer)), state)
    reference = theirs("BatchNorm", use_running_average=True)
    reference.mean[...], reference.var[...] = layer.mean[...], layer.var[...]
    layer.eval()
    x = sample((5, 6))
    assert_close(call(layer, x), call(reference, x))


# Where Flax is wrong.


def linen(name, layer, **kwargs):
    """Flax Linen on the variables of an NNX layer: a function of x."""
    kwargs = {**NEEDED.get(name, {}), "use_fast_variance": False, **kwargs}
    if name == "BatchNorm":
        kwargs.setdefault("use_running_average", False)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    variables = {"params": params, "batch_stats": stats}
    module = getattr(nn, name)(**kwargs)

    return jax.jit(functools.partial(module.apply, variables, mutable=["batch_stats"]))


@pytest.mark.parametrize("axes", [(1, 3), (-1,), (0, 1, 2, 3)])
def test_group_norm_over_chosen_axes_is_linen(axes):
    """Flax NNX repeats the statistics along the wrong axis."""
    x = sample()
    layer = randomize(ours("GroupNorm", reduction_axes=axes))
    expected, _ = linen("GroupNorm", layer, reduction_axes=axes)(x)
    assert_close(forward(layer, x)[0], expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in NAMES] + [("BatchNorm", "float16")],
)
def test_nothing_is_cast_down_before_the_statistics(name, dtype):
    """Flax NNX casts x to dtype first: at 100 +- 0.1 there is nothing left in it."""
    x = 100 + 0.05 * sample()
    layer = randomize(ours(name, dtype=dtype))
    run = linen(name, layer, dtype=dtype)
    y, state = forward(layer, x)
    expected, updated = run(x)
    assert y.dtype == expected.dtype == dtype
    assert_close(y, expected, 2 * float(jnp.finfo(dtype).eps))
    for key, value in updated.get("batch_stats", {}).items():
        assert_close(state[key,], value)


def test_running_statistics_are_not_cast_down():
    x = 100 + 0.05 * sample()
    layer = ours("BatchNorm", dtype=jnp.bfloat16, momentum=0.0)
    layer.mean[...], layer.var[...] = x.mean((0, 1, 2)), x.var((0, 1, 2))
    layer.eval()
    kwargs = {"dtype": jnp.bfloat16, "use_running_average": True}
    expected, _ = linen("BatchNorm", layer, **kwargs)(x)
    assert_close(forward(layer, x)[0], expected, 2**-6)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@names
def test_masks_of_zeros_and_ones(name, dtype):
    x, mask = sample(), sample_mask()
    expected = call(ours(name), x, mask=mask)
    assert_identical(call(ours(name), x, mask=mask.astype(dtype)), expected)


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 3, 4, 1)], ids=str)
@names
def test_masks_broadcast(name, shape):
    """Every mask that NumPy broadcasts to x, also for group norm."""
    x = sample()
    mask = jnp.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 1
    found = call(randomize(ours(name)), x, mask=mask)
    full = jnp.broadcast_to(mask, SHAPE)
    assert_close(found, call(randomize(ours(name)), x, mask=full), 1e-6)


@names
def test_outputs_are_zero_where_masked(name):
    x, mask = sample(), sample_mask()
    for kwargs in ({}, {"use_running_average": True}):
        if kwargs and name != "BatchNorm":
            continue
        y = call(randomize(ours(name, **kwargs)), x, mask=mask)
        assert np.all(np.asarray(y)[~np.asarray(mask)] == 0)
        assert np.all(np.asarray(y)[np.asarray(mask)] != 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@names
def test_what_is_masked_harms_nothing(name, poison):
    """Values, statistics and gradients are those of a clean batch, bit for bit."""
    x, mask = sample(), sample_mask()
    layer = randomize(ours(name))
    expected = outcome(layer, x, mask=mask)
    found = outcome(layer, jnp.where(mask, x, poison), mask=mask)
    assert_identical(found, expected)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "one nan"])
@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_a_bad_batch_leaves_the_statistics(which, bad, momentum):
    if which == "BatchNorm":
        layer = ours("BatchNorm", momentum=momentum)
    else:
        norm = jaxnorm.BatchNorm(momentum=momentum)
        layer = jaxnorm.nnx.Norm(norm, FEATURES, rngs=nnx.Rngs(0))
        layer.train()
    randomize(layer)
    x, mask = sample((5, 6)), jnp.ones((5, 6), bool)
    if bad == "masked":
        mask = jnp.zeros_like(mask)
    elif bad == "one nan":
        x = x.at[2, 3].set(jnp.nan)
    else:
        x = jnp.full_like(x, float(bad))
    before = plain(nnx.state(layer))
    y = call(layer, x, mask=mask)
    assert_identical(plain(nnx.state(layer)), before)
    if bad == "masked":
        assert np.all(np.asarray(y) == 0)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "RMSNorm"])
def test_variance_far_from_zero(name):
    """By default, too, where E[x^2] - E[x]^2 would give 0 or 8 instead of 4."""
    x = sample() + 1e4
    # The same float32 numbers without the offset: a reference without its roundoff.
    centred = jnp.asarray(np.asarray(x, np.float64) - 1e4, jnp.float32)
    assert np.array_equal(np.asarray(centred, np.float64) + 1e4, x)
    layer = ours(name)
    expected, updated = linen(name, layer)(centred)
    y, state = forward(layer, x)
    # The mean has float32's resolution at the offset: 1e-3, of a deviation of 2.
    assert_close(y, expected, 2e-3)
    if name == "BatchNorm":
        assert_close(state["var",], updated["batch_stats"]["var"], 1e-6)


@names
def test_an_unbound_axis_name_is_named(name):
    x = sample()
    norm = getattr(jaxnorm, name)(**SETTINGS[name], axis_name="absent")
    kwargs = {"use_running_average": False, "rngs": nnx.Rngs(0)}
    for layer in (
        ours(name, axis_name="absent"),
        jaxnorm.nnx.Norm(norm, FEATURES, **kwargs),
    ):
        with pytest.raises(ValueError, match="absent"):
            call(layer, x)
        with pytest.raises(ValueError, match="absent"):
            nnx.jit(functools.partial(call, x=x))(layer)
    # At evaluation no axis is needed.
    reference, layer = pair("BatchNorm", axis_name="absent", use_running_average=True)
    assert_close(call(layer, x), call(reference, x))


def test_masked_statistics_across_devices():
    """Shards with 3, 1, 0 and 2 valid rows count by rows, not by shards."""
    x = sample((4, 3, 6))
    mask = jnp.arange(3)[None, :, None] < jnp.asarray([3, 1, 0, 2])[:, None, None]
    layer = randomize(ours("BatchNorm", axis_name="d", momentum=0.9))
    rows = mask.reshape(12)
    run = linen("BatchNorm", layer, momentum=0.9)
    expected, updated = run(x.reshape(12, 6)[rows])
    graphdef, state = nnx.split(layer)

    def one(state, x, mask):
        layer = nnx.merge(graphdef, state)
        return call(layer, x, mask=mask), layer.mean[...], layer.var[...]

    run = jax.vmap(one, (None, 0, 0), axis_name="d")
    y, mean, var = jax.jit(run)(state, x, mask)
    assert_close(y.reshape(12, 6)[rows], expected)
    for shard in range(4):
        own = {"mean": mean[shard], "var": var[shard]}
        assert_close(own, updated["batch_stats"])


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 1, 6), (6,)], ids=str)
def test_one_value_per_channel(shape):
    """Flax-named: Flax's output, a warning, the state as it was. Generic: an error."""
    x = sample(shape)
    reference, layer = pair("BatchNorm")
    before = plain(nnx.state(layer))
    with pytest.warns(UserWarning) as record:
        y = nnx.jit(call)(layer, x)
    assert len(record) == 1
    assert_close(y, forward(reference, x)[0])
    assert_identical(plain(nnx.state(layer)), before)
    with pytest.raises(ValueError):
        call(generic("BatchNorm"), x)
    # Evaluation on one example is what evaluation is for: nothing is said.
    reference, layer = pair("BatchNorm", use_running_average=True)
    assert_close(forward(layer, x), forward(reference, x))


def test_one_value_per_channel_is_said_once():
    """As often as Python shows a warning from one place, which is once."""
    layer = ours("BatchNorm")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(3):
            call(layer, sample((1, 6)))
    assert [w.category for w in record] == [UserWarning]
