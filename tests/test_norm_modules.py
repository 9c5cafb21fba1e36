"""The norms of both Flax APIs against Flax: a user changes one import, no more.

Flax is the reference wherever it is right. It is asked for its two-pass variance, so
that agreement means agreement with the definition. Flax NNX is wrong in more places
than Linen, which is the reference for both there. What is special to one API stands in
test_linen.py and test_nnx.py.
"""

import functools
import inspect
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from apis import (
    FEATURES,
    LINEN,
    NAMES,
    NNX,
    SHAPE,
    applied,
    assert_close,
    assert_extends,
    assert_identical,
    both,
    initial,
    names,
    sample,
    sample_mask,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm

# Constructor arguments that change the result, with at least one row for each of them.
CASES = [
    ("BatchNorm", {"momentum": 0.9}),
    ("BatchNorm", {"axis": 1, "num_features": 3, "epsilon": 1e-2}),
    ("BatchNorm", {"use_running_average": True, "use_bias": False}),
    ("BatchNorm", {"use_scale": False, "use_bias": False, "use_fast_variance": False}),
    ("LayerNorm", {"epsilon": 1e-2}),
    ("LayerNorm", {"reduction_axes": (1, 2, 3), "use_scale": False}),
    ("LayerNorm", {"reduction_axes": (1, 2), "use_bias": False}),
    ("LayerNorm", {"feature_axes": 1, "num_features": 3}),
    ("LayerNorm", {"reduction_axes": [1, 2], "feature_axes": [3]}),
    ("RMSNorm", {"epsilon": 1e-2}),
    ("RMSNorm", {"reduction_axes": (1, 2, 3), "feature_axes": 1, "num_features": 3}),
    ("RMSNorm", {"use_scale": False, "use_fast_variance": False}),
    ("GroupNorm", {"num_groups": 3, "epsilon": 1e-2}),
    ("GroupNorm", {"num_groups": None, "group_size": 3, "use_bias": False}),
    ("GroupNorm", {"reduction_axes": (1, 3)}),
    ("GroupNorm", {"reduction_axes": (-1,)}),
    ("GroupNorm", {"reduction_axes": (0, 1, 2, 3), "use_scale": False}),
    ("GroupNorm", {"use_scale": False, "use_bias": False}),
    ("InstanceNorm", {"feature_axes": 1, "num_features": 3, "epsilon": 1e-2}),
    ("InstanceNorm", {"use_scale": False, "use_bias": False}),
]
# Several feature axes, which Flax has in Linen only, as the last switch.
LINEN_CASES = [
    ("BatchNorm", {"axis": (3, 1), "momentum": 0.5, "use_bias": False}),
    ("BatchNorm", {"axis": (1, 3), "use_running_average": True}),
    ("LayerNorm", {"reduction_axes": (-1, 1), "feature_axes": (-1, 1)}),
    ("LayerNorm", {"reduction_axes": 3, "feature_axes": (2, 3), "use_scale": False}),
    ("RMSNorm", {"reduction_axes": 3, "feature_axes": (1, 3)}),
    ("RMSNorm", {"force_float32_reductions": False}),
    ("InstanceNorm", {"feature_axes": (3, 1), "use_bias": False}),
]

cases = pytest.mark.parametrize(
    ("api", "name", "kwargs"),
    [(a, *case) for a in (LINEN, NNX) for case in CASES]
    + [(LINEN, *case) for case in LINEN_CASES],
    ids=str,
)
kinds = pytest.mark.parametrize("kind", ["ours", "generic"])


def batch_norm(api, kind, **kwargs):
    """The named or the generic module, of a momentum that tests wait for."""
    if kind == "ours":
        return api.ours("BatchNorm", **{"momentum": 0.9, **kwargs})
    settings = {k: kwargs.pop(k) for k in ("momentum", "axis_name") if k in kwargs}
    norm = jaxnorm.BatchNorm(**{"momentum": 0.9, **settings})
    return api.ours("Norm", norm=norm, **kwargs)


def right(api, name, **kwargs):
    """Flax's layer; Linen's where that of NNX repeats statistics along a wrong axis."""
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
    wrong = name == "GroupNorm" and "reduction_axes" in kwargs
    return (LINEN if wrong else api).theirs(name, **kwargs)


def described(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


# The same constructor and call arguments.


@names
@both
def test_signatures_extend_flax(api, name):
    flax, own = getattr(api.flax, name), getattr(api.own, name)
    for method in ("__init__", "__call__", "set_view"):
        if hasattr(flax, method):
            assert_extends(getattr(flax, method), getattr(own, method))


@both
def test_own_arguments_are_in_the_signature(api):
    """Where `help` and editors find them."""
    parameters = inspect.signature(api.own.BatchNorm).parameters
    assert parameters["unbiased"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["unbiased"].default is False


@kinds
@both
def test_use_running_average(api, kind):
    """Linen takes it once, at construction or at the call, which decides in NNX."""
    x = sample()
    variables = api.theirs("BatchNorm").variables()
    for constructor, call in itertools.product((None, False, True), repeat=2):
        kwargs = {"use_running_average": call}
        reference = api.theirs(
            "BatchNorm", use_running_average=constructor, momentum=0.9
        )
        layer = batch_norm(api, kind, use_running_average=constructor)
        flags = [flag for flag in (constructor, call) if flag is not None]
        if len(flags) == 1 or flags and api is NNX:
            expected = reference.apply(variables, x, **kwargs)
            assert_close(layer.apply(variables, x, **kwargs), expected)
            continue
        with pytest.raises(ValueError) as error:
            reference.apply(variables, x, **kwargs)
        with pytest.raises(error.type, match="use_running_average"):
            layer.apply(variables, x, **kwargs)
        if api is LINEN:
            with pytest.raises(error.type, match="use_running_average"):
                layer.init(x, **kwargs)


REFUSED = {
    "GroupNorm": [
        {"num_groups": 4},
        {"num_groups": None, "group_size": 4},
        {"num_groups": None},
        {"group_size": 3},
        {"num_groups": 0},
        {"reduction_axes": (1, 2)},
    ],
    "InstanceNorm": [{"feature_axes": 0}, {"feature_axes": (0, 3)}],
}


@pytest.mark.parametrize("name", REFUSED)
@both
def test_what_flax_refuses(api, name):
    for kwargs in REFUSED[name]:
        for layer in (right(api, name, **kwargs), api.ours(name, **kwargs)):
            with pytest.raises(ValueError):
                jax.eval_shape(layer.output, sample())


# The same variables.


@cases
def test_variables_are_flax_variables(api, name, kwargs):
    layers = api.ours(name, **kwargs), api.theirs(name, **kwargs)
    assert_identical(*initial(layers, sample()))


@names
@both
def test_initializers_are_called_as_flax_calls_them(api, name):
    """With the same keys, so that they draw what they draw in Flax."""
    calls = []

    def drawn(key, shape, dtype):
        key = np.asarray(jax.random.key_data(key))
        calls.append((key.tolist(), tuple(shape), dtype))
        return jnp.asarray(np.resize(key, shape).astype(dtype))

    def found(maker, **kwargs):
        calls.clear()
        return maker(name, **kwargs).init(sample()), calls[:]

    scale, bias = {"scale_init": drawn}, {"bias_init": drawn}
    half = {"param_dtype": jnp.bfloat16}
    variants = [scale, {**scale, **half}, {}, {"use_scale": False}]
    if name != "RMSNorm":
        variants += [bias, {**scale, **bias}, {**scale, **bias, **half}]
        variants += [{**scale, "use_bias": False}]
        variants += [{**scale, **bias, "use_scale": False}]
    for kwargs in variants:
        expected, flax_calls = found(api.theirs, **kwargs)
        for maker in (api.ours, api.generic):
            variables, own_calls = found(maker, **kwargs)
            assert own_calls == flax_calls
            assert_identical(variables, expected)


# The same numbers.


@cases
def test_values_are_flax(api, name, kwargs):
    x, mask = sample(), sample_mask()
    layers = api.ours(name, **kwargs), right(api, name, **kwargs)
    # Other tests mask what is normalized along the usual axes.
    masked = any(v in ((1, 2), (1, 3), (3, 1)) for v in kwargs.values())
    variables = layers[1].variables()
    assert_close(*applied(layers, variables, x))
    if masked:
        (y, found), (y_flax, expected) = applied(layers, variables, x, mask=mask)
        assert_close(y, jnp.where(mask, y_flax, 0))
        assert_close(found, expected)


@functools.cache
def outcomes(api, name, masked):
    """A compiled function: what Flax's layer and ours return and update, and their
    gradients by the parameters and the input."""

    def outcome(layer, variables, x, mask):
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        if masked:
            # What stands at masked elements is padding: a loss does not read it.
            weights = jnp.where(mask, weights, 0)

        def loss(params, x):
            given = {**variables, "params": params}
            y, new = layer.apply(given, x, mask=mask if masked else None)
            return jnp.sum(weights * y), (y, new)

        by = jax.grad(loss, (0, 1), has_aux=True)
        by, (y, new) = by(variables["params"], x)
        return y, new, by

    layers = api.theirs(name), api.ours(name)
    return jax.jit(lambda *args: [outcome(layer, *args) for layer in layers])


@names
@both
def test_gradients_are_flax(api, name):
    variables = api.theirs(name).variables()
    expected, found = outcomes(api, name, False)(variables, sample(), None)
    assert_close(found, expected)


@names
@both
def test_masks_are_flax(api, name):
    """And what is masked harms nothing: values, statistics and gradients are those of
    a clean batch, bit for bit."""
    x, mask = sample(), sample_mask()
    variables = api.theirs(name).variables()
    run = outcomes(api, name, True)
    (y_flax, *expected), (y, *found) = run(variables, x, mask)
    assert_close(y, jnp.where(mask, y_flax, 0))
    assert_close(found, expected)
    for poison in (np.nan, np.inf):
        _, poisoned = run(variables, jnp.where(mask, x, poison), mask)
        assert_identical(tuple(poisoned), (y, *found))


@names
@both
def test_inputs_of_other_ranks_are_flax(api, name):
    shapes = {"LayerNorm": (6,), "RMSNorm": (6,), "InstanceNorm": (5, 4, 6)}
    shape = shapes.get(name, (5, 6))
    x, layers = sample(shape), [api.ours(name), api.theirs(name)]
    assert_close(*applied(layers, layers[1].variables(x), x))


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "int32"])
@names
@both
def test_dtypes_are_flax(api, name, x_dtype):
    """Shapes and dtypes only: nothing is computed."""
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    without = {"use_scale": False}
    if name != "RMSNorm":
        without["use_bias"] = False

    def run(layer):
        return jax.eval_shape(layer.output, x)

    variants = [{"param_dtype": d} for d in ("float32", "bfloat16", "float16")]
    variants += [without, {"dtype": "float32", "param_dtype": "bfloat16"}]
    variants += [{"dtype": "bfloat16", **kwargs} for kwargs in variants[2:4]]
    for kwargs in variants:
        y, variables = run(api.ours(name, **kwargs))
        assert (y, variables) == run(api.theirs(name, **kwargs)), kwargs
        stats = variables["batch_stats"]
        assert all(a.dtype == jnp.float32 for a in stats.values())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@names
@both
def test_no_implicit_dtype_promotion(api, name, dtype):
    """Nor is any needed under JAX's strict setting, which Flax does not bear."""
    x = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    for layer in (api.ours(name, dtype=dtype), api.generic(name, dtype=dtype)):
        expected = jax.eval_shape(layer.output, x)
        with jax.numpy_dtype_promotion("strict"):
            assert jax.eval_shape(layer.output, x) == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in NAMES] + [("BatchNorm", "float16")],
)
@both
def test_half_precision_values(api, name, dtype):
    """Inputs or outputs are in half precision; what lies between is not. Flax NNX
    casts x to dtype first: at 100 +- 0.1 there is nothing left in it."""
    layer, reference = api.ours(name, dtype=dtype), LINEN.theirs(name, dtype=dtype)
    variables = reference.variables()
    # One rounding of the same float32 number, which may fall to either side.
    eps = float(jnp.finfo(dtype).eps)
    for x, tolerance in (
        ((3 * sample()).astype(dtype), eps),
        (100 + 0.05 * sample(), 2 * eps),
    ):
        y, new = layer.apply(variables, x)
        expected, expected_new = reference.apply(variables, x)
        assert y.dtype == expected.dtype == dtype
        assert_close(y, expected, tolerance)
        assert_close(new, expected_new)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "int32"])
@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
@both
def test_values_of_other_dtypes_are_flax(api, name, x_dtype):
    x = (3 * sample()).astype(x_dtype)
    variables = api.theirs(name).variables()
    found = api.ours(name).apply(variables, x)
    expected = api.theirs(name).apply(variables, x)
    assert found[0].dtype == expected[0].dtype
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
@both
def test_half_precision_sums_are_never_made(api, name):
    """They overflow in float16 at deviation 300. Linen's switch is not obeyed."""
    x = 150 * sample((64, 6)).astype(jnp.float16)
    kwargs = {"param_dtype": jnp.float16, "dtype": jnp.float16}
    reference = LINEN.theirs(name, **kwargs)
    switch = {"force_float32_reductions": False} if api is LINEN else {}
    layer = api.ours(name, **switch, **kwargs)
    found = applied([layer, reference], reference.variables(x), x)
    assert_close(*found, tolerance=2e-3)


@pytest.mark.parametrize("axis", [-1, 1])
@both
def test_running_statistics_after_each_step(api, axis):
    """Against Flax and the definition, after 1, 2 and 5 steps."""
    kwargs = {"axis": axis, "momentum": 0.8, "num_features": SHAPE[axis]}
    layers = api.ours("BatchNorm", **kwargs), api.theirs("BatchNorm", **kwargs)
    states = [layers[1].init(sample())] * 2

    @jax.jit
    def run(states, x):
        return [layer.apply(v, x) for layer, v in zip(layers, states, strict=True)]

    mean, var = np.zeros(SHAPE[axis]), np.ones(SHAPE[axis])
    others = tuple(a for a in range(4) if a != axis % 4)
    for step in range(5):
        x = sample(seed=step)
        exact = np.asarray(x, np.float64)
        mean = 0.8 * mean + 0.2 * exact.mean(others)
        var = 0.8 * var + 0.2 * exact.var(others)
        found = run(states, x)
        states = [variables for _, variables in found]
        assert_close(*found)
        assert_close(states[0]["batch_stats"], {"mean": mean, "var": var})


@names
@both
def test_repeated_calls_compile_nothing(api, name, caplog):
    """Without jit, too: what the first call compiles serves the next."""
    x = sample()
    layer, variables = api.ours(name), api.theirs(name).variables()

    def compilations(f, *args):
        caplog.clear()
        with jax.log_compiles():
            f(*args)
        return [r.message for r in caplog.records if "ompil" in r.message]

    layer.apply(variables, x)
    assert not compilations(layer.apply, variables, x)
    assert compilations(jax.jit(lambda x: x + 1), x)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@kinds
@both
def test_state_is_a_fixed_carry(api, kind, x64):
    """`lax.scan` over steps: structure, shapes and dtypes do not drift."""
    layer = batch_norm(api, kind)
    with jax.enable_x64(x64):
        xs = jax.ShapeDtypeStruct((3, 5, 6), "float64" if x64 else "float32")

        def run(xs):
            before = layer.init(xs[0])

            def step(variables, x):
                y, variables = layer.apply(variables, x)
                return variables, y

            # Raises TypeError where the carry changes.
            return before, *jax.lax.scan(step, before, xs)

        before, after, ys = jax.eval_shape(run, xs)
        assert ys.dtype == xs.dtype
        assert after == before
        assert before["batch_stats"]["mean"].dtype == jnp.float32


# Across devices.


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm"])
@both
def test_axis_name_is_flax(api, name):
    """Shards of equal size, unmasked: the case in which Flax is right."""
    x = sample((4, 2, 3, 6))
    variables = api.theirs(name).variables(x[0])
    layers = api.ours(name, axis_name="d"), api.theirs(name, axis_name="d")

    @jax.jit
    @functools.partial(jax.vmap, axis_name="d")
    def run(x):
        return [layer.apply(variables, x) for layer in layers]

    assert_close(*run(x))


@both
def test_axis_index_groups_are_flax(api):
    """And replicated statistics leave shard_map as such, with its checks on."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    x, reference = sample((8, 6)), api.theirs("BatchNorm")
    variables = reference.variables(x)

    def run(layer, **kwargs):
        specs: dict[str, Any] = {"in_specs": (P(), P("d")), "out_specs": (P("d"), P())}
        layer = layer.with_(axis_name="d", **kwargs)
        mapped = jax.shard_map(layer.apply, mesh=mesh, **specs, check_vma=not kwargs)
        return jax.jit(mapped)(variables, x)

    everywhere = run(api.ours("BatchNorm"))
    assert_close(everywhere, *applied([reference], variables, x))
    groups = {"axis_index_groups": [[0, 1], [2, 3]]}
    y, _ = run(api.ours("BatchNorm"), **groups)
    assert_close(y, run(reference, **groups)[0])
    assert np.abs(y - everywhere[0]).max() > 0.1


@both
def test_one_example_per_device_is_a_batch(api):
    """A vmapped example holds one value per channel; the named axis holds the rest."""
    x = sample((8, 6))
    layer, reference = api.ours("BatchNorm", axis_name="batch"), api.theirs("BatchNorm")
    variables = reference.variables(x)
    run = jax.vmap(functools.partial(layer.apply, variables), axis_name="batch")
    y, new = jax.jit(run)(x)
    new = jax.tree.map(lambda a: np.asarray(a)[0], new)
    assert_close((y, new), *applied([reference], variables, x))


@both
def test_masked_statistics_across_devices(api):
    """Shards with 3, 1, 0 and 2 valid rows count by rows, not by shards."""
    x = sample((4, 3, 6))
    mask = np.arange(3)[None, :, None] < np.array([3, 1, 0, 2])[:, None, None]
    rows = mask.reshape(12)
    reference = LINEN.theirs("BatchNorm", momentum=0.9)
    variables = reference.variables(x[0])
    layer = api.ours("BatchNorm", axis_name="d", momentum=0.9)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="d")
    def run(x, mask):
        return layer.apply(variables, x, mask=mask)

    y, new = jax.tree.map(np.asarray, run(x, mask))
    valid = np.asarray(x).reshape(12, 6)[rows]
    [(expected, expected_new)] = applied([reference], variables, valid)
    assert_close(y.reshape(12, 6)[rows], expected)
    for shard in range(4):
        assert_close(jax.tree.map(lambda a, i=shard: a[i], new), expected_new)


@names
@both
def test_an_axis_name_that_is_not_bound(api, name):
    """Is named, and needed neither while initializing nor at evaluation."""
    x, settings = sample(), api.generic(name).kwargs["norm"]
    norm = type(settings)(**{**vars(settings), "axis_name": "absent"})
    variables = api.ours(name).variables()
    layers = api.ours(name, axis_name="absent"), api.ours("Norm", norm=norm)
    expected, *first = initial([api.ours(name), *layers], x)
    assert_identical(first, [expected] * 2)
    for layer in layers:
        for run in (layer.apply, jax.jit(layer.apply)):
            with pytest.raises(ValueError, match="absent"):
                run(variables, x)
        if name == "BatchNorm":
            evaluated = layer.with_(use_running_average=True).apply(variables, x)
            reference = api.theirs(name, use_running_average=True)
            assert_close(evaluated, reference.apply(variables, x))


# jaxnorm's own: the generic module, traced modes, other running averages.


@names
@both
def test_the_generic_module_is_the_named_one(api, name):
    x, mask = sample(), sample_mask()
    named = batch_norm(api, "ours") if name == "BatchNorm" else api.ours(name)
    layer = api.generic(name)
    assert_identical(*initial([layer, named], x))
    variables = named.variables()
    found = layer.apply(variables, x, mask=mask)
    assert_close(found, named.apply(variables, x, mask=mask), 1e-6)
    # A model that is given its norm passes a mode, whether the norm has one or not.
    layer = layer.with_(use_running_average=None)
    flagged = [layer.apply(variables, x, use_running_average=f) for f in (False, True)]
    if name != "BatchNorm":
        assert_identical(flagged, [layer.apply(variables, x)] * 2)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm"])
@both
def test_arguments_of_the_generic_module(api, name):
    x = sample()
    variables = api.ours(name, param_dtype=jnp.bfloat16).variables()
    for drop in ({}, {"use_scale": False}, {"use_bias": False}):
        kwargs = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, **drop}
        named, layer = api.ours(name, **kwargs), api.generic(name, **kwargs)
        params = dict(variables["params"])
        for key in drop:
            del params[key.removeprefix("use_")]
        given = {**variables, "params": params}
        assert jax.tree.structure(layer.init(x)) == jax.tree.structure(given)
        y, expected = layer.apply(given, x)[0], named.apply(given, x)[0]
        assert y.dtype == expected.dtype == jnp.bfloat16
        assert_close(y, expected, 2**-7)


@kinds
@both
def test_traced_use_running_average(api, kind):
    """One trace serves training and evaluation."""
    x = sample()
    layer = batch_norm(api, kind, use_running_average=None)
    variables = layer.with_(use_running_average=False).variables()
    traces = []

    @jax.jit
    def run(flag):
        traces.append(flag)
        return layer.apply(variables, x, use_running_average=flag)

    for flag in (True, False):
        expected = layer.apply(variables, x, use_running_average=flag)
        assert_close(run(flag), expected, 1e-6)
    assert len(traces) == 1
    assert_identical(run(True)[1], variables)


@both
def test_unbiased_running_variance(api):
    """n / (n - 1) in the running variance alone, n counting valid elements."""
    x, mask = sample((5, 6)), jnp.asarray(np.arange(5)[:, None] < 4)
    layers = [batch_norm(api, "ours", unbiased=flag) for flag in (True, False)]
    variables, expected = initial(layers, x)
    assert_identical(variables, expected)
    for kwargs, count in (({}, 5), ({"mask": mask}, 4)):
        (y, new), (y_biased, _) = applied(layers, variables, x, **kwargs)
        assert_close(y, y_biased, 1e-6)
        var = 0.9 + 0.1 * np.var(np.asarray(x, np.float64)[:count], 0, ddof=1)
        assert_close(new["batch_stats"]["var"], var)


@both
def test_cumulative_average(api):
    """momentum=None: each batch counts the same, and those without values not."""
    layer, batches = api.ours("BatchNorm", momentum=None), []
    x, variables = sample(), layer.init(sample())
    stats = variables["batch_stats"]
    assert set(variables["batch_stats"]) == {"mean", "var", "count"}
    for step in range(4):
        x = sample(seed=step)
        exact = np.asarray(x, np.float64).reshape(-1, FEATURES)
        batches.append((exact.mean(0), exact.var(0)))
        mean, var = np.mean(batches, 0)
        previous = variables
        _, variables = layer.apply(variables, x)
        assert described(variables) == described(previous)
        stats = variables["batch_stats"]
        assert_close((stats["mean"], stats["var"]), (mean, var))
        assert np.all(np.asarray(stats["count"]) == step + 1)
        _, new = layer.apply(variables, x, mask=jnp.zeros(SHAPE, bool))
        assert_identical(new, variables)
    evaluate = {"use_running_average": True}
    y, _ = layer.with_(**evaluate).apply(variables, x)
    plain = {**variables, "batch_stats": {k: stats[k] for k in ("mean", "var")}}
    assert_close(y, api.theirs("BatchNorm", **evaluate).apply(plain, x)[0])


# Masks, and where Flax is wrong.


@names
@both
def test_masks_broadcast(api, name):
    """Every mask that NumPy broadcasts to x, also for group norm, of any dtype."""
    x, layer = sample(), api.ours(name)
    variables = layer.variables()

    def run(mask):
        return layer.apply(variables, x, mask=jnp.asarray(mask))

    shapes = [(4, 1, 1, 1), (1, 3, 4, 1), (6,), (4, 3, 1, 1), (4, 1), (1,), ()]
    for shape in shapes if name in ("BatchNorm", "GroupNorm") else shapes[:3]:
        mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 != 1
        assert_close(run(mask), run(np.broadcast_to(mask, SHAPE)), 1e-6)
    mask = np.asarray(sample_mask())
    expected = run(mask)
    for dtype in ("int32", "uint8", "float32"):
        assert_identical(run(mask.astype(dtype)), expected)
    outputs = [expected[0]]
    if name == "BatchNorm":
        layer = layer.with_(use_running_average=True)
        outputs.append(run(mask)[0])
    for y in outputs:
        assert np.array_equal(np.asarray(y) == 0, ~mask)


@both
def test_masked_rows_are_rows_removed(api):
    x = sample()
    mask = np.array([True, False, True, True])
    layer, reference = api.ours("BatchNorm"), api.theirs("BatchNorm")
    variables = reference.variables()
    y, new = layer.apply(variables, x, mask=jnp.asarray(mask[:, None, None, None]))
    expected = applied([reference], variables, np.asarray(x)[mask])
    assert_close([(np.asarray(y)[mask], new)], expected)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "one nan"])
@kinds
@both
def test_a_bad_batch_leaves_the_statistics(api, kind, bad, momentum):
    layer = batch_norm(api, kind, momentum=momentum)
    x, mask = np.array(sample()), np.full(SHAPE, bad != "masked")
    variables = layer.variables()
    if bad == "one nan":
        x[2, 1, 0, 3] = np.nan
    elif bad != "masked":
        x[:] = float(bad)
    y, new = layer.apply(variables, jnp.asarray(x), mask=jnp.asarray(mask))
    # So that the next good batch counts as if nothing had been.
    assert_identical(new, variables)
    if bad == "masked":
        assert np.all(np.asarray(y) == 0)


@pytest.mark.parametrize("unbiased", [False, True])
@both
def test_a_single_valid_value_leaves_finite_statistics(api, unbiased):
    """Known only at run time, so it cannot raise; n / (n - 1) must not divide by 0."""
    layer = batch_norm(api, "ours", unbiased=unbiased)
    mask = jnp.asarray(np.arange(np.prod(SHAPE)).reshape(SHAPE) // FEATURES == 2)
    found = layer.apply(layer.variables(), sample(), mask=mask)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "RMSNorm"])
@both
def test_variance_far_from_zero(api, name):
    """By default, too, where E[x^2] - E[x]^2 would give 0 or 8 instead of 4."""
    x = sample() + 1e4
    # The same float32 numbers without the offset: a reference without its roundoff.
    centred = jnp.asarray(np.asarray(x, np.float64) - 1e4, jnp.float32)
    assert np.array_equal(np.asarray(centred, np.float64) + 1e4, x)
    variables = api.ours(name).variables()
    variables["batch_stats"] = api.ours(name).init(x)["batch_stats"]
    y, new = api.ours(name).apply(variables, x)
    expected, expected_new = LINEN.theirs(name).apply(variables, centred)
    # The mean has float32's resolution at the offset: 1e-3, of a deviation of 2.
    assert_close(y, expected, 2e-3)
    if name == "BatchNorm":
        var, want = (v["batch_stats"]["var"] for v in (new, expected_new))
        assert_close(var, want, 1e-6)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 1, 6), (6,)], ids=str)
@both
def test_one_value_per_channel(api, shape):
    """Flax-named: Flax's output, a warning, the state as it was. Generic: an error."""
    x = sample(shape)
    layers = api.ours("BatchNorm"), api.theirs("BatchNorm")
    variables = layers[1].variables(x)
    # While initializing, nothing is said: warnings are errors here.
    initial([layers[0], api.generic("BatchNorm")], x)
    with pytest.warns(UserWarning) as record:
        (y, new), (expected, _) = applied(layers, variables, x)
    assert len(record) == 1
    assert_close(y, expected)
    assert_identical(new, variables)
    with pytest.raises(ValueError):
        api.generic("BatchNorm").apply(variables, x)
    # Evaluation on one example is what evaluation is for: nothing is said.
    layers = [layer.with_(use_running_average=True) for layer in layers]
    assert_close(*applied(layers, variables, x))


@both
def test_one_value_per_channel_is_said_once(api):
    """As often as Python shows a warning from one place, which is once."""
    x = sample((1, 6))
    variables = api.ours("BatchNorm").variables(x)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        for _ in range(3):
            api.ours("BatchNorm").apply(variables, x)
    assert [w.category for w in record] == [UserWarning]
