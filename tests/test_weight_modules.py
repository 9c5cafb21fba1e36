"""WeightNorm, WeightStandardization and SpectralNorm in both Flax APIs.

Flax Linen is the reference for the numbers. Flax stores normalized kernels, Linen where
it initializes, and NNX at every call; here no stored kernel ever changes by a call.
"""

import functools
import inspect
from typing import Any

import apis
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from apis import LINEN, NNX, LinenLayer, NNXLayer, assert_identical, both, sample
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")
IMAGES, ROWS = (2, 4, 4, 3), (5, 3)


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


def layer_of_both(name, *linen, shape, **kwargs):
    """A layer of Linen, and how to make that of NNX, for inputs of 3 features."""
    args = 3, *linen
    return (
        getattr(nn, "Dense" if name == "Linear" else name)(*linen, **kwargs),
        functools.partial(getattr(nnx, name), *args, **kwargs),
        shape,
    )


# Layers of Linen, those of NNX that are alike, and the shape of the input.
LAYERS: dict[str, Any] = {
    "dense": layer_of_both("Linear", 4, shape=ROWS),
    "conv": layer_of_both("Conv", 4, (2, 2), shape=IMAGES),
    "groups": layer_of_both("Conv", 6, (3, 3), feature_group_count=3, shape=IMAGES),
    "back": layer_of_both(
        "ConvTranspose", 4, (3, 3), transpose_kernel=True, shape=IMAGES
    ),
    "transposed": (nn.ConvTranspose(4, (2, 2)), None, IMAGES),
    "general": (nn.DenseGeneral((2, 2)), None, ROWS),
    "net": (Net(), None, ROWS),
    "normed": (Normed(), None, ROWS),
}
# Wrapper, its arguments, and the layer.
CASES = [
    ("WeightNorm", {}, "dense"),
    ("WeightNorm", {"epsilon": 1e-1}, "conv"),
    ("WeightNorm", {"param_dtype": jnp.bfloat16}, "dense"),
    ("WeightNorm", {"dtype": jnp.bfloat16}, "dense"),
    ("WeightStandardization", {}, "dense"),
    ("WeightStandardization", {"use_scale": False, "epsilon": 1e-2}, "groups"),
    ("WeightStandardization", {"epsilon": 1e-2}, "groups"),
    ("WeightStandardization", {"scaled": True}, "groups"),
    # feature_axes names the outputs where they are not last.
    ("WeightStandardization", {"feature_axes": -2}, "back"),
    ("SpectralNorm", {"error_on_non_matrix": True}, "dense"),
    ("SpectralNorm", {"n_steps": 3}, "conv"),
    ("SpectralNorm", {"n_steps": 0}, "dense"),
    ("SpectralNorm", {"dtype": jnp.bfloat16}, "dense"),
]
LINEN_CASES = [
    ("WeightNorm", {"use_scale": False}, "transposed"),
    ("WeightNorm", {"feature_axes": (1, 2)}, "general"),
    ("WeightNorm", {"variable_filter": None}, "net"),
    ("WeightNorm", {"variable_filter": ["first"], "feature_axes": None}, "net"),
    ("WeightStandardization", {"variable_filter": None, "scaled": True}, "groups"),
    ("SpectralNorm", {"collection_name": "spectra"}, "net"),
]
cases = pytest.mark.parametrize(
    ("api", "name", "kwargs", "layer"),
    [(a, *case) for a in (LINEN, NNX) for case in CASES]
    + [(LINEN, *case) for case in LINEN_CASES],
    ids=str,
)
names = pytest.mark.parametrize("name", WRAPPERS)


class LinenWrapper(LinenLayer):
    @property
    def call(self):
        return {"update_stats": True} if self.name == "SpectralNorm" else {}

    def output(self, x, **call):
        return super().output(x, **self.call, **call)

    def apply(self, variables, x, **call):
        mutable = ["batch_stats", "spectra", "params"]
        call = {**self.call, **call}
        with self.promotion():
            y, new = self.make().apply(variables, x, mutable=mutable, **call)
        return y, {**variables, **new}


class NNXWrapper(NNXLayer):
    """With the variables under the names that they have in Linen."""

    def make(self):
        layer = self.kwargs["layer_instance"](rngs=nnx.Rngs(0))
        return model(self.name, **{**self.kwargs, "layer_instance": layer})

    def read(self, module):
        variables: dict[str, Any] = {
            "params": {"layer_instance": {}},
            "batch_stats": {},
        }
        for path, v in nnx.to_flat_state(nnx.state(module)):
            into, name = place(variables, path)
            into[name] = v.get_value()
        return variables

    def write(self, module, variables):
        given = []
        for path, v in nnx.to_flat_state(nnx.state(module)):
            kept, name = place(variables, path)
            given.append((path, v.replace(kept[name])))
        nnx.update(module, nnx.from_flat_state(given))


def place(variables, path):
    """Where Linen has what NNX has at this path: in which dict, by which name."""
    if path[0] == "layer_instance":
        return variables["params"]["layer_instance"], path[1]
    if path[0] == "scales":
        return variables["params"], "layer_instance/kernel/scale"
    return variables["batch_stats"], "/".join(["layer_instance", *path[1]])


def wrapped(api, name, layer: Any = "dense", lib=None, **kwargs) -> Any:
    """The wrapper `name` of a layer, of jaxnorm's unless `lib` is Flax's."""
    linen, alike, _ = LAYERS[layer] if isinstance(layer, str) else (layer, layer, None)
    kwargs["layer_instance"] = linen if api is LINEN else alike
    kind = LinenWrapper if api is LINEN else NNXWrapper
    return kind(lib or api.own, name, kwargs)


def model(name, layer_instance=None, lib=jaxnorm.nnx, **kwargs):
    """One of NNX, ready to be called."""
    layer = layer_instance or nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return getattr(lib, name)(layer, rngs=nnx.Rngs(1), **kwargs)


def randomized(tree):
    """Arrays of the same shapes and dtypes, off their initial values."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(-1, 2, a.shape).astype(a.dtype)), tree
    )


def described(tree):
    return jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)


def assert_close(got, want, tolerance=1e-5):
    assert described(got) == described(want)
    apis.assert_close(got, want, tolerance)


def by_hand(name, kernel, sigma, **kwargs):
    """What a wrapper makes of a kernel."""
    if name == "SpectralNorm":
        return kernel / sigma
    if name == "WeightNorm":
        return jaxnorm.weight_norm(kernel, **kwargs)
    return jaxnorm.weight_standardize(kernel, **kwargs)


class Standardized:
    """A Linen layer on the kernel that the function returns; biases stay."""

    def __init__(self, layer, use_scale=True, variable_filter=None, **kwargs):
        self.layer, self.use_scale, self.kwargs = layer, use_scale, kwargs

    def init(self, x):
        stored = self.layer.init(jax.random.key(0), x)["params"]
        features = stored["kernel"].shape[self.kwargs.get("feature_axes", -1)]
        gain = {"layer_instance/kernel/scale": jnp.ones(features)}
        params = {"layer_instance": stored, **(gain if self.use_scale else {})}
        return {"params": params, "batch_stats": {}}

    def apply(self, variables, x):
        stored = variables["params"]["layer_instance"]
        gain = variables["params"].get("layer_instance/kernel/scale")
        settings = {"epsilon": 1e-6, **self.kwargs}
        kernel = jaxnorm.weight_standardize(stored["kernel"], gain, **settings)
        params = {**stored, "kernel": kernel}
        return self.layer.apply({"params": params}, x), variables


@cases
def test_numbers(api, name, kwargs, layer):
    """The variables of Flax, and from the same variables the same numbers: output,
    updates, and gradients by parameters and input. Stored parameters stay."""
    linen, _, shape = LAYERS[layer]
    x = sample(shape)
    wrapper = wrapped(api, name, layer, **kwargs)
    if name == "WeightStandardization":
        reference: Any = Standardized(linen, **kwargs)
    else:
        reference = wrapped(LINEN, name, layer, nn, **kwargs)

    def outcome(layer, variables, x):
        def loss(params, x):
            y, new = layer.apply({**variables, "params": params}, x)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, new)

        by = jax.grad(loss, (0, 1), has_aux=True)
        by, (y, new) = by(variables["params"], x)
        return (y, by), new

    @jax.jit
    def run(variables, x):
        return [outcome(layer, variables, x) for layer in (wrapper, reference)]

    variables = jax.eval_shape(wrapper.init, x)
    expected = jax.eval_shape(reference.init, x)
    if "dtype" in kwargs:
        # In which Flax stores the kernels that it has normalized.
        stored = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
        expected["params"]["layer_instance"] = stored
    assert described(variables) == described(expected)
    variables = randomized(variables)
    (found, new), (want, expected) = run(variables, x)
    half = jnp.bfloat16 in kwargs.values()
    tolerance = 2e-2 if half else 1e-5
    assert_close(found, want, tolerance)
    assert_identical(new.pop("params"), variables["params"])
    del expected["params"]
    assert_close(new, expected, tolerance)


@names
@both
def test_training(api, name):
    """One step moves kernel and scale, and lowers the loss."""
    layer, x, target = wrapped(api, name), sample((8, 3)), sample((8, 4), seed=1)

    @jax.jit
    def train():
        def loss(params, variables):
            y, new = layer.apply({**variables, "params": params}, x)
            return jnp.mean((y - target) ** 2), new

        variables = layer.init(x)
        by = jax.value_and_grad(loss, has_aux=True)
        (before, new), by = by(variables["params"], variables)
        moved = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], by)
        return variables["params"], moved, before, loss(moved, new)[0]

    params, moved, before, after = train()
    assert ("layer_instance/kernel/scale" in params) == (name != "SpectralNorm")
    assert after < before
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        assert np.all(old != new)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@names
def test_half_precision(name, half):
    """Bit for bit the same in both APIs, whichever arrays are in half precision."""
    x = sample(ROWS).astype(half)
    wide = randomized(jax.eval_shape(wrapped(LINEN, name).init, x))
    narrow = jax.tree.map(lambda a: a.astype(half), wide)

    @functools.partial(jax.jit, static_argnums=0)
    def run(api, *states):
        return [
            wrapped(api, name, dtype=dtype, param_dtype=half).apply(variables, x)
            for variables in states
            for dtype in (None, half)
        ]

    assert_identical(run(NNX, wide, narrow), run(LINEN, wide, narrow))


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
@both
def test_signatures(api, name):
    """Those of Flax; NNX's SpectralNorm passes keyword arguments on, too."""
    own, flax = getattr(api.own, name), getattr(api.flax, name)
    for function in ("__init__", "__call__"):
        mine, theirs = (
            inspect.signature(getattr(c, function)).parameters for c in (own, flax)
        )
        more = [n for n in mine if n not in theirs]
        passed_on = api is NNX and (name, function) == ("SpectralNorm", "__call__")
        assert more == (["kwargs"] if passed_on else [])
        assert [n for n in mine if n not in more] == list(theirs)
        kinds = [(p.kind, p.default) for p in theirs.values()]
        assert [(mine[n].kind, mine[n].default) for n in theirs] == kinds


@both
def test_a_kernel_that_is_no_matrix(api):
    layer = wrapped(api, "SpectralNorm", "conv", error_on_non_matrix=True)
    told = r"error_on_non_matrix .*\(2, 2, 3, 4\) is no"
    # In NNX, the constructor of Flax is the first to raise.
    with pytest.raises(ValueError, match=told if api is LINEN else "error_on_non_mat"):
        jax.eval_shape(layer.output, sample(IMAGES))


# Linen.


@names
def test_linen_init_stores_the_kernel_that_the_layer_would(name):
    x = sample(ROWS)
    call = wrapped(LINEN, name).call

    class Model(nn.Module):
        wrapped: bool

        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="layer")
            if not self.wrapped:
                return layer(x)
            return getattr(jaxnorm.linen, name)(layer)(x, **call)

    @jax.jit
    def run(key):
        y, variables = Model(True).init_with_output(key, x)
        return y, variables, Model(False).init(key, x)

    y, variables, want = run(jax.random.key(0))
    want = want["params"]["layer"]
    assert_identical(variables["params"]["layer"], want)
    # As Flax, init returns what comes of the normalized kernel.
    stats = variables.get("batch_stats", {}).get("SpectralNorm_0", {})
    kernel = by_hand(name, want["kernel"], stats.get("layer/kernel/sigma"))
    assert_close(y, x @ kernel)


@names
def test_linen_layer_with_statistics(name):
    """They follow what the normalized layer returns; Flax's WeightNorm raises."""
    x, layer = sample(ROWS), wrapped(LINEN, name, "normed")

    @jax.jit
    def run():
        variables = layer.init(x)
        return variables["params"], layer.apply(variables, x)[1]["batch_stats"]

    params, stats = run()
    kernel = params["layer_instance"]["Dense_0"]["kernel"]
    sigma = stats.get("layer_instance/Dense_0/kernel/sigma")
    y = np.asarray(x @ by_hand(name, kernel, sigma))
    want = {"mean": 0.5 * y.mean(0), "var": 0.5 + 0.5 * y.var(0)}
    assert_close(stats["layer_instance"]["BatchNorm_0"], want)


def test_linen_partitioned_parameters():
    """Flax's SpectralNorm does not take them."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = wrapped(LINEN, "SpectralNorm", nn.Dense(4, kernel_init=init))
    variables = jax.eval_shape(layer.init, sample(ROWS))
    assert variables["params"]["layer_instance"]["kernel"].names == (None, "model")


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


def plain(tree) -> dict[Any, Any]:
    """Paths and arrays of a module or state; Flax 0.12.8 keeps scales as arrays."""
    return {
        path: v.get_value() if isinstance(v, nnx.Variable) else v
        for path, v in nnx.to_flat_state(nnx.state(tree))
    }


def stats(model):
    return {p[1:]: v for p, v in plain(model).items() if p[0] == "batch_stats"}


def moved(layer):
    """Every variable off its initial value."""
    nnx.update(layer, randomized(nnx.state(layer)))
    return layer


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_nnx_against_flax(name):
    """Flax's numbers, before it overwrites the kernel, and its variables."""
    theirs, ours = model(name, lib=nnx), model(name)
    shapes = [{p: v.shape for p, v in plain(m).items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert_close(ours(sample(ROWS)), theirs(sample(ROWS)))
    assert_close(stats(ours), stats(theirs))


@names
def test_nnx_stores_nothing_but_state(name):
    """The parameters stay the objects, and the bits, that they were."""
    layer, x = moved(model(name)), sample(ROWS)
    kernel = layer.layer_instance.kernel
    before = plain(layer)
    y = layer(x)
    assert layer.layer_instance.kernel is kernel
    after = plain(layer)
    for path, value in before.items():
        assert np.array_equal(after[path], value) == (path[0] != "batch_stats")
    assert not np.allclose(y, layer.layer_instance(x))
    if name != "SpectralNorm":
        assert np.array_equal(layer(x), y)
    # Of a closure, where nothing may be written, and where Flax raises.
    layer.eval()
    by_closure, mapped = jax.jit(
        lambda x: (jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x), jax.vmap(layer)(x))
    )(x)
    by_argument = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=1)(layer, x)
    assert_close((by_closure, mapped), (by_argument, layer(x)))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    fresh = model(name)
    fresh.eval()
    assert graphdef == nnx.graphdef(fresh)
    copy = nnx.clone(nnx.merge(graphdef, params, rest))
    assert_close(copy(x), layer(x))


def test_nnx_update_stats():
    """At the call, by train and eval, and by nnx.view."""
    x = sample(ROWS)
    layer = model("SpectralNorm")
    viewed = nnx.view(layer, use_running_average=True)
    for call, moves in (
        (lambda: layer(x), True),
        (lambda: layer(x, False), False),
        (lambda: (layer.eval(), layer(x)), False),
        (lambda: layer(x, update_stats=True), True),
        (lambda: (layer.train(), layer(x)), True),
        (lambda: viewed(x), False),
    ):
        before = stats(layer)
        call()
        for path, value in stats(layer).items():
            assert np.array_equal(value, before[path]) != moves
    assert not stats(model("SpectralNorm", n_steps=0))


@names
def test_nnx_layer_with_state(name):
    """Statistics, random keys and tied weights of the layer are its own."""
    x = sample(ROWS)
    wrapper, layer = model(name, Block(nnx.Rngs(0))), Block(nnx.Rngs(0))
    y, sown = nnx.capture(wrapper, nnx.Intermediate)(x)
    sigma = stats(wrapper).get((("linear", "kernel", "sigma"),))
    layer.linear.kernel[...] = by_hand(name, layer.linear.kernel[...], sigma)
    want, want_sown = nnx.capture(layer, nnx.Intermediate)(x)
    assert_close(y, want)
    sown, want_sown = (jax.tree.leaves(nnx.to_pure_dict(s)) for s in (sown, want_sown))
    assert_close(sown, want_sown)
    for attribute in ("mean", "var"):
        found = getattr(wrapper.layer_instance.norm, attribute)[...]
        assert_close(found, getattr(layer.norm, attribute)[...])
    counts = (nnx.state(m, nnx.RngCount) for m in (wrapper.layer_instance, layer))
    assert [jax.tree.leaves(nnx.to_pure_dict(c)) for c in counts] == [[1], [1]]


@names
def test_nnx_layer_that_raises(name):
    class Broken(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(sample((3, 4)))

        def __call__(self, x):
            raise RuntimeError("broken")

    layer = model(name, Broken())
    kernel, before = layer.layer_instance.kernel, sample((3, 4))
    with pytest.raises(RuntimeError, match="broken"):
        layer(sample(ROWS))
    assert layer.layer_instance.kernel is kernel
    assert np.array_equal(kernel[...], before)


@names
def test_nnx_optimizer(name):
    """Kernel and scale are nnx.Param, which an optimizer moves."""
    layer = model(name)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.01), wrt=nnx.Param)
    before = plain(nnx.state(layer, nnx.Param))
    assert any(p[0] == "scales" for p in before) == (name != "SpectralNorm")

    @nnx.jit
    def step(layer, optimizer):
        x, target = sample((8, 3)), sample((8, 4), seed=1)
        by = nnx.grad(lambda layer: jnp.mean((layer(x) - target) ** 2))(layer)
        optimizer.update(layer, by)

    step(layer, optimizer)
    for path, value in plain(nnx.state(layer, nnx.Param)).items():
        assert np.all(value != before[path])


def test_nnx_scales():
    """Of param_dtype and from scale_init; Flax's take neither."""
    init = nnx.initializers.normal()
    for name in ("WeightNorm", "WeightStandardization"):
        for axes, shape in ((-1, (4,)), (None, ()), ((0, 1), (3, 4))):
            layer = model(
                name, param_dtype=jnp.bfloat16, scale_init=init, feature_axes=axes
            )
            scale = layer.scales[("kernel",)]
            assert isinstance(scale, nnx.Param)
            assert (scale.shape, scale.dtype) == (shape, jnp.bfloat16)
            assert np.any(scale[...] != 1)
        layer = model(name, use_scale=False)
        assert layer.scales is None
        assert layer(sample(ROWS)).shape == (5, 4)


def test_nnx_dtype_and_filter():
    x = sample(ROWS).astype(jnp.bfloat16)
    for name in WRAPPERS:
        layer = nnx.Linear(3, 4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        for dtype, expected in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
            assert model(name, layer, dtype=dtype)(x).dtype == expected
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    everything = model("WeightNorm", layer, variable_filter=...)
    assert set(everything.scales) == {("kernel",), ("bias",)}
    everything = model("WeightStandardization", layer, variable_filter=...)
    assert set(everything.scales) == {("kernel",)}


@names
def test_nnx_parameters_that_come_later(name):
    layer = model(name)
    layer.layer_instance.other_kernel = nnx.Param(jnp.ones((2, 2)))
    layer.layer_instance.kernel = nnx.Param(jnp.ones((3, 4)))
    if name == "SpectralNorm":
        with pytest.raises(ValueError, match="nothing is kept for the .* other_k"):
            layer(sample(ROWS))
    else:
        assert layer(sample(ROWS)).shape == (5, 4)


def test_nnx_axes_out_of_range():
    with pytest.raises(ValueError, match="feature_axes=4 is out of range"):
        model("WeightNorm", feature_axes=4)
