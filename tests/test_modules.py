"""What the modules of both Flax APIs answer alike: wrong arguments, complex inputs."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wrong_values as wrong
from apis import LINEN, NAMES, NEEDED, NNX, both
from flax import nnx
from wrong_values import unfiltered

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

__all__ = ["unfiltered"]  # a fixture

SHAPE = (4, 3, 6)
WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")

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


LAYERS = {LINEN: nn.Dense(4), NNX: nnx.Linear(6, 4, rngs=nnx.Rngs(0))}


def made(api, name, **kwargs):
    """A module of this name."""
    given = dict(NEEDED.get(name, {}))
    if name in WRAPPERS:
        given["layer_instance"] = LAYERS[api]
    elif name == "Norm":
        given["norm"] = jaxnorm.BatchNorm()
    if api is not LINEN:
        given["rngs"] = nnx.Rngs(0)
        if name not in WRAPPERS:
            given["num_features"] = SHAPE[-1]
    return getattr(api.own, name)(**{**given, **kwargs})


def call(module, x):
    """The output, of random variables where the module has none of its own."""
    if isinstance(module, nnx.Module):
        return module(x)
    kwargs: dict[str, Any] = {}
    kwargs |= {"update_stats": True} if isinstance(module, nn.SpectralNorm) else {}
    return module.init_with_output(jax.random.key(0), x, **kwargs)[0]


def traced(api, name, **kwargs):
    """Makes and calls a module while tracing, so that nothing is computed."""
    jax.eval_shape(lambda: call(made(api, name, **kwargs), jnp.ones(SHAPE)))


@pytest.mark.parametrize("name", ("Norm", *NAMES, *WRAPPERS))
@both
def test_wrong_constructor_arguments(api, name, unfiltered):
    """Are refused where the module is made, or at its first call."""
    traced(api, name)
    arguments = inspect.signature(getattr(api.own, name)).parameters
    kind = getattr(jaxnorm, name) if name in NAMES else None
    settings = inspect.signature(kind).parameters if kind else ()
    problems = []
    for argument in arguments:
        # A few of them do for what is a setting, which has a test of its own.
        for value in WRONG[argument][:: 5 if argument in settings else 1]:
            if (name, argument) == ("Norm", "rngs") and value is None:
                continue
            kwargs = {argument: value}
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
    layer = nn.Dense if api is LINEN else nnx.Linear
    with pytest.raises(TypeError, match=f"got the class {layer.__name__}"):
        made(api, "WeightNorm", layer_instance=layer)


def test_a_string_is_no_set_of_names():
    """In Linen; in NNX it is a filter, of tagged variables."""
    with pytest.raises(TypeError, match=r"pass \{'kernel'\}"):
        made(LINEN, "WeightNorm", variable_filter="kernel")


@pytest.mark.parametrize("name", ("Norm", *NAMES))
@both
def test_wrong_inputs(api, name, unfiltered):
    module = made(api, name)
    for x in (None, *wrong.ARRAY):
        problem = wrong.problem_of(lambda x=x: call(module, x))
        assert not problem, f"x={wrong.told(x)}: {problem}"


@pytest.mark.parametrize("name", ("Norm", *NAMES))
@both
def test_variables_of_another_shape(api, name):
    """As where a layer is called on more features than it has."""
    settings = {"norm": jaxnorm.BatchNorm()} if name == "Norm" else {}
    layer = api.ours(name, **settings)
    variables = jax.eval_shape(layer.init, jnp.ones(SHAPE))
    jax.eval_shape(layer.apply, variables, jnp.ones(SHAPE))

    def run():
        jax.eval_shape(layer.apply, variables, jnp.ones((4, 3, 12)))

    assert wrong.problem_of(run) is None
    with pytest.raises(ValueError, match=r"\(6,\).*\(12,\)"):
        run()


@pytest.mark.parametrize("name", NAMES)
@both
def test_the_generic_module_takes_what_flax_takes(api, name):
    """In its own arguments, or in the settings."""
    taken = inspect.signature(getattr(api.flax, name).__init__).parameters
    settings = inspect.signature(getattr(jaxnorm, name)).parameters
    own = inspect.signature(api.own.Norm).parameters
    without_effect = {"use_fast_variance", "force_float32_reductions"}
    # What Flax calls feature_axes there is axis in the settings.
    known = {*settings, *own, *without_effect, "self", "feature_axes"}
    assert set(taken) <= known


# Complex numbers.


def complex_sample(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE) + (1 - 2j)
    return jnp.asarray(x, jnp.complex64)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Norm", "BatchNorm"])
@pytest.mark.parametrize("made_for", ["real", "complex"])
@both
def test_complex_batch_norm(api, made_for, name):
    """Whatever the layer was made for, the running mean is complex from the first step
    on, and evaluation uses it."""
    kwargs: dict[str, Any] = {"momentum": 0.5}
    if name == "Norm":
        kwargs = {"norm": jaxnorm.BatchNorm(**kwargs)}
    x = complex_sample()
    if made_for == "complex":
        kwargs["dtype"] = jnp.complex64
    layer = api.ours(name, **kwargs)
    train = jax.jit(layer.apply)
    evaluate = jax.jit(layer.with_(use_running_average=True).apply)
    variables = jax.jit(layer.init)(x.real)
    made_complex = jnp.iscomplexobj(variables["batch_stats"]["mean"])
    assert made_complex == (made_for == "complex")
    assert jax.eval_shape(evaluate, variables, x)[0].dtype == jnp.complex64
    mean, var = np.zeros(6, complex), np.ones(6)
    for seed in range(2):
        x = complex_sample(seed)
        exact = np.asarray(x, np.complex128)
        y, variables = train(variables, x)
        stats = variables["batch_stats"]
        assert y.dtype == jnp.complex64
        batch = exact.mean((0, 1)), exact.var((0, 1))
        assert_close(y, (exact - batch[0]) / np.sqrt(batch[1] + 1e-5))
        mean, var = 0.5 * mean + 0.5 * batch[0], 0.5 * var + 0.5 * batch[1]
        assert stats["mean"].dtype == jnp.complex64
        assert stats["var"].dtype == jnp.float32
        assert_close(stats["mean"], mean)
        assert_close(stats["var"], var)
    y, _ = evaluate(variables, x)
    assert_close(y, (np.asarray(x, np.complex128) - mean) / np.sqrt(var + 1e-5))


def test_complex_checkpoints():
    """A state with a complex mean goes into a layer that was made with a real one, and
    the other way round."""
    x = complex_sample()
    trained = made(NNX, "BatchNorm")
    trained(x)
    want = trained(x, use_running_average=True)
    for kwargs in ({}, {"dtype": jnp.complex64}):
        fresh = made(NNX, "BatchNorm", **kwargs)
        nnx.update(fresh, nnx.state(trained))
        np.testing.assert_array_equal(fresh(x, use_running_average=True), want)
    fresh = made(NNX, "BatchNorm", dtype=jnp.complex64)
    nnx.update(fresh, nnx.state(made(NNX, "BatchNorm")))
    fresh(x)
    np.testing.assert_array_equal(fresh.mean[...], trained.mean[...])


@both
def test_pooled_statistics_of_complex_inputs(api):
    """Those of several batches, which are not kept in real numbers either."""
    x = complex_sample()
    layer = api.ours("BatchNorm")
    variables = jaxnorm.models.accumulate(jax.jit(layer.init)(x.real))
    if api is LINEN:
        _, variables = layer.apply(variables, x)
    else:
        module = layer.make()
        jaxnorm.nnx.update(module, variables)
        module(x)
        variables = jaxnorm.nnx.variables(module)
    mean = variables["batch_stats"]["batch_mean"]
    assert_close(mean, np.asarray(x, np.complex128).mean((0, 1)))
