"""WeightNorm, WeightStandardization and SpectralNorm in both Flax APIs.

Flax Linen is the reference for the numbers. Flax stores normalized kernels, Linen where
it initializes, and NNX at every call; here no stored kernel ever changes by a call.
"""

import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")


class Net(nn.Module):
    """A layer in a layer, and parameters that are no kernels."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jnp.tanh(nn.Dense(4, name="first")(x)))


class Normed(nn.Module):
    """A layer that has statistics of its own."""

    @nn.compact
    def __call__(self, x):
        return jaxnorm.linen.BatchNorm(False, momentum=0.5)(nn.Dense(4)(x))


IMAGES, ROWS = (2, 4, 4, 3), (5, 3)

# Wrapper, its arguments, the layer, and the shape of the input.
CASES = [
    ("WeightNorm", {}, nn.Dense(4), ROWS),
    ("WeightNorm", {"epsilon": 1e-1}, nn.Conv(4, (2, 2)), IMAGES),
    ("WeightNorm", {"use_scale": False}, nn.ConvTranspose(4, (2, 2)), IMAGES),
    ("WeightNorm", {"feature_axes": (1, 2)}, nn.DenseGeneral((2, 2)), ROWS),
    ("WeightNorm", {"variable_filter": None}, Net(), ROWS),
    ("WeightNorm", {"variable_filter": ["first"], "feature_axes": None}, Net(), ROWS),
    ("WeightNorm", {"param_dtype": jnp.bfloat16}, nn.Dense(4), ROWS),
    ("WeightNorm", {"dtype": jnp.bfloat16}, nn.Dense(4), ROWS),
    ("SpectralNorm", {"error_on_non_matrix": True}, nn.Dense(4), ROWS),
    ("SpectralNorm", {"n_steps": 3}, nn.Conv(4, (2, 2)), IMAGES),
    ("SpectralNorm", {"collection_name": "spectra"}, Net(), ROWS),
    ("SpectralNorm", {"n_steps": 0}, nn.Dense(4), ROWS),
    ("SpectralNorm", {"dtype": jnp.bfloat16}, nn.Dense(4), ROWS),
]

cases = pytest.mark.parametrize(
    ("name", "kwargs", "layer", "shape"),
    CASES,
    ids=[f"{c[0]}-{c[1]}-{type(c[2]).__name__}" for c in CASES],
)
names = pytest.mark.parametrize("name", WRAPPERS)


def sample(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) + 0.3


def randomized(tree):
    """Arrays of the same shapes and dtypes, off their initial values."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(-1, 2, a.shape), a.dtype), tree
    )


def described(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def assert_close(got, want, tolerance=1e-5):
    """Equal trees of finite numbers, up to float32 roundoff."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.isfinite(g).all() and np.isfinite(w).all()
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def assert_identical(got, want):
    assert described(got) == described(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(g, w)


def linen(name, layer, lib=jaxnorm.linen, **kwargs):
    return getattr(lib, name)(layer, **kwargs)


def call_kwargs(name):
    return {"update_stats": True} if name == "SpectralNorm" else {}


def outcome(module, variables, x, mutable):
    """Output, updated collections, and gradients by the parameters and the input."""
    kwargs = call_kwargs(type(module).__name__)

    def loss(params, x):
        given = {**variables, "params": params}
        y, updated = module.apply(given, x, mutable=mutable, **kwargs)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updated)

    by = jax.grad(loss, (0, 1), has_aux=True)
    by, (y, updated) = by(variables["params"], x)
    return y, updated, by


def by_hand(name, kernel, sigma):
    """What a wrapper with its scale at 1 makes of a kernel."""
    if name == "SpectralNorm":
        return kernel / sigma
    if name == "WeightNorm":
        return jaxnorm.weight_norm(kernel)
    return jaxnorm.weight_standardize(kernel)


# Linen.


@cases
def test_linen_against_flax(name, kwargs, layer, shape):
    """The same variables, and from the same variables the same numbers."""
    x = sample(*shape)
    theirs, ours = (linen(name, layer, lib, **kwargs) for lib in (nn, jaxnorm.linen))
    stats = kwargs.get("collection_name", "batch_stats")

    def init(key):
        given = call_kwargs(name)
        return theirs.init(key, x, **given), ours.init(key, x, **given)

    @jax.jit
    def both(variables, x):
        with jax.numpy_rank_promotion("allow"):
            want = outcome(theirs, variables, x, [stats])
        return outcome(ours, variables, x, [stats, "params"]), want

    flax_variables, variables = jax.eval_shape(init, jax.random.key(0))
    if "dtype" in kwargs:
        # In which Flax stores the kernels that it has normalized.
        stored = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        flax_variables["params"]["layer_instance"] = stored
    assert described(variables) == described(flax_variables)
    (y, updated, by), want = both(randomized(variables), x)
    assert_identical(updated.pop("params"), randomized(variables)["params"])
    half = jnp.bfloat16 in kwargs.values()
    assert_close((y, updated, by), want, 2e-2 if half else 2e-5)


@names
def test_linen_init_stores_the_kernel_that_the_layer_would(name):
    x, key = sample(*ROWS), jax.random.key(0)

    class Model(nn.Module):
        wrapped: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            if not self.wrapped:
                return layer(x)
            return linen(name, layer)(x, **call_kwargs(name))

    @jax.jit
    def run(key):
        y, variables = Model(True).init_with_output(key, x)
        return y, variables, Model(False).init(key, x)

    y, variables, want = run(key)
    want = want["params"]["layer"]
    assert_identical(variables["params"]["layer"], want)
    # As Flax, init returns what comes of the normalized kernel.
    stats = variables.get("batch_stats", {}).get("SpectralNorm_0", {})
    kernel = by_hand(name, want["kernel"], stats.get("layer/kernel/sigma"))
    assert_close(y, x @ kernel)


@names
def test_linen_layer_with_statistics(name):
    """They follow what the normalized layer returns; Flax's WeightNorm raises."""
    x, module = sample(*ROWS), linen(name, Normed())

    @jax.jit
    def run(key):
        variables = module.init(key, x, **call_kwargs(name))
        return variables, module.apply(
            variables, x, mutable=["batch_stats"], **call_kwargs(name)
        )

    variables, (_, updated) = run(jax.random.key(0))
    kernel = variables["params"]["layer_instance"]["Dense_0"]["kernel"]
    stats = updated["batch_stats"]
    sigma = stats.get("layer_instance/Dense_0/kernel/sigma")
    y = np.asarray(x @ by_hand(name, kernel, sigma))
    want = {"mean": 0.5 * y.mean(0), "var": 0.5 + 0.5 * y.var(0)}
    assert_close(stats["layer_instance"]["BatchNorm_0"], want)


def test_linen_partitioned_parameters():
    """Flax's SpectralNorm does not take them."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = linen("SpectralNorm", nn.Dense(4, kernel_init=init))
    x = sample(*ROWS)
    _, variables = module.init_with_output(jax.random.key(0), x, update_stats=True)
    assert variables["params"]["layer_instance"]["kernel"].names == (None, "model")


@pytest.mark.parametrize(
    ("use_scale", "scaled"), [(False, False), (True, False), (True, True)]
)
def test_linen_weight_standardization(use_scale, scaled):
    """The layer on the kernel that the function returns; biases stay."""
    layer, x = nn.Conv(6, (3, 3), feature_group_count=3), sample(2, 4, 4, 6)
    kwargs = {"use_scale": use_scale, "scaled": scaled, "epsilon": 1e-2}
    module = jaxnorm.linen.WeightStandardization(layer, variable_filter=None, **kwargs)
    variables = randomized(jax.eval_shape(module.init, jax.random.key(0), x))
    params = {**variables["params"]}
    stored = params.pop("layer_instance")
    assert set(params) == ({"layer_instance/kernel/scale"} if use_scale else set())
    gain = params.get("layer_instance/kernel/scale")
    kernel = jaxnorm.weight_standardize(
        stored["kernel"], gain, epsilon=1e-2, scaled=scaled
    )
    want = layer.apply({"params": {**stored, "kernel": kernel}}, x)
    assert_close(jax.jit(module.apply)(variables, x), want)


def test_linen_weight_standardization_of_transposed_kernels():
    """feature_axes names the outputs where they are not last."""
    layer = nn.ConvTranspose(4, (3, 3), transpose_kernel=True)
    module = jaxnorm.linen.WeightStandardization(layer, feature_axes=-2)
    x = sample(*IMAGES)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    assert variables["params"]["layer_instance/kernel/scale"].shape == (4,)
    stored = variables["params"]["layer_instance"]
    kernel = jaxnorm.weight_standardize(stored["kernel"], feature_axes=-2)
    want = layer.apply({"params": {**stored, "kernel": kernel}}, x)
    assert_close(jax.jit(module.apply)(variables, x), want)


@names
def test_linen_training(name):
    """One step moves kernel and scale, and lowers the loss."""
    x, target = sample(8, 3), sample(8, 4, seed=1)
    module, kwargs = linen(name, nn.Dense(4)), call_kwargs(name)
    optimizer = optax.sgd(0.05)

    def loss(params, rest):
        y, rest = module.apply(
            {"params": params, **rest}, x, mutable=["batch_stats"], **kwargs
        )
        return jnp.mean((y - target) ** 2), rest

    @jax.jit
    def train(key):
        variables = module.init(key, x, **kwargs)
        params = variables.pop("params")
        value, rest = jax.value_and_grad(loss, has_aux=True)(params, variables)
        updates, _ = optimizer.update(rest, optimizer.init(params))
        moved = optax.apply_updates(params, updates)
        return params, moved, value[0], loss(moved, value[1])[0]

    params, moved, before, after = train(jax.random.key(0))
    assert after < before
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert np.all(old != new)


def test_linen_signatures():
    for name in ("WeightNorm", "SpectralNorm"):
        ours, theirs = getattr(jaxnorm.linen, name), getattr(nn, name)
        for function in ("__init__", "__call__"):
            mine, flax = (
                inspect.signature(getattr(c, function)).parameters
                for c in (ours, theirs)
            )
            assert list(mine) == list(flax)
            kinds = [(p.kind, p.default) for p in flax.values()]
            assert [(p.kind, p.default) for p in mine.values()] == kinds


# NNX.


class Block(nnx.Module):
    """A layer reached by two paths, statistics, random keys, and intermediates."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.tied = self.linear
        self.norm = jaxnorm.nnx.BatchNorm(4, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        y = self.tied(x)
        self.sow(nnx.Intermediate, "tied", y)
        return self.dropout(self.norm(y))


def wrapped(name, layer=None, lib=jaxnorm.nnx, **kwargs):
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0)) if layer is None else layer
    return getattr(lib, name)(layer, rngs=nnx.Rngs(1), **kwargs)


def plain(tree) -> dict[Any, Any]:
    """Paths and arrays of a module or state; keys are left out."""
    return {
        path: v.get_value() if isinstance(v, nnx.Variable) else v
        for path, v in nnx.to_flat_state(nnx.state(tree))
        if not isinstance(v, nnx.RngState)
    }


def moved(layer):
    """Every variable off its initial value."""
    state = nnx.state(layer, nnx.Not(nnx.RngState))
    nnx.update(layer, randomized(state))
    return layer


def linen_of(layer):
    """The Linen variables of a wrapped nnx.Linear or nnx.Conv."""
    params = {"layer_instance": {}}
    stats = {}
    for path, value in plain(layer).items():
        if path[0] == "scales":
            params["layer_instance/kernel/scale"] = value
        elif path[0] == "batch_stats":
            stats[f"layer_instance/kernel/{path[1][-1]}"] = value
        else:
            params["layer_instance"][path[1]] = value
    return {"params": params, "batch_stats": stats}


LAYERS = {
    "dense": (lambda r: nnx.Linear(3, 4, rngs=r), nn.Dense(4), ROWS),
    "conv": (lambda r: nnx.Conv(3, 4, (2, 2), rngs=r), nn.Conv(4, (2, 2)), IMAGES),
}


@pytest.mark.parametrize("kind", LAYERS)
@names
def test_nnx_is_linen(name, kind):
    """Output, gradients and updated variables, from the same variables."""
    make, layer, shape = LAYERS[kind]
    x = sample(*shape)
    model = moved(wrapped(name, make(nnx.Rngs(0))))
    variables = linen_of(model)
    before = plain(model)

    @nnx.jit
    def found(model, x):
        def loss(model, x):
            y = model(x)
            return jnp.sum(jnp.sin(y)), y

        by, y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
        return y, by

    y, (by_model, by_x) = found(model, x)
    run = jax.jit(
        functools.partial(outcome, linen(name, layer), mutable=["batch_stats"])
    )
    want, updated, (by_params, want_by_x) = run(variables, x)
    assert_close(y, want)
    assert_close(by_x, want_by_x)
    assert_close(linen_of(by_model)["params"], by_params)
    assert_close(linen_of(model)["batch_stats"], updated.get("batch_stats", {}))
    params = {p: v for p, v in plain(model).items() if p[0] != "batch_stats"}
    assert_identical(params, {p: before[p] for p in params})


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@names
def test_nnx_is_linen_in_half_precision(name, half):
    """Bit for bit, whichever of the arrays are in half precision."""
    x = sample(*ROWS).astype(half)
    model = moved(wrapped(name, param_dtype=half))
    layer = linen(name, nn.Dense(4))
    wide = linen_of(model)
    for variables in (wide, jax.tree.map(lambda a: a.astype(half), wide)):
        params, stats = variables["params"], variables["batch_stats"]
        for key in ("kernel", "bias"):
            value = params["layer_instance"][key]
            getattr(model.layer_instance, key).set_value(value)
        if name == "SpectralNorm":
            for path, v in model.batch_stats.items():
                v.set_value(stats[f"layer_instance/kernel/{path[-1]}"])
        for dtype in (None, half):
            model.dtype = dtype
            run = functools.partial(layer.clone(dtype=dtype).apply, variables)
            if name == "SpectralNorm":
                model.eval()
                run = functools.partial(run, update_stats=False)
            assert_identical(model(x), run(x))


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_nnx_against_flax(name):
    """Flax's numbers, before it overwrites the kernel, and its variables."""
    theirs, ours = wrapped(name, lib=nnx), wrapped(name)
    want = {p: v.shape for p, v in plain_or_raw(theirs).items()}
    assert {p: v.shape for p, v in plain(ours).items()} == want
    assert_close(ours(sample(*ROWS)), theirs(sample(*ROWS)))
    assert_close(
        plain(ours.batch_stats) if name == "SpectralNorm" else {}, stats(theirs)
    )


def plain_or_raw(model):
    """As `plain`; Flax 0.12.8 keeps scales as arrays."""
    return {
        path: v.get_value() if isinstance(v, nnx.Variable) else v
        for path, v in nnx.to_flat_state(nnx.state(model))
    }


def stats(model):
    return {p[1:]: v for p, v in plain_or_raw(model).items() if p[0] == "batch_stats"}


@names
def test_nnx_stores_nothing_but_state(name):
    """The parameters stay the objects, and the bits, that they were."""
    model, x = moved(wrapped(name)), sample(*ROWS)
    kernel = model.layer_instance.kernel
    before = plain(model)
    y = model(x)
    assert model.layer_instance.kernel is kernel
    after = plain(model)
    for path, value in before.items():
        assert np.array_equal(after[path], value) == (path[0] != "batch_stats")
    bare = model.layer_instance(x)
    assert not np.allclose(y, bare)
    if name != "SpectralNorm":
        assert np.array_equal(model(x), y)


def test_nnx_update_stats():
    """At the call, by train and eval, and by nnx.view."""
    x = sample(*ROWS)
    model = wrapped("SpectralNorm")
    viewed = nnx.view(model, use_running_average=True)
    for call, moves in (
        (lambda: model(x), True),
        (lambda: model(x, False), False),
        (lambda: (model.eval(), model(x)), False),
        (lambda: model(x, update_stats=True), True),
        (lambda: (model.train(), model(x)), True),
        (lambda: viewed(x), False),
    ):
        before = stats(model)
        call()
        for path, value in stats(model).items():
            assert np.array_equal(value, before[path]) != moves
    assert not stats(wrapped("SpectralNorm", n_steps=0))


@names
def test_nnx_gradient_by_the_input(name):
    """Of a closure, where nothing may be written, and where Flax raises."""
    model, x = moved(wrapped(name)), sample(*ROWS)
    model.eval()
    by_closure = jax.jit(jax.grad(lambda x: jnp.sum(model(x) ** 2)))(x)
    by_argument = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=1)(model, x)
    assert_close(by_closure, by_argument)
    assert_close(jax.jit(jax.vmap(model))(x), model(x))


@names
def test_nnx_layer_with_state(name):
    """Statistics, random keys and tied weights of the layer are its own."""
    x = sample(*ROWS)
    model, layer = wrapped(name, Block(nnx.Rngs(0))), Block(nnx.Rngs(0))
    y, sown = nnx.capture(model, nnx.Intermediate)(x)
    sigma = stats(model).get((("linear", "kernel", "sigma"),))
    layer.linear.kernel[...] = by_hand(name, layer.linear.kernel[...], sigma)
    want, want_sown = nnx.capture(layer, nnx.Intermediate)(x)
    assert_close(y, want)
    sown, want_sown = (jax.tree.leaves(nnx.to_pure_dict(s)) for s in (sown, want_sown))
    assert_close(sown, want_sown)
    for attribute in ("mean", "var"):
        found = getattr(model.layer_instance.norm, attribute)[...]
        assert_close(found, getattr(layer.norm, attribute)[...])
    counts = (nnx.state(m, nnx.RngCount) for m in (model.layer_instance, layer))
    assert [jax.tree.leaves(nnx.to_pure_dict(c)) for c in counts] == [[1], [1]]


@names
def test_nnx_layer_that_raises(name):
    class Broken(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(sample(3, 4))

        def __call__(self, x):
            raise RuntimeError("broken")

    model = wrapped(name, Broken())
    kernel, before = model.layer_instance.kernel, sample(3, 4)
    with pytest.raises(RuntimeError, match="broken"):
        model(sample(*ROWS))
    assert model.layer_instance.kernel is kernel
    assert np.array_equal(kernel[...], before)


@names
def test_nnx_training(name):
    """One step moves kernel and scale, which are nnx.Param, and lowers the loss."""
    x, target = sample(8, 3), sample(8, 4, seed=1)
    model = wrapped(name)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    before = plain(nnx.state(model, nnx.Param))
    assert any(p[0] == "scales" for p in before) == (name != "SpectralNorm")

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - target) ** 2)

        value, by = nnx.value_and_grad(loss)(model)
        optimizer.update(model, by)
        return value, loss(model)

    first, second = step(model, optimizer)
    assert second < first
    for path, value in plain(nnx.state(model, nnx.Param)).items():
        assert np.all(value != before[path])


@names
def test_nnx_split_and_merge(name):
    model, x = moved(wrapped(name)), sample(*ROWS)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert graphdef == nnx.graphdef(wrapped(name))
    copy = nnx.merge(graphdef, params, rest)
    assert_close(nnx.clone(copy)(x), model(x))


def test_nnx_scales():
    """Of param_dtype and from scale_init; Flax's take neither."""
    init = nnx.initializers.normal()
    for name in ("WeightNorm", "WeightStandardization"):
        for axes, shape in ((-1, (4,)), (None, ()), ((0, 1), (3, 4))):
            model = wrapped(
                name, param_dtype=jnp.bfloat16, scale_init=init, feature_axes=axes
            )
            scale = model.scales[("kernel",)]
            assert isinstance(scale, nnx.Param)
            assert (scale.shape, scale.dtype) == (shape, jnp.bfloat16)
            assert np.any(scale[...] != 1)
        model = wrapped(name, use_scale=False)
        assert model.scales is None
        assert model(sample(*ROWS)).shape == (5, 4)


def test_nnx_dtype_and_filter():
    x = sample(*ROWS).astype(jnp.bfloat16)
    for name in WRAPPERS:
        layer = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        assert wrapped(name, layer)(x).dtype == jnp.float32
        assert wrapped(name, layer, dtype=jnp.bfloat16)(x).dtype == jnp.bfloat16
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    everything = wrapped("WeightNorm", layer, variable_filter=...)
    assert set(everything.scales) == {("kernel",), ("bias",)}
    everything = wrapped("WeightStandardization", layer, variable_filter=...)
    assert set(everything.scales) == {("kernel",)}


def test_nnx_signatures():
    for name in ("WeightNorm", "SpectralNorm"):
        ours, theirs = getattr(jaxnorm.nnx, name), getattr(nnx, name)
        mine, flax = (inspect.signature(c.__init__) for c in (ours, theirs))
        assert mine.parameters == flax.parameters
        mine, flax = (inspect.signature(c.__call__) for c in (ours, theirs))
        extra = [n for n in mine.parameters if n not in flax.parameters]
        assert [n for n in mine.parameters if n not in extra] == list(flax.parameters)
        assert extra == ([] if name == "WeightNorm" else ["kwargs"])


# Errors.


def test_errors():
    x = sample(*IMAGES)
    conv = nn.Conv(4, (3, 3))
    with pytest.raises(ValueError, match=r"error_on_non_matrix .*\(3, 3, 3, 4\) is no"):
        linen("SpectralNorm", conv, error_on_non_matrix=True).init(
            jax.random.key(0), x, update_stats=True
        )
    with pytest.raises(ValueError, match="error_on_non_matrix"):
        layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        wrapped("SpectralNorm", layer, error_on_non_matrix=True)(x)
    for name in WRAPPERS:
        model = wrapped(name)
        model.layer_instance.other_kernel = nnx.Param(jnp.ones((2, 2)))
        model.layer_instance.kernel = nnx.Param(jnp.ones((3, 4)))
        if name == "SpectralNorm":
            with pytest.raises(ValueError, match="nothing is kept for the .* other_k"):
                model(sample(*ROWS))
        else:
            assert model(sample(*ROWS)).shape == (5, 4)
    with pytest.raises(ValueError, match="feature_axes=4 is out of range"):
        wrapped("WeightNorm", feature_axes=4)
