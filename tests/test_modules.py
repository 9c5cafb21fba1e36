"""What the modules of both Flax APIs answer alike: wrong arguments, complex inputs."""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wrong_values as wrong
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

SHAPE = (4, 3, 6)
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")
NEEDED = {"GroupNorm": {"num_groups": 2}}
APIS = ("linen", "nnx")

FUNCTION = tuple(v for v in wrong.FUNCTION if v is not None)
# By argument; None, where it is no value of the table, is one of the argument.
WRONG = {
    "norm": wrong.NORM,
    "num_features": wrong.SHAPE,
    "use_running_average": wrong.FLAG,
    "axis": wrong.AXIS,
    "momentum": wrong.SHARE,
    "epsilon": wrong.NOT_NEGATIVE,
    "dtype": wrong.DTYPE,
    "param_dtype": (*wrong.DTYPE, None),
    "use_bias": wrong.FLAG,
    "use_scale": wrong.FLAG,
    "bias_init": FUNCTION,
    "scale_init": FUNCTION,
    "reduction_axes": wrong.AXIS,
    "feature_axes": wrong.AXIS,
    "num_groups": wrong.COUNT,
    "group_size": wrong.COUNT,
    "axis_name": wrong.AXIS_NAME,
    "axis_index_groups": wrong.GROUPS,
    "promote_dtype": wrong.FUNCTION,
    "rngs": (*wrong.WORDS, None, 0, jax.random.key(0), nnx.Rngs),
    "bias_metadata": wrong.MAPPING,
    "scale_metadata": wrong.MAPPING,
    "unbiased": wrong.FLAG,
    "activation": wrong.CHOICE,
    "implementation": wrong.CHOICE,
    "layer_instance": (*wrong.WORDS, None, 3, nn.Dense, nnx.Linear, jnp.sin),
    "n_steps": wrong.INTEGER,
    "error_on_non_matrix": wrong.FLAG,
    "update_stats": wrong.FLAG,
    "scaled": wrong.FLAG,
    "variable_filter": (),  # see below
    # Accepted and without effect, as Flax's own names are; and Linen's own.
    "use_fast_variance": (),
    "force_float32_reductions": (),
    "collection_name": (),
    "parent": (),
    "name": (),
}


def made(api, name, **kwargs):
    """A module of this name, and a function that calls it on an array."""
    if name in WRAPPERS:
        layers = {"linen": nn.Dense(4), "nnx": nnx.Linear(6, 4, rngs=nnx.Rngs(0))}
        kwargs = {"layer_instance": layers[api], **kwargs}
    elif name == "Norm":
        kwargs = {"norm": jaxnorm.BatchNorm(), **kwargs}
    if api == "nnx":
        features = {} if name in WRAPPERS else {"num_features": SHAPE[-1]}
        kwargs = {**features, "rngs": nnx.Rngs(0), **kwargs}
        return getattr(jaxnorm.nnx, name)(**kwargs)
    if name in ("Norm", "BatchNorm"):
        kwargs = {"use_running_average": False, **kwargs}
    return getattr(jaxnorm.linen, name)(**kwargs)


def call(module, x):
    """The output, of random variables where the module has none of its own."""
    if isinstance(module, nnx.Module):
        return module(x)
    key = jax.random.key(0)
    if isinstance(module, nn.SpectralNorm):
        return module.init_with_output(key, x, update_stats=True)[0]
    return module.init_with_output(key, x)[0]


def traced(api, name, **kwargs):
    """Makes and calls a module while tracing, so that nothing is computed."""

    def run():
        return call(made(api, name, **kwargs), jnp.ones(SHAPE))

    return jax.eval_shape(run)


both = pytest.mark.parametrize("api", APIS)


@pytest.mark.parametrize("name", ("Norm", *NORMS, *WRAPPERS))
@both
def test_wrong_constructor_arguments(api, name):
    """Are refused where the module is made, or at its first call."""
    needed = NEEDED.get(name, {})
    traced(api, name, **needed)
    arguments = inspect.signature(getattr(getattr(jaxnorm, api), name)).parameters
    kind = getattr(jaxnorm, name) if name in NORMS else None
    settings = inspect.signature(kind).parameters if kind else ()
    problems = []
    for argument in arguments:
        # A few of them do for what is a setting, which has a test of its own.
        for value in WRONG[argument][:: 5 if argument in settings else 1]:
            if (name, argument) == ("Norm", "rngs") and value is None:
                continue
            kwargs = {**needed, argument: value}
            if argument == "group_size":
                kwargs["num_groups"] = None
            if argument == "axis_index_groups":
                kwargs["axis_name"] = "data"
            problem = wrong.problem_of(lambda kw=kwargs: traced(api, name, **kw))
            if problem:
                problems.append(f"{argument}={wrong.told(value)}: {problem}")
    assert not problems, "\n".join(problems)


@both
def test_a_class_where_a_value_is_meant(api):
    with pytest.raises(TypeError, match=r"jaxnorm.BatchNorm\(\).* the class BatchNorm"):
        made(api, "Norm", norm=jaxnorm.BatchNorm)
    layer = {"linen": nn.Dense, "nnx": nnx.Linear}[api]
    with pytest.raises(TypeError, match=f"got the class {layer.__name__}"):
        made(api, "WeightNorm", layer_instance=layer)


def test_a_string_is_no_set_of_names():
    """In Linen; in NNX it is a filter, of tagged variables."""
    with pytest.raises(TypeError, match=r"pass \{'kernel'\}"):
        made("linen", "WeightNorm", variable_filter="kernel")


@pytest.mark.parametrize("name", ("Norm", *NORMS))
@both
def test_wrong_inputs(api, name):
    module = made(api, name, **NEEDED.get(name, {}))
    for x in (None, *wrong.ARRAY):
        problem = wrong.problem_of(lambda x=x: call(module, x))
        assert not problem, f"x={wrong.told(x)}: {problem}"


@pytest.mark.parametrize("name", ("Norm", *NORMS))
@both
def test_variables_of_another_shape(api, name):
    """As where a layer is called on more features than it has."""
    x, wide = jnp.ones(SHAPE), jnp.ones((4, 3, 12))
    module = made(api, name, **NEEDED.get(name, {}))
    run = functools.partial(module)
    if api == "linen":
        variables = module.init(jax.random.key(0), x)
        run = functools.partial(module.apply, variables, mutable=["batch_stats"])
    run(x)
    assert wrong.problem_of(lambda: run(wide)) is None
    with pytest.raises(ValueError, match=r"\(6,\).*\(12,\)"):
        run(wide)


@pytest.mark.parametrize("name", NORMS)
@both
def test_the_generic_module_takes_what_flax_takes(api, name):
    """In its own arguments, or in the settings."""
    flax = {"linen": nn, "nnx": nnx}[api]
    taken = inspect.signature(getattr(flax, name).__init__).parameters
    settings = inspect.signature(getattr(jaxnorm, name)).parameters
    own = inspect.signature(getattr(jaxnorm, api).Norm).parameters
    without_effect = {"use_fast_variance", "force_float32_reductions"}
    # What Flax calls feature_axes there is axis in the settings.
    known = {*settings, *own, *without_effect, "self", "feature_axes"}
    assert set(taken) <= known


# Complex numbers.


def complex_sample(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE) + (1 - 2j)
    return jnp.asarray(x, jnp.complex64)


class Layer:
    """A module of either API with its variables, and Linen's interface for both."""

    def __init__(self, api, name, x, **kwargs):
        self.module = made(api, name, **kwargs)
        self.variables = {}
        if api == "linen":
            self.variables = self.module.init(jax.random.key(0), x)

    def __call__(self, x, use_running_average=False):
        return self.call(x, use_running_average)

    def call(self, x, flag):
        if isinstance(self.module, nnx.Module):
            return nnx.jit(lambda m, x: m(x, use_running_average=flag))(self.module, x)
        module = self.module.clone(use_running_average=None)
        y, new = jax.jit(
            functools.partial(
                module.apply, mutable=["batch_stats"], use_running_average=flag
            )
        )(self.variables, x)
        self.variables = {**self.variables, **new}
        return y

    @property
    def stats(self):
        if isinstance(self.module, nnx.Module):
            return nnx.to_pure_dict(nnx.state(self.module, nnx.BatchStat))
        return self.variables["batch_stats"]


@pytest.mark.parametrize("name", ["Norm", "BatchNorm"])
@pytest.mark.parametrize("made_for", ["real", "complex"])
@both
def test_complex_batch_norm(api, made_for, name):
    """Whatever the layer was made for, the running mean is complex from the first step
    on, and evaluation uses it."""
    norm: dict[str, Any] = {"norm": jaxnorm.BatchNorm(momentum=0.5)}
    kwargs: dict[str, Any] = norm if name == "Norm" else {"momentum": 0.5}
    x = complex_sample()
    if made_for == "complex":
        kwargs["dtype"] = jnp.complex64
    layer = Layer(api, name, x if made_for == "complex" else x.real, **kwargs)
    assert jnp.iscomplexobj(layer.stats["mean"]) == (made_for == "complex")
    assert layer(x, True).dtype == jnp.complex64
    mean, var = np.zeros(6, complex), np.ones(6)
    for seed in range(2):
        x = complex_sample(seed)
        exact = np.asarray(x, np.complex128)
        y = layer(x)
        assert y.dtype == jnp.complex64
        batch = exact.mean((0, 1)), exact.var((0, 1))
        want = (exact - batch[0]) / np.sqrt(batch[1] + 1e-5)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        mean, var = 0.5 * mean + 0.5 * batch[0], 0.5 * var + 0.5 * batch[1]
        assert layer.stats["mean"].dtype == jnp.complex64
        assert layer.stats["var"].dtype == jnp.float32
        np.testing.assert_allclose(layer.stats["mean"], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.stats["var"], var, rtol=1e-5, atol=1e-5)
    y = layer(x, True)
    want = (np.asarray(x, np.complex128) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_complex_checkpoints():
    """A state with a complex mean goes into a layer that was made with a real one, and
    the other way round."""
    x = complex_sample()
    trained = made("nnx", "BatchNorm")
    trained(x)
    want = trained(x, use_running_average=True)
    for kwargs in ({}, {"dtype": jnp.complex64}):
        fresh = made("nnx", "BatchNorm", **kwargs)
        nnx.update(fresh, nnx.state(trained))
        np.testing.assert_array_equal(fresh(x, use_running_average=True), want)
    fresh = made("nnx", "BatchNorm", dtype=jnp.complex64)
    nnx.update(fresh, nnx.state(made("nnx", "BatchNorm")))
    fresh(x)
    np.testing.assert_array_equal(fresh.mean[...], trained.mean[...])


@both
def test_pooled_statistics_of_complex_inputs(api):
    """Those of several batches, which are not kept in real numbers either."""
    x = complex_sample()
    layer = Layer(api, "BatchNorm", x.real)
    if api == "nnx":
        jaxnorm.nnx.update(
            layer.module, jaxnorm.models.accumulate(jaxnorm.nnx.variables(layer.module))
        )
    else:
        layer.variables = jaxnorm.models.accumulate(layer.variables)
    layer(x)
    exact = np.asarray(x, np.complex128)
    mean = layer.stats["batch_mean"]
    np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=1e-5, atol=1e-5)
