"""jaxnorm.linen against flax.linen: a user changes one import, and nothing else.

Flax is the reference wherever it is right. It is asked for its two-pass variance, so
that agreement means agreement with the definition; where it is wrong, or stricter than
its own documentation, the tests at the end of this file say what holds instead.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm
import jaxnorm.linen

SHAPE = (4, 3, 4, 6)
NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")

# What a class needs before it can be called on an array of SHAPE.
NEEDED = {
    "BatchNorm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
}

# One settings value per class, for the generic module.
SETTINGS = {
    "BatchNorm": jaxnorm.BatchNorm(momentum=0.9),
    "LayerNorm": jaxnorm.LayerNorm(),
    "RMSNorm": jaxnorm.RMSNorm(),
    "GroupNorm": jaxnorm.GroupNorm(num_groups=2),
    "InstanceNorm": jaxnorm.InstanceNorm(),
}

# Constructor arguments that change the result, with at least one row for each of them.
CASES = [
    ("BatchNorm", {"momentum": 0.9}),
    ("BatchNorm", {"axis": 1, "epsilon": 1e-2}),
    ("BatchNorm", {"axis": (3, 1), "momentum": 0.5, "use_bias": False}),
    ("BatchNorm", {"axis": (1, 3), "use_running_average": True}),
    ("BatchNorm", {"use_scale": False, "use_bias": False, "use_fast_variance": False}),
    ("LayerNorm", {}),
    ("LayerNorm", {"reduction_axes": (1, 2, 3), "epsilon": 1e-2}),
    ("LayerNorm", {"reduction_axes": (1, 2), "use_fast_variance": False}),
    ("LayerNorm", {"reduction_axes": (-1, 1), "feature_axes": (-1, 1)}),
    ("LayerNorm", {"reduction_axes": 3, "feature_axes": (2, 3), "use_scale": False}),
    ("RMSNorm", {}),
    ("RMSNorm", {"reduction_axes": (1, 2, 3), "epsilon": 1e-2}),
    ("RMSNorm", {"reduction_axes": 3, "feature_axes": (1, 3)}),
    ("RMSNorm", {"use_scale": False, "force_float32_reductions": False}),
    ("GroupNorm", {"num_groups": 3, "epsilon": 1e-2}),
    ("GroupNorm", {"num_groups": None, "group_size": 3, "use_bias": False}),
    ("GroupNorm", {"reduction_axes": (1, 3)}),
    ("GroupNorm", {"reduction_axes": (-1,)}),
    ("GroupNorm", {"reduction_axes": (0, 1, 2, 3), "use_scale": False}),
    ("InstanceNorm", {}),
    ("InstanceNorm", {"feature_axes": 1, "epsilon": 1e-2, "use_scale": False}),
    ("InstanceNorm", {"feature_axes": (3, 1), "use_bias": False}),
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


def theirs(name, **kwargs):
    """Flax's module, with the variance that is right."""
    kwargs = {**NEEDED.get(name, {}), "use_fast_variance": False, **kwargs}
    return getattr(nn, name)(**kwargs)


def ours(name, **kwargs):
    return getattr(jaxnorm.linen, name)(**{**NEEDED.get(name, {}), **kwargs})


def generic(name, **kwargs):
    return jaxnorm.linen.Norm(SETTINGS[name], use_running_average=False, **kwargs)


def promotion(module):
    """Flax may promote ranks, jaxnorm must not need to."""
    home = type(module).__module__
    return jax.numpy_rank_promotion("allow" if home.startswith("flax.") else "raise")


def init(module, x, seed=0, **call):
    """Initial variables, compiled: this leaves out the forward pass."""
    with promotion(module):
        return jax.jit(functools.partial(module.init, **call))(jax.random.key(seed), x)


def eager_init(module, x, seed=0):
    """As `init`, which would compile the random numbers anew for each module."""
    with promotion(module):
        return module.init(jax.random.key(seed), x)


def variables_of(module, x, **call):
    """Variables of the right names, shapes and dtypes, off their initial values."""
    with promotion(module):
        tree = jax.eval_shape(
            functools.partial(module.init, **call), jax.random.key(0), x
        )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), tree
    )


def apply(module, variables, x, **call):
    """Output and updated collections."""
    with promotion(module):
        return module.apply(variables, x, mutable=["batch_stats"], **call)


@functools.partial(jax.jit, static_argnames="module")
def forward(module, variables, x, **call):
    """`apply`, compiled; tests that share a module share the compilation."""
    return apply(module, variables, x, **call)


@functools.partial(jax.jit, static_argnames="module")
def outcome(module, variables, x, **call):
    """Output, updated collections, and gradients by the parameters and the input."""
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    if "mask" in call:
        # What stands at masked elements is padding: a loss does not read it.
        weights = jnp.where(call["mask"], weights, 0)

    def loss(params, x):
        y, updated = apply(module, {**variables, "params": params}, x, **call)
        return jnp.sum(weights * y), (y, updated)

    by = jax.grad(loss, (0, 1), has_aux=True)
    gradients, (y, updated) = by(variables.get("params", {}), x)
    return y, updated, gradients


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


def described(tree):
    """The tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda a: (tuple(a.shape), str(a.dtype)), tree)


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
    flax_class, our_class = getattr(nn, name), getattr(jaxnorm.linen, name)
    assert_extends(flax_class, our_class)
    assert_extends(flax_class.__call__, our_class.__call__)
    # Fields are what `clone`, `copy` and pretty printers see.
    flax_fields = [f.name for f in dataclasses.fields(flax_class)]
    our_fields = [f.name for f in dataclasses.fields(our_class)]
    assert [f for f in our_fields if f in flax_fields] == flax_fields


def test_own_arguments_are_in_the_signature():
    """Where `help` and editors find them."""
    parameters = inspect.signature(jaxnorm.linen.BatchNorm).parameters
    assert parameters["unbiased"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["unbiased"].default is False


def test_signature_of_the_generic_module():
    parameters = inspect.signature(jaxnorm.linen.Norm).parameters
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
    found = {k: p.default for k, p in list(parameters.items())[: len(expected)]}
    assert list(found) == list(expected)
    assert found == expected


def test_arguments_in_flax_positions():
    positions = (None, 1, 0.5, 1e-2, jnp.bfloat16, jnp.float16, False)

    def run(module, x):
        y, variables = module.init_with_output(jax.random.key(0), x, False)
        return y, variables, module.momentum, module.epsilon

    x = jnp.zeros(SHAPE)
    found = jax.eval_shape(
        functools.partial(run, jaxnorm.linen.BatchNorm(*positions)), x
    )
    assert found == jax.eval_shape(functools.partial(run, nn.BatchNorm(*positions)), x)
    # The torch habit: the first position of Flax's layer norm is epsilon.
    assert jaxnorm.linen.LayerNorm(12).epsilon == 12


def test_own_arguments_survive_cloning():
    module = jaxnorm.linen.BatchNorm(use_running_average=False, unbiased=True)
    clone = module.clone(momentum=0.5)
    assert (clone.unbiased, clone.momentum) == (True, 0.5)
    assert clone == jaxnorm.linen.BatchNorm(False, momentum=0.5, unbiased=True)
    assert hash(clone) == hash(clone.clone())


@pytest.mark.parametrize("call", [None, False, True])
@pytest.mark.parametrize("constructor", [None, False, True])
@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_use_running_average_once(which, constructor, call):
    x = sample()
    reference = nn.BatchNorm(constructor, momentum=0.9, use_fast_variance=False)
    if which == "BatchNorm":
        module = jaxnorm.linen.BatchNorm(constructor, momentum=0.9)
    else:
        module = jaxnorm.linen.Norm(SETTINGS["BatchNorm"], constructor)
    variables = variables_of(nn.BatchNorm(False), x)
    try:
        expected = apply(reference, variables, x, use_running_average=call)
    except ValueError as error:
        assert (constructor is None) == (call is None)
        with pytest.raises(type(error), match="use_running_average"):
            apply(module, variables, x, use_running_average=call)
        with pytest.raises(type(error), match="use_running_average"):
            module.init(jax.random.key(0), x, use_running_average=call)
    else:
        assert_close(apply(module, variables, x, use_running_average=call), expected)


def test_training_needs_a_mutable_collection():
    x = sample()
    module, reference = ours("BatchNorm"), theirs("BatchNorm")
    variables = variables_of(reference, x)
    with pytest.raises(Exception) as expected:
        reference.apply(variables, x)
    with pytest.raises(expected.type, match="batch_stats"):
        module.apply(variables, x)
    # Evaluation does not.
    module.clone(use_running_average=True).apply(variables, x)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("GroupNorm", {"num_groups": 4}),
        ("GroupNorm", {"num_groups": None, "group_size": 4}),
        ("GroupNorm", {"num_groups": None}),
        ("GroupNorm", {"group_size": 3}),
        ("GroupNorm", {"num_groups": 0}),
        ("GroupNorm", {"reduction_axes": (1, 2)}),
        ("InstanceNorm", {"feature_axes": 0}),
        ("InstanceNorm", {"feature_axes": (0, 3)}),
    ],
)
def test_what_flax_refuses(name, kwargs):
    x = sample()
    with pytest.raises(ValueError):
        init(theirs(name, **kwargs), x)
    with pytest.raises(ValueError):
        init(ours(name, **kwargs), x)


# The same variables.


@cases
def test_variables_are_flax_variables(name, kwargs):
    x = sample()
    expected = init(theirs(name, **kwargs), x)
    assert_identical(init(ours(name, **kwargs), x), expected)


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
@names
def test_random_initializers_draw_what_flax_draws(name, param_dtype):
    x = sample()
    kwargs = {"param_dtype": param_dtype, "scale_init": nn.initializers.normal(1.0)}
    if name != "RMSNorm":
        kwargs["bias_init"] = nn.initializers.uniform(1.0)
    expected = eager_init(theirs(name, **kwargs), x, seed=3)
    assert_identical(eager_init(ours(name, **kwargs), x, seed=3), expected)
    assert_identical(eager_init(generic(name, **kwargs), x, seed=3), expected)


def test_initializers_are_called_as_flax_calls_them():
    calls = []

    def recorded(key, shape, dtype):
        calls.append((jax.random.key_data(key).shape, tuple(shape), dtype))
        return jnp.full(shape, 3, dtype)

    kwargs = {"scale_init": recorded, "bias_init": recorded, "axis": (1, 3)}
    kwargs["param_dtype"] = jnp.bfloat16
    x = sample()
    expected = init(theirs("BatchNorm", **kwargs), x)
    from_flax, calls = calls, []
    found = init(ours("BatchNorm", **kwargs), x)
    assert calls == from_flax
    assert_identical(found, expected)


@names
def test_partitioned_parameters(name):
    x = sample()
    box = functools.partial(nn.with_partitioning, names=("model",))
    logical = functools.partial(nn.with_logical_partitioning, names=("embed",))
    kwargs = {"scale_init": box(nn.initializers.normal(1.0))}
    if name != "RMSNorm":
        kwargs["bias_init"] = logical(nn.initializers.normal(1.0))
    expected = eager_init(theirs(name, **kwargs), x)
    for module in (ours(name, **kwargs), generic(name, **kwargs)):
        variables = eager_init(module, x)
        # The structure of the tree holds the boxes and their names.
        assert_identical(variables, expected)
        assert isinstance(variables["params"]["scale"], nn.Partitioned)
        assert nn.get_partition_spec(variables) == nn.get_partition_spec(expected)
        y, _ = apply(module, variables, x)
        unboxed, _ = apply(module, nn.unbox(variables), x)
        assert_identical(y, unboxed)
    assert_close(y, apply(theirs(name, **kwargs), expected, x)[0], 1e-4)


def test_partitioned_parameters_on_a_mesh():
    """Parameters come out on their devices, and normalize as ever."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    ones = nn.with_partitioning(nn.initializers.ones, ("model",), mesh=mesh)
    module = jaxnorm.linen.LayerNorm(scale_init=ones)
    x = sample()
    variables = init(module, x)
    assert nn.unbox(variables)["params"]["scale"].sharding.spec == P("model")
    expected = apply(ours("LayerNorm"), init(ours("LayerNorm"), x), x)
    assert_close(apply(module, variables, x), expected)


# The same numbers.


@cases
def test_values_are_flax(name, kwargs):
    x = sample()
    reference = theirs(name, **kwargs)
    variables = variables_of(reference, x)
    found = forward(ours(name, **kwargs), variables, x)
    assert_close(found, forward(reference, variables, x))


@names
def test_gradients_are_flax(name):
    x = sample()
    variables = variables_of(theirs(name), x)
    assert_close(outcome(ours(name), variables, x), outcome(theirs(name), variables, x))


def test_axes_may_be_lists():
    x = sample()
    reference = theirs("LayerNorm", reduction_axes=(1, 2))
    module = ours("LayerNorm", reduction_axes=[1, 2], feature_axes=[3])
    variables = variables_of(reference, x)
    found = jax.jit(functools.partial(apply, module))(variables, x)
    assert_close(found, forward(reference, variables, x))


@names
def test_masked_values_and_gradients_are_flax(name):
    x, mask = sample(), sample_mask()
    variables = variables_of(theirs(name), x)
    y, *found = outcome(ours(name), variables, x, mask=mask)
    y_flax, *expected = outcome(theirs(name), variables, x, mask=mask)
    assert_close(y, jnp.where(mask, y_flax, 0))
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("BatchNorm", {"axis": (3, 1)}),
        ("LayerNorm", {"reduction_axes": (1, 2)}),
        ("GroupNorm", {"reduction_axes": (1, 3)}),
        ("InstanceNorm", {"feature_axes": (3, 1)}),
    ],
)
def test_masked_values_along_other_axes_are_flax(name, kwargs):
    x, mask = sample(), sample_mask()
    reference = theirs(name, **kwargs)
    variables = variables_of(reference, x)
    y, found = forward(ours(name, **kwargs), variables, x, mask=mask)
    y_flax, expected = forward(reference, variables, x, mask=mask)
    assert_close(y, jnp.where(mask, y_flax, 0))
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BatchNorm", (5, 6)),
        ("LayerNorm", (6,)),
        ("RMSNorm", (6,)),
        ("GroupNorm", (5, 6)),
        ("InstanceNorm", (5, 4, 6)),
    ],
)
def test_inputs_of_other_ranks_are_flax(name, shape):
    x = sample(shape)
    variables = variables_of(theirs(name), x)
    found = forward(ours(name), variables, x)
    assert_close(found, forward(theirs(name), variables, x))


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "int32"])
@names
def test_dtypes_are_flax(name, x_dtype):
    """Shapes and dtypes only: nothing is computed."""
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    without = {"use_scale": False}
    if name != "RMSNorm":
        without["use_bias"] = False

    def run(module):
        def once(x):
            y, variables = module.init_with_output(jax.random.key(0), x)
            return y, variables.get("params", {}), variables.get("batch_stats", {})

        with promotion(module):
            return jax.eval_shape(once, x)

    for dtype in (None, jnp.float32, jnp.bfloat16):
        for param_dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            kwargs = {"dtype": dtype, "param_dtype": param_dtype}
            assert run(ours(name, **kwargs)) == run(theirs(name, **kwargs)), kwargs
        kwargs = {"dtype": dtype, **without}
        assert run(ours(name, **kwargs)) == run(theirs(name, **kwargs)), kwargs


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@names
def test_no_implicit_dtype_promotion(name, dtype):
    """Nor is any needed under JAX's strict setting, which Flax does not bear."""
    x = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    for module in (ours(name, dtype=dtype), generic(name, dtype=dtype)):
        expected = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
        with jax.numpy_dtype_promotion("strict"):
            y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
            jax.eval_shape(functools.partial(apply, module), variables, x)
        assert y == expected[0]


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("force", [True, False])
def test_running_statistics_are_float32(x_dtype, param_dtype, force):
    """Unlike Flax's, also with force_float32_reductions=False; and they stay so."""
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    kwargs = {"param_dtype": param_dtype, "dtype": "bfloat16"}
    module = ours("BatchNorm", force_float32_reductions=force, **kwargs)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    stats = described(variables["batch_stats"])
    assert stats == {"mean": ((6,), "float32"), "var": ((6,), "float32")}
    y, updated = jax.eval_shape(functools.partial(apply, module), variables, x)
    assert y.dtype == jnp.bfloat16
    assert described(updated["batch_stats"]) == stats


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in NAMES] + [("BatchNorm", "float16")],
)
def test_half_precision_values_are_flax(name, dtype):
    """Half-precision inputs and outputs; what lies between is not."""
    x = (3 * sample()).astype(dtype)
    reference = theirs(name, dtype=dtype)
    variables = variables_of(reference, x)
    y, updated = forward(ours(name, dtype=dtype), variables, x)
    y_flax, updated_flax = forward(reference, variables, x)
    assert y.dtype == dtype
    # One rounding of the same float32 number, which may fall to either side.
    assert_close(y, y_flax, float(jnp.finfo(dtype).eps))
    assert_close(updated, updated_flax)


def test_integer_inputs_are_flax():
    x = (7 * jnp.arange(np.prod(SHAPE)) % 19 - 9).reshape(SHAPE)
    variables = variables_of(theirs("BatchNorm"), x)
    y, updated = forward(ours("BatchNorm"), variables, x)
    expected = forward(theirs("BatchNorm"), variables, x)
    assert y.dtype == expected[0].dtype
    assert_close((y, updated), expected)


@pytest.mark.parametrize("axis", [-1, 1])
def test_running_statistics_after_each_step(axis):
    """Against Flax and the definition, after 1, 2 and 5 steps."""
    module = ours("BatchNorm", axis=axis, momentum=0.8)
    reference = theirs("BatchNorm", axis=axis, momentum=0.8)
    variables = flax_variables = init(reference, sample())
    features = SHAPE[axis]
    mean, var = np.zeros(features), np.ones(features)
    others = tuple(a for a in range(4) if a != axis % 4)
    for step in range(5):
        x = sample(seed=step)
        exact = np.asarray(x, np.float64)
        mean = 0.8 * mean + 0.2 * exact.mean(others)
        var = 0.8 * var + 0.2 * exact.var(others)
        variables = {**variables, **forward(module, variables, x)[1]}
        flax_variables = {**flax_variables, **forward(reference, flax_variables, x)[1]}
        assert_close(variables, flax_variables)
        assert_close(variables["batch_stats"], {"mean": mean, "var": var})


@names
def test_repeated_calls_compile_nothing(name, caplog):
    """Without jit, too: what the first call compiles serves the next, as in Flax."""
    x = sample()
    for module in (theirs(name), ours(name)):
        variables = variables_of(module, x)
        apply(module, variables, x)
        with jax.log_compiles():
            apply(module, variables, x)
        assert not [r.message for r in caplog.records if "ompil" in r.message]


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
    x, flax_model, model = sample(), network(nn), network(jaxnorm.linen)
    flax_variables = init(flax_model, x, train=True)
    variables = init(model, x, train=True)
    assert_identical(variables, flax_variables)
    assert "BatchNorm_0" in variables["params"]["first"]
    assert set(variables["params"]) > {"LayerNorm_0", "GroupNorm_0"}

    @functools.partial(jax.jit, static_argnames="model")
    def step(model, variables, x):
        def loss(params):
            y, updated = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean((y - 1) ** 2), updated

        by = jax.grad(loss, has_aux=True)
        gradients, updated = by(variables["params"])
        moved = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradients)
        return {**updated, "params": moved}

    for seed in range(3):
        flax_variables = step(flax_model, flax_variables, sample(seed=seed))
        variables = step(model, variables, sample(seed=seed))
    # Flax's fast variance is in there, and three steps amplify its roundoff.
    assert_close(variables, flax_variables, 1e-3)
    # A checkpoint of either model goes into the other.
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    flax_evaluate = jax.jit(functools.partial(flax_model.apply, train=False))
    for trained in (variables, flax_variables):
        assert_close(evaluate(trained, x), flax_evaluate(trained, x), 1e-4)


def test_automatic_names():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in NAMES:
                x = ours(name)(x)
                x = generic(name)(x)
            return x

    params = variables_of(Model(), sample())["params"]
    own = {f"{name}_0" for name in NAMES}
    assert set(params) == own | {f"Norm_{i}" for i in range(len(NAMES))}


def test_one_module_called_twice_updates_twice():
    """A siamese network: each call moves the running statistics once."""

    class Twice(nn.Module):
        def setup(self):
            self.norm = ours("BatchNorm", momentum=0.5)

        def __call__(self, a, b):
            return self.norm(a) + self.norm(b)

    a, b = sample(seed=1), sample(seed=2)
    variables = init(Twice(), a, b=b)
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
    ("transform", "run"),
    [
        ("scan over layers", forward),
        ("vmap over an ensemble", forward),
        ("vmap over examples", forward),
        # Remat runs the forward pass twice in a gradient, and must update once.
        ("remat", outcome),
        ("remat of the norm", outcome),
        ("jit", outcome),
    ],
)
def test_transforms_are_flax(transform, run):
    x = sample()
    reference, module = lifted(transform, nn), lifted(transform, jaxnorm.linen)
    variables = init(module, x)
    assert_identical(variables, init(reference, x))
    assert_close(run(module, variables, x), run(reference, variables, x), 1e-4)


def test_scan_over_time_carries_the_statistics():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            y = ours("BatchNorm", momentum=0.5)(x)
            return carry + y.sum(), y

    scanned = nn.scan(
        Cell,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )
    xs, start = sample(), jnp.zeros(())
    variables = jax.jit(Cell().init)(jax.random.key(0), start, xs[0])
    run = jax.jit(functools.partial(scanned().apply, mutable=["batch_stats"]))
    _, updated = run(variables, start, xs)
    mean = np.zeros(6)
    for x in xs:
        mean = 0.5 * mean + 0.5 * np.mean(x, (0, 1))
    assert_close(updated["batch_stats"]["BatchNorm_0"]["mean"], mean)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("module", [ours("BatchNorm"), generic("BatchNorm")])
def test_state_is_a_fixed_carry(module, x64):
    """`lax.scan` over steps: structure, shapes and dtypes do not drift."""
    with jax.enable_x64(x64):
        xs = jax.ShapeDtypeStruct((3, 5, 6), "float64" if x64 else "float32")

        def run(xs):
            variables = module.init(jax.random.key(0), xs[0])

            def step(stats, x):
                carried = {**variables, "batch_stats": stats}
                y, updated = module.apply(carried, x, mutable=["batch_stats"])
                return updated["batch_stats"], y

            # Raises TypeError where the carry changes.
            stats, ys = jax.lax.scan(step, variables["batch_stats"], xs)
            return variables["batch_stats"], stats, ys

        before, after, ys = jax.eval_shape(run, xs)
        assert ys.dtype == xs.dtype
        assert after == before
        assert before["mean"].dtype == jnp.float32


# Across devices.


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm"])
def test_axis_name_is_flax(name):
    """Shards of equal size, unmasked: the case in which Flax is right."""
    module, reference = ours(name, axis_name="d"), theirs(name, axis_name="d")
    x = sample((4, 2, 3, 6))
    variables = variables_of(theirs(name), x[0])

    def run(module):
        one = functools.partial(apply, module, variables)
        return jax.jit(jax.vmap(one, axis_name="d"))(x)

    assert_close(run(module), run(reference))


def test_axis_name_in_shard_map():
    """Replicated statistics leave shard_map as such, with its checks on."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    x = sample((8, 6))
    module = ours("BatchNorm", axis_name="d", momentum=0.9)
    variables = variables_of(module, x)
    run = jax.shard_map(
        functools.partial(apply, module),
        mesh=mesh,
        in_specs=(P(), P("d")),
        out_specs=(P("d"), P()),
    )
    expected = forward(theirs("BatchNorm", momentum=0.9), variables, x)
    assert_close(jax.jit(run)(variables, x), expected)


def test_axis_index_groups_are_flax():
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    x = sample((8, 6))
    variables = variables_of(theirs("BatchNorm"), x)

    def run(module):
        mapped = jax.shard_map(
            lambda x: apply(module, variables, x)[0],
            mesh=mesh,
            in_specs=P("d"),
            out_specs=P("d"),
            check_vma=False,
        )
        return jax.jit(mapped)(x)

    kwargs = {"axis_name": "d", "axis_index_groups": [[0, 1], [2, 3]]}
    y = run(ours("BatchNorm", **kwargs))
    assert_close(y, run(theirs("BatchNorm", **kwargs)))
    # And the groups do matter.
    assert np.abs(y - forward(ours("BatchNorm"), variables, x)[0]).max() > 0.1


def test_one_example_per_device_is_a_batch():
    """A vmapped example holds one value per channel; the named axis holds the rest."""
    x = sample((8, 6))
    module = ours("BatchNorm", axis_name="batch")
    variables = variables_of(theirs("BatchNorm"), x)
    one = functools.partial(apply, module, variables)
    y, updated = jax.jit(jax.vmap(one, axis_name="batch"))(x)
    expected, updated_flax = forward(theirs("BatchNorm"), variables, x)
    assert_close(y, expected)
    assert_close(jax.tree.map(lambda a: a[0], updated), updated_flax)


@names
def test_no_axis_is_needed_while_initializing(name):
    x = sample()
    expected = init(ours(name), x)
    assert_identical(init(ours(name, axis_name="absent"), x), expected)
    norm = dataclasses.replace(SETTINGS[name], axis_name="absent")
    module = jaxnorm.linen.Norm(norm, use_running_average=False)
    assert_identical(init(module, x), expected)


def test_no_axis_is_needed_at_evaluation():
    x = sample()
    variables = variables_of(ours("BatchNorm"), x)
    module = jaxnorm.linen.BatchNorm(True, axis_name="absent")
    expected = apply(nn.BatchNorm(True), variables, x)
    assert_close(apply(module, variables, x), expected)


# jaxnorm's own: the generic module, traced modes, other running averages.


@names
def test_the_generic_module_is_the_named_one(name):
    x, mask = sample(), sample_mask()
    kwargs = {"momentum": 0.9} if name == "BatchNorm" else {}
    named, module = ours(name, **kwargs), generic(name)
    assert_identical(init(module, x), init(named, x))
    variables = variables_of(named, x)
    found = apply(module, variables, x, mask=mask)
    assert_close(found, apply(named, variables, x, mask=mask), 1e-6)


@names
def test_the_generic_module_takes_any_mode(name):
    """A model that is given its norm passes a mode, whether the norm has one or not."""
    x = sample()
    module = jaxnorm.linen.Norm(SETTINGS[name])
    variables = variables_of(module, x, use_running_average=False)
    for flag in (False, True):
        apply(module, variables, x, use_running_average=flag)
    if name != "BatchNorm":
        without, _ = apply(module, variables, x)
        assert_identical(
            without, apply(module, variables, x, use_running_average=True)[0]
        )


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
def test_arguments_of_the_generic_module(name):
    x = sample()
    kwargs = {
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.bfloat16,
        "scale_init": nn.initializers.normal(1.0),
        "bias_init": nn.initializers.normal(1.0),
    }
    for drop in ({}, {"use_scale": False}, {"use_bias": False}):
        named, module = ours(name, **kwargs, **drop), generic(name, **kwargs, **drop)
        variables = eager_init(module, x)
        assert_identical(variables, eager_init(named, x))
        y, _ = apply(module, variables, x)
        expected, _ = apply(named, variables, x)
        assert y.dtype == expected.dtype == jnp.bfloat16
        assert_close(y, expected, 2**-7)


@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_traced_use_running_average(which):
    """One trace serves training and evaluation."""
    x = sample()
    if which == "BatchNorm":
        module = jaxnorm.linen.BatchNorm(momentum=0.9)
    else:
        module = jaxnorm.linen.Norm(SETTINGS["BatchNorm"])
    variables = variables_of(theirs("BatchNorm"), x)
    traces = []

    @jax.jit
    def run(flag):
        traces.append(flag)
        return apply(module, variables, x, use_running_average=flag)

    for flag in (True, False):
        expected = apply(module, variables, x, use_running_average=flag)
        assert_close(run(flag), expected, 1e-6)
    assert len(traces) == 1
    stats = {"batch_stats": variables["batch_stats"]}
    assert_identical(run(True)[1], stats)


def test_unbiased_running_variance():
    """n / (n - 1) in the running variance alone, n counting valid elements."""
    x, mask = sample((5, 6)), jnp.arange(5)[:, None] < 4
    module = ours("BatchNorm", momentum=0.9, unbiased=True)
    biased = ours("BatchNorm", momentum=0.9)
    variables = init(module, x)
    assert_identical(variables, init(biased, x))
    for kwargs, count in (({}, 5), ({"mask": mask}, 4)):
        y, updated = apply(module, variables, x, **kwargs)
        assert_close(y, apply(biased, variables, x, **kwargs)[0], 1e-6)
        var = 0.9 + 0.1 * np.var(np.asarray(x, np.float64)[:count], 0, ddof=1)
        assert_close(updated["batch_stats"]["var"], var)


def test_cumulative_average():
    """momentum=None: each batch counts the same, and those without values not."""
    module = ours("BatchNorm", momentum=None)
    variables = init(module, sample((5, 6)))
    assert set(variables["batch_stats"]) == {"mean", "var", "count"}
    batches = []
    for step in range(4):
        x = sample((5, 6), seed=step)
        batches.append(np.asarray(x, np.float64))
        previous = variables["batch_stats"]
        variables = {**variables, **apply(module, variables, x)[1]}
        stats = variables["batch_stats"]
        assert described(stats) == described(previous)
        assert_close(stats["mean"], np.mean([b.mean(0) for b in batches], 0))
        assert_close(stats["var"], np.mean([b.var(0) for b in batches], 0))
        assert np.all(np.asarray(stats["count"]) == step + 1)
        none = jnp.zeros((5, 1), bool)
        _, updated = apply(module, variables, x, mask=none)
        assert_identical(updated["batch_stats"], stats)
    x, stats = sample((5, 6)), variables["batch_stats"]
    evaluated = module.clone(use_running_average=True).apply(variables, x)
    plain = {"mean": stats["mean"], "var": stats["var"]}
    expected = nn.BatchNorm(True).apply({**variables, "batch_stats": plain}, x)
    assert_close(evaluated, expected)


# Where Flax is wrong.

MASK_SHAPES = [(4, 1, 1, 1), (4, 3, 1, 1), (4, 1), (1, 3, 4, 1), (6,), (1,), ()]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@names
def test_masks_broadcast(name, shape):
    """Every mask that NumPy broadcasts to x, also for group norm."""
    x = sample()
    mask = jnp.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 1
    variables = variables_of(ours(name), x)
    found = apply(ours(name), variables, x, mask=mask)
    full = jnp.broadcast_to(mask, SHAPE)
    assert_close(found, apply(ours(name), variables, x, mask=full), 1e-6)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
@names
def test_masks_of_zeros_and_ones(name, dtype):
    x, mask = sample(), sample_mask()
    variables = variables_of(ours(name), x)
    expected = apply(ours(name), variables, x, mask=mask)
    found = apply(ours(name), variables, x, mask=mask.astype(dtype))
    assert_identical(found, expected)


@names
def test_outputs_are_zero_where_masked(name):
    x, mask = sample(), sample_mask()
    for kwargs in ({}, {"use_running_average": True}):
        if kwargs and name != "BatchNorm":
            continue
        module = ours(name, **kwargs)
        variables = variables_of(module, x)
        y, _ = apply(module, variables, x, mask=mask)
        assert np.all(np.asarray(y)[~np.asarray(mask)] == 0)
        assert np.all(np.asarray(y)[np.asarray(mask)] != 0)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@names
def test_what_is_masked_harms_nothing(name, poison):
    """Values, statistics and gradients are those of a clean batch, bit for bit."""
    x, mask = sample(), sample_mask()
    variables = variables_of(ours(name), x)
    expected = outcome(ours(name), variables, x, mask=mask)
    found = outcome(ours(name), variables, jnp.where(mask, x, poison), mask=mask)
    assert_identical(found, expected)


def test_masked_rows_are_rows_removed():
    x = sample()
    variables = variables_of(ours("BatchNorm"), x)
    mask = jnp.asarray([True, False, True, True])[:, None, None, None]
    y, updated = apply(ours("BatchNorm"), variables, x, mask=mask)
    kept = jnp.asarray([0, 2, 3])
    expected, updated_flax = apply(theirs("BatchNorm"), variables, x[kept])
    assert_close(y[kept], expected)
    assert_close(updated, updated_flax)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "one nan"])
@pytest.mark.parametrize("which", ["BatchNorm", "Norm"])
def test_a_bad_batch_leaves_the_statistics(which, bad, momentum):
    if which == "BatchNorm":
        module = jaxnorm.linen.BatchNorm(False, momentum=momentum)
    else:
        module = jaxnorm.linen.Norm(jaxnorm.BatchNorm(momentum=momentum), False)
    x, mask = sample((5, 6)), jnp.ones((5, 6), bool)
    variables = variables_of(module, x)
    if bad == "masked":
        mask = jnp.zeros_like(mask)
    elif bad == "one nan":
        x = x.at[2, 3].set(jnp.nan)
    else:
        x = jnp.full_like(x, float(bad))
    y, updated = apply(module, variables, x, mask=mask)
    assert_identical(updated["batch_stats"], variables["batch_stats"])
    if bad == "masked":
        assert np.all(np.asarray(y) == 0)
    # The next good batch counts as if nothing had been.
    _, updated = apply(module, {**variables, **updated}, sample((5, 6)))
    _, expected = apply(module, variables, sample((5, 6)))
    assert_identical(updated, expected)


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_single_valid_value_leaves_finite_statistics(unbiased):
    """Known only at run time, so it cannot raise; n / (n - 1) must not divide by 0."""
    x = sample((5, 6))
    module = ours("BatchNorm", momentum=0.9, unbiased=unbiased)
    variables = variables_of(module, x)
    mask = (jnp.arange(5) == 2)[:, None]
    y, updated = apply(module, variables, x, mask=mask)
    for a in jax.tree.leaves((y, updated)):
        assert np.isfinite(a).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "RMSNorm"])
def test_variance_far_from_zero(name):
    """By default, too, where E[x^2] - E[x]^2 would give 0 or 8 instead of 4."""
    x = sample() + 1e4
    # The same float32 numbers without the offset: a reference without its roundoff.
    centred = jnp.asarray(np.asarray(x, np.float64) - 1e4, jnp.float32)
    assert np.array_equal(np.asarray(centred, np.float64) + 1e4, x)
    variables = variables_of(theirs(name), x)
    if name == "BatchNorm":
        variables = {
            **variables,
            "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
        }
    y, updated = forward(ours(name), variables, x)
    expected, updated_flax = forward(theirs(name), variables, centred)
    # The mean has float32's resolution at the offset: 1e-3, of a deviation of 2.
    assert_close(y, expected, 2e-3)
    if name == "BatchNorm":
        var, var_flax = (u["batch_stats"]["var"] for u in (updated, updated_flax))
        assert_close(var, var_flax, 1e-6)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
def test_half_precision_sums_are_never_made(name):
    """The switch that overflows float16 at deviation 300 is accepted, not obeyed."""
    x = (300 * jax.random.normal(jax.random.key(0), (64, 6))).astype(jnp.float16)
    kwargs = {"param_dtype": jnp.float16, "dtype": jnp.float16}
    reference = theirs(name, **kwargs)
    module = ours(name, force_float32_reductions=False, **kwargs)
    variables = variables_of(reference, x)
    found = forward(module, variables, x)
    assert_close(found, forward(reference, variables, x), 2e-3)


def test_masked_statistics_across_devices():
    """Shards with 3, 1, 0 and 2 valid rows count by rows, not by shards."""
    x = sample((4, 3, 6))
    mask = jnp.arange(3)[None, :, None] < jnp.asarray([3, 1, 0, 2])[:, None, None]
    module = ours("BatchNorm", axis_name="d", momentum=0.9)
    variables = variables_of(ours("BatchNorm"), x[0])
    run = jax.vmap(
        lambda x, mask: apply(module, variables, x, mask=mask), axis_name="d"
    )
    y, updated = jax.jit(run)(x, mask)
    rows = x.reshape(12, 6)[mask.reshape(12)]
    expected, updated_flax = apply(theirs("BatchNorm", momentum=0.9), variables, rows)
    assert_close(y.reshape(12, 6)[mask.reshape(12)], expected)
    for shard in range(4):
        own = jax.tree.map(lambda a, shard=shard: a[shard], updated)
        assert_close(own, updated_flax)


@names
def test_an_unbound_axis_name_is_named(name):
    x = sample()
    norm = dataclasses.replace(SETTINGS[name], axis_name="absent")
    for module in (
        ours(name, axis_name="absent"),
        jaxnorm.linen.Norm(norm, use_running_average=False),
    ):
        variables = init(ours(name), x)
        with pytest.raises(ValueError, match="absent"):
            apply(module, variables, x)
        with pytest.raises(ValueError, match="absent"):
            jax.jit(functools.partial(apply, module))(variables, x)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 1, 6), (6,)], ids=str)
def test_one_value_per_channel(shape):
    """Flax-named: Flax's output, a warning, the state as it was. Generic: an error."""
    x = sample(shape)
    variables = variables_of(theirs("BatchNorm"), x)
    # While initializing, nothing is said: warnings are errors here.
    for module in (ours("BatchNorm"), generic("BatchNorm")):
        init(module, x)
    with pytest.warns(UserWarning) as record:
        y, updated = jax.jit(functools.partial(apply, ours("BatchNorm")))(variables, x)
    assert len(record) == 1
    assert_close(y, forward(theirs("BatchNorm"), variables, x)[0])
    assert_identical(updated["batch_stats"], variables["batch_stats"])
    with pytest.raises(ValueError):
        apply(generic("BatchNorm"), variables, x)
    # Evaluation on one example is what evaluation is for.
    evaluated = forward(ours("BatchNorm", use_running_average=True), variables, x)
    assert_close(evaluated, forward(nn.BatchNorm(True), variables, x))


def test_one_value_per_channel_is_said_once():
    """As often as Python shows a warning from one place, which is once."""
    x = sample((1, 6))
    variables = variables_of(ours("BatchNorm"), x)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(3):
            apply(ours("BatchNorm"), variables, x)
    assert [w.category for w in record] == [UserWarning]


def test_a_summary_of_one_example():
    """`tabulate` on a batch of one says nothing but the table."""
    for module in (ours("BatchNorm"), generic("BatchNorm")):
        table = module.tabulate(jax.random.key(0), jnp.ones((1, 6)))
        assert "batch_stats" in table
