"""Folding: the folded model is the model, and what is not exact is no pair."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze as frozen_dict
from jax.ad_checkpoint import checkpoint_name

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.models import Pair, affine_form, find_pairs, fold, fold_input, fold_output
from jaxnorm.models._paths import path_name
from jaxnorm.nnx._fold import Identity

IN, OUT = 4, 6
BF16 = 2.0**-8  # the largest relative error of rounding to bfloat16


def drawn(tree, seed=0):
    """Values as of a trained model: means of order 1, variances from 0.1 to 10."""
    rng = np.random.default_rng(seed)

    def draw(path, v):
        name = path_name(path).rpartition("/")[2]
        value = rng.normal(size=v.shape)
        if name == "var":
            value = 10 ** rng.uniform(-1, 1, v.shape)
        if name == "scale":
            value = rng.uniform(0.5, 2, v.shape) * rng.choice([-1, 1], v.shape)
        return jnp.asarray(value, v.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def sample(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def assert_same(actual, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest value."""
    actual, expected = (np.asarray(v, np.float64) for v in (actual, expected))
    assert np.isfinite(actual).all() and np.abs(expected).max() > 0.1
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def exact(v):
    return np.asarray(v, np.float64)


# ---- Layers -----------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(), ("scale",), ("bias",), ("scale", "bias")])
@pytest.mark.parametrize("kept", [("mean", "var"), ("var",)])
def test_affine_form(absent, kept):
    params, stats = drawn(
        (
            {"scale": jnp.ones(5), "bias": jnp.ones(5)},
            jaxnorm.init_stats(5, stat_names=kept),
        )
    )
    params = {k: v for k, v in params.items() if k not in absent}
    given = {"scale": None, "bias": None} | params | {"control": jnp.ones(5)}
    a, b = affine_form(given if len(absent) == 1 else params, stats, epsilon=0.1)
    scale = exact(params.get("scale", 1)) / np.sqrt(exact(stats["var"]) + 0.1)
    np.testing.assert_allclose(a, scale, rtol=1e-6)
    shift = exact(params.get("bias", 0)) - exact(stats.get("mean", 0)) * scale
    np.testing.assert_allclose(b, shift, rtol=1e-5, atol=1e-6)


def test_affine_form_is_in_float32_at_least():
    half = {"scale": jnp.ones(2, jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)}
    stats = {"var": jnp.full(2, 2, jnp.bfloat16)}
    for v in affine_form(half, stats, epsilon=1e-5):
        assert v.dtype == jnp.float32


LAYERS: dict[str, tuple[Callable[..., Any], dict[str, Any], bool]] = {
    # The layer, what it is, and whether it pads nothing.
    "dense": (nn.Dense, {}, True),
    "conv": (nn.Conv, {"kernel_size": (3, 3)}, False),
    "even and strided": (nn.Conv, {"kernel_size": (2, 4), "strides": 2}, False),
    "dilated": (nn.Conv, {"kernel_size": (3, 2), "kernel_dilation": 2}, False),
    "input dilated": (
        nn.Conv,
        {"kernel_size": (3, 3), "padding": 0, "input_dilation": (2, 2)},
        False,
    ),
    "one by one": (nn.Conv, {"kernel_size": (1, 1)}, True),
    "valid": (nn.Conv, {"kernel_size": (3, 3), "padding": "VALID"}, True),
    "circular": (nn.Conv, {"kernel_size": (3, 3), "padding": "CIRCULAR"}, False),
    "valid and dilated": (
        nn.Conv,
        {"kernel_size": (2, 2), "padding": 0, "kernel_dilation": 2, "strides": 2},
        True,
    ),
    "grouped": (nn.Conv, {"kernel_size": (3, 3), "feature_group_count": 2}, False),
    "grouped and valid": (
        nn.Conv,
        {"kernel_size": (3, 3), "padding": "VALID", "feature_group_count": 2},
        True,
    ),
    "depthwise": (
        nn.Conv,
        {"kernel_size": (3, 3), "feature_group_count": IN, "features": 2 * IN},
        False,
    ),
    "depthwise and valid": (
        nn.Conv,
        {
            "kernel_size": (3, 3),
            "feature_group_count": IN,
            "features": 2 * IN,
            "padding": "VALID",
        },
        True,
    ),
    "transposed": (nn.ConvTranspose, {"kernel_size": (3, 2), "strides": 2}, False),
    "transposed and dilated": (
        nn.ConvTranspose,
        {"kernel_size": (3, 3), "strides": (2, 2), "kernel_dilation": 2},
        False,
    ),
    "transposed, valid": (
        nn.ConvTranspose,
        {"kernel_size": (3, 3), "padding": "VALID"},
        False,
    ),
    "transposed kernel": (
        nn.ConvTranspose,
        {"kernel_size": (3, 3), "strides": (2, 2), "transpose_kernel": True},
        False,
    ),
    "square transposed kernel": (
        nn.ConvTranspose,
        {"kernel_size": (3, 3), "transpose_kernel": True, "features": IN},
        False,
    ),
}
layers = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, use_bias, **kwargs):
    kind, settings, _ = LAYERS[name]
    return kind(**{"features": OUT, "use_bias": use_bias, **settings, **kwargs})


def transposed_kernel(name):
    return LAYERS[name][1].get("transpose_kernel", False)


def with_layer(name, use_bias, **kwargs):
    layer, x = layer_of(name, use_bias, **kwargs), sample(2, 6, 5, IN)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    return layer, drawn(variables)["params"], x


def form(features, shift=True):
    params, stats = drawn(
        ({"scale": jnp.ones(features), "bias": jnp.ones(features)}, {})
    )
    a, b = params["scale"], params["bias"]
    return a, b if shift else jnp.zeros_like(b)


@layers
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_norm_after_a_layer(name, use_bias):
    layer, params, x = with_layer(name, use_bias)
    a, b = form(layer.features)
    y = jax.jit(layer.apply)({"params": params}, x)
    axis = -2 if transposed_kernel(name) else -1
    folded = jax.jit(functools.partial(fold_output, axis=axis))(params, a, b)
    with_bias = layer_of(name, True)
    got = jax.jit(with_bias.apply)({"params": folded}, x)
    assert_same(got, exact(y) * exact(a) + exact(b))


def along(v):
    return v.reshape(1, 1, 1, -1)


@layers
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_norm_before_a_layer(name, use_bias):
    layer, params, x = with_layer(name, use_bias)
    pads_nothing = LAYERS[name][2]
    a, b = form(IN, shift=pads_nothing)
    y = jax.jit(layer.apply)({"params": params}, x * along(a) + along(b))
    folded = fold_input(
        params,
        a,
        b,
        axis=-1 if transposed_kernel(name) else -2,
        groups=LAYERS[name][1].get("feature_group_count", 1),
        padded=None if name == "dense" else not pads_nothing,
    )
    got = jax.jit(layer_of(name, True).apply)({"params": folded}, x)
    assert_same(got, y)


@pytest.mark.parametrize("folding", [fold_output, fold_input])
def test_bfloat16_kernels_are_rounded_once(folding):
    rng = np.random.default_rng(0)
    layer = {
        "kernel": jnp.asarray(rng.normal(size=(IN, OUT)), jnp.bfloat16),
        "bias": jnp.asarray(rng.normal(size=OUT), jnp.bfloat16),
    }
    a, b = form(OUT if folding is fold_output else IN)
    got = folding(layer, a, b)
    wide = folding({k: v.astype(jnp.float32) for k, v in layer.items()}, a, b)
    for k in layer:
        assert got[k].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[k], wide[k].astype(jnp.bfloat16))
    assert folding({"kernel": layer["kernel"]}, a, b)["bias"].dtype == jnp.bfloat16


def test_a_layer_keeps_what_else_it_holds():
    layer = {"kernel": np.ones((IN, OUT), np.float32), "mask": jnp.ones(3)}
    kept = fold_output(layer, *form(OUT))["mask"]
    np.testing.assert_array_equal(kept, layer["mask"])
    assert kept is not layer["mask"]


ONES = {"kernel": jnp.ones((3, 3, IN, OUT))}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fold_output(ONES, *form(5)), r"5 features.* axis -1 .*\(3, 3, 4, 6\)"),
        (lambda: fold_output(ONES, *form(OUT), axis=4), "no axis 4"),
        (lambda: fold_output(ONES, jnp.ones((2, 3)), jnp.ones((2, 3))), "on one axis"),
        (lambda: fold_output(ONES, jnp.ones(6), jnp.ones(1)), r"\(6,\) and \(1,\)"),
        (
            lambda: fold_output(ONES | {"bias": jnp.ones(5)}, *form(OUT)),
            r"6 output features, but a bias of shape \(5,\)",
        ),
        (lambda: fold_input(ONES, *form(8), padded=False), "or groups=2 for a norm"),
        (lambda: fold_input(ONES, *form(16), groups=4, padded=False), "not divide"),
        (lambda: fold_input(ONES, *form(3), axis=0), "on axis -2 or -1"),
        (lambda: fold_input(ONES, *form(IN)), "zeros that pad.*padded=False"),
        (lambda: jax.jit(fold_input)(ONES, *form(IN, False)), "not known to be 0"),
        (
            lambda: affine_form({"slope": jnp.ones(2)}, {"var": 1.0}, epsilon=0),
            r"\['slope'\] is not affine",
        ),
        (lambda: affine_form({}, {"mean": 1.0}, epsilon=0), "variance.*'mean'"),
        (lambda: affine_form({}, {"var": 1.0}, epsilon=-1), "negative, got -1"),
    ],
)
def test_what_does_not_fit_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- Whole trees ------------------------------------------------------------------


class Net(nn.Module):
    """A model with norms or, as its folded variables need it, without."""

    body: Callable[..., Any]
    kind: Any = jaxnorm.linen.BatchNorm
    norms: bool = True

    @nn.compact
    def __call__(self, x):
        return self.body(self, x)

    def norm(self, x, name=None, **kwargs):
        if not self.norms:
            return x
        return self.kind(use_running_average=True, name=name, **kwargs)(x)

    def conv(self, x, features=OUT, size=3, use_bias=None, **kwargs):
        use_bias = not self.norms if use_bias is None else use_bias
        size = (size, size)
        return nn.Conv(features, size, use_bias=use_bias, **kwargs)(x)


def prepared(net, x):
    return drawn(jax.eval_shape(net.init, jax.random.key(0), x))


def names(pairs):
    return [(pair.layer, pair.norm) for pair in pairs]


class Block(nn.Module):
    kind: Any
    norms: bool

    @nn.compact
    def __call__(self, x):
        def norm(x, name):
            if not self.norms:
                return x
            return self.kind(use_running_average=True, epsilon=1e-3, name=name)(x)

        conv = functools.partial(nn.Conv, OUT, (3, 3), use_bias=not self.norms)
        y = nn.relu(norm(conv()(x), "one"))
        y = norm(conv(feature_group_count=2)(y), "two")
        return nn.relu(x + y)


def residual(net, x):
    """What models are made of: blocks, jit, remat, depthwise and transposed layers, a
    bias here and there, a norm before a layer."""
    x = nn.relu(net.norm(net.conv(x, use_bias=True), use_bias=False))
    for i, wrap in enumerate((nn.jit, nn.remat)):
        x = wrap(Block)(net.kind, net.norms, name=f"block_{i}")(x)
    x = net.norm(net.conv(x, feature_group_count=OUT, padding="VALID"), use_scale=False)
    up = nn.ConvTranspose(OUT, (2, 2), transpose_kernel=True, use_bias=not net.norms)
    x = jnp.tanh(net.norm(up(x)).mean((1, 2)))
    x = net.norm(x, "before", use_scale=False, use_bias=False)
    return nn.Dense(3)(x)


RESIDUAL = [
    ("Conv_0", "{}_0"),
    ("block_0/Conv_0", "block_0/one"),
    ("block_0/Conv_1", "block_0/two"),
    ("block_1/Conv_0", "block_1/one"),
    ("block_1/Conv_1", "block_1/two"),
    ("Conv_1", "{}_1"),
    ("ConvTranspose_0", "{}_2"),
    ("Dense_0", "before"),
]


@pytest.mark.parametrize("kind", [nn.BatchNorm, jaxnorm.linen.BatchNorm])
def test_a_folded_model_is_the_model(kind):
    net, x = Net(residual, kind), sample(2, 6, 6, 3)
    variables = prepared(net, x)
    pairs = find_pairs(net.apply, variables, x)
    expected = [(layer, norm.format("BatchNorm")) for layer, norm in RESIDUAL]
    assert names(pairs) == expected
    epsilons = [1e-3 if "block" in pair.layer else 1e-5 for pair in pairs]
    assert [pair.epsilon for pair in pairs] == epsilons
    without = Net(residual, norms=False)
    folded = jax.jit(functools.partial(fold, pairs=pairs))(variables)
    fresh = jax.eval_shape(without.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, dict(fresh))
    got = jax.jit(without.apply)(folded, x)
    assert_same(got, jax.jit(net.apply)(variables, x))


def test_pairs_need_shapes_only():
    net, x = Net(residual), sample(2, 6, 6, 3)
    variables, shape = prepared(net, x), jax.ShapeDtypeStruct(x.shape, x.dtype)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), variables)
    pairs = find_pairs(net.apply, variables, x)
    assert find_pairs(net.apply, shapes, shape) == pairs
    inside = []
    jax.jit(lambda v: inside.append(find_pairs(net.apply, v, x)))(variables)
    assert inside == [pairs]


def test_a_model_in_bfloat16():
    def body(net, x):
        return net.norm(net.conv(x, dtype=jnp.bfloat16), dtype=jnp.bfloat16)

    net, x = Net(body), sample(2, 5, 5, 3)
    variables = prepared(net, x)
    pairs = find_pairs(net.apply, variables, x)
    assert pairs == [Pair("Conv_0", "BatchNorm_0", 1e-5, axis=-1)]
    got: Any = Net(body, norms=False).apply(fold(variables, pairs), x)
    assert got.dtype == jnp.bfloat16
    # Input and kernel are rounded, here and there, and the results are, of each layer.
    scale = np.abs(exact(affine_form(*of(variables), epsilon=0)[0])).max()
    assert_same(got, net.apply(variables, x), 8 * BF16 * max(scale, 1))


def of(variables, norm="BatchNorm_0"):
    return variables["params"][norm], variables["batch_stats"][norm]


def in_one(body):
    """The pairs of a model of `body`, and whether folding them is exact."""
    net, x = Net(body), sample(2, OUT, OUT, OUT)
    variables = prepared(net, x)
    pairs = find_pairs(net.apply, variables, x)
    if pairs:
        got = Net(body, norms=False).apply(fold(variables, pairs), x)
        assert_same(got, net.apply(variables, x))
    return names(pairs)


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, g: (g,))


class Reversed(nn.Module):
    """Declares in one order what it calls in another."""

    norms: bool

    def setup(self):
        self.norm_of_b = jaxnorm.linen.BatchNorm(use_running_average=True)
        self.a = nn.Conv(OUT, (1, 1))
        self.norm_of_a = jaxnorm.linen.BatchNorm(use_running_average=True)
        self.b = nn.Conv(OUT, (1, 1))

    def __call__(self, x):
        norm_a, norm_b = (
            (self.norm_of_a, self.norm_of_b) if self.norms else [lambda x: x] * 2
        )
        return norm_b(self.b(nn.relu(norm_a(self.a(x)))))


def power(net, x):
    """A norm without a mean and bias, and so with zeros for zeros."""
    if net.norms:
        x = jaxnorm.linen.Norm(
            jaxnorm.PowerNorm(epsilon=1e-4), use_running_average=True, use_bias=False
        )(x)
    return net.conv(x)


def relu_of(net, y, residual):
    """`relu(norm(y) + residual)`, in one call; without the norm what is left of it."""
    if not net.norms:
        return nn.relu(y + residual)
    norm = net.kind(use_running_average=True, activation="relu")
    return norm(y, residual=residual)


FIRST = [("Conv_0", "BatchNorm_0")]
PAIRS: dict[str, tuple[Callable[..., Any], list[tuple[str, str]]]] = {
    "a relu after": (lambda net, x: nn.relu(net.norm(net.conv(x))), FIRST),
    "a skip connection after": (
        lambda net, x: (lambda y: y + nn.relu(y))(net.norm(net.conv(x))),
        FIRST,
    ),
    "a skip connection around": (
        lambda net, x: x + net.norm(net.conv(nn.relu(x))),
        FIRST,
    ),
    "an activation and a residual of the norm": (
        lambda net, x: relu_of(net, net.conv(x), jnp.tanh(x)),
        FIRST,
    ),
    "a name": (
        lambda net, x: net.norm(checkpoint_name(net.conv(x), "y")),
        FIRST,
    ),
    "what does nothing": (
        lambda net, x: net.norm(
            identity(nn.Dropout(0.5, deterministic=True)(net.conv(x)))
        ),
        FIRST,
    ),
    "moved axes": (
        lambda net, x: net.norm(jnp.moveaxis(net.conv(x), -1, 1), axis=1),
        FIRST,
    ),
    "axes in one": (
        lambda net, x: net.norm(net.conv(x)[None].reshape(-1, OUT)[:, None]),
        FIRST,
    ),
    "between two layers": (
        lambda net, x: nn.Dense(3)(net.norm(net.conv(x))),
        FIRST,
    ),
    "several batch axes": (lambda net, x: net.norm(net.conv(x[None])), FIRST),
    "one feature": (
        lambda net, x: net.norm(net.conv(x, 1, size=1), axis=(-1)),
        FIRST,
    ),
    "einsum": (
        lambda net, x: net.norm(
            nn.Einsum((OUT, OUT), "...i,io->...o", use_bias=not net.norms)(x)
        ),
        [("Einsum_0", "BatchNorm_0")],
    ),
    "norm, dense": (
        lambda net, x: nn.Dense(3, use_bias=not net.norms)(net.norm(nn.tanh(x))),
        [("Dense_0", "BatchNorm_0")],
    ),
    "norm, dense with a bias": (
        lambda net, x: nn.Dense(3)(net.norm(nn.tanh(x))),
        [("Dense_0", "BatchNorm_0")],
    ),
    "norm, grouped conv": (
        lambda net, x: net.conv(net.norm(x), padding="VALID", feature_group_count=3),
        FIRST,
    ),
    "norm that keeps zeros, padded conv": (power, [("Conv_0", "Norm_0")]),
    "declared in another order": (
        lambda net, x: Reversed(net.norms, name="r")(x),
        [("r/a", "r/norm_of_a"), ("r/b", "r/norm_of_b")],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    body, expected = PAIRS[name]
    assert in_one(body) == expected


class Switched(nn.Module):
    @nn.compact
    def __call__(self, x, shift=None, *, train):
        x = jaxnorm.linen.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return x if shift is None else x + shift


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        (["x"], {"train": False}, True),
        ([], {"x": "x", "train": False}, True),
        (["x"], {"train": False, "shift": "x"}, True),
        (["x", None], {"train": False, "method": "__call__"}, True),
        (["x"], {"train": True, "mutable": ["batch_stats"]}, False),
    ],
)
def test_other_arguments_of_the_call_are_passed_on(args, kwargs, found):
    arrays = {"x": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    net = Switched()
    variables = net.init(jax.random.key(0), sample(4, 3), train=False)
    args = [arrays.get(v, v) for v in args]
    named = {k: arrays["x"] if v == "x" else v for k, v in kwargs.items()}
    pairs = find_pairs(net.apply, variables, *args, **named)
    assert names(pairs) == [("Dense_0", "BatchNorm_0")] * found


def test_arrays_by_keyword_are_no_constants():
    def apply(variables, x, *, gain):
        kernel, stats = variables["params"]["a"]["kernel"], variables["batch_stats"]
        mean, var = (stats["n"][k][None] for k in ("mean", "var"))
        return by_hand(x @ kernel * gain, mean, var)

    variables = {
        "params": {"a": {"kernel": sample(3, 3)}},
        "batch_stats": {"n": jaxnorm.init_stats(3)},
    }
    assert len(find_pairs(apply, variables, sample(3, 3), gain=1.0)) == 1
    assert find_pairs(apply, variables, sample(3, 3), gain=jnp.ones((1, 1))) == []


def used_twice(net, x):
    conv = nn.Conv(OUT, (1, 1))
    return net.norm(conv(nn.relu(conv(x))))


def one_norm_for_two(net, x):
    norm = net.kind(use_running_average=True)
    return norm(net.conv(x)) + norm(net.conv(nn.relu(x)))


def twice_its_kernel(net, x):
    y = net.norm(net.conv(x))
    return y + net.variables["params"]["Conv_0"]["kernel"].sum()


def another_formula(net, x):
    class Epsilon(nn.Module):
        """Adds its epsilon to the deviation."""

        @nn.compact
        def __call__(self, x):
            mean, var = (
                self.variable("batch_stats", k, jnp.ones, (OUT,)).value[
                    None, None, None
                ]
                for k in ("mean", "var")
            )
            return (x - mean) / (jnp.sqrt(var) + 1e-5)

    return Epsilon()(net.conv(x))


def in_scan(net, x):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return net.kind(use_running_average=True)(nn.Dense(OUT)(x)), None

    axes: Any = {"params": 0, "batch_stats": 0}
    scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
    return scan()(x, None)[0]


def gain_between(net, x):
    gain = net.param("gain", nn.initializers.ones, (1, 1, 1, OUT))
    return net.norm(net.conv(x) * gain)


NO_PAIRS: dict[str, Callable[..., Any]] = {
    "relu between": lambda net, x: net.norm(nn.relu(net.conv(x))),
    "norm of it all": lambda net, x: net.norm(net.conv(x) + x),
    "output read before the norm": lambda net, x: (lambda y: net.norm(y) + nn.relu(y))(
        net.conv(x)
    ),
    "output returned": lambda net, x: (lambda y: (net.norm(y), y))(net.conv(x)),
    "another axis of the same size": lambda net, x: net.norm(net.conv(x), axis=1),
    "two axes": lambda net, x: net.norm(net.conv(x), axis=(1, -1)),
    "reshaped features": lambda net, x: net.norm(net.conv(x).reshape(2, -1, 2, 3)),
    "features in another order": lambda net, x: net.norm(net.conv(x)[..., ::-1]),
    "pooling": lambda net, x: net.norm(nn.avg_pool(net.conv(x), (2, 2))),
    "one over": lambda net, x: net.norm(1 / net.conv(x)),
    "a factor": lambda net, x: net.norm(3 * net.conv(x)),
    "a gain": gain_between,
    "a layer used twice": used_twice,
    "a norm used twice": one_norm_for_two,
    "a kernel read elsewhere": twice_its_kernel,
    "a norm by each example": lambda net, x: nn.LayerNorm()(net.conv(x)),
    "a norm by the batch": lambda net, x: net.kind(use_running_average=False)(
        net.conv(x)
    ),
    "EvalNorm": lambda net, x: jaxnorm.linen.Norm(
        jaxnorm.EvalNorm(), use_running_average=True
    )(net.conv(x)),
    "OnlineNorm": lambda net, x: jaxnorm.linen.Norm(
        jaxnorm.OnlineNorm(), use_running_average=True
    )(net.conv(x)),
    "another formula": another_formula,
    "a mask": lambda net, x: net.kind(use_running_average=True)(
        net.conv(x), mask=x > 0
    ),
    "a normalized kernel": lambda net, x: net.norm(
        jaxnorm.linen.WeightNorm(nn.Dense(OUT))(x)
    ),
    "a masked kernel": lambda net, x: net.norm(
        net.conv(x, mask=jnp.ones((3, 3, OUT, OUT)))
    ),
    "a kernel for each place": lambda net, x: net.norm(nn.ConvLocal(OUT, (3, 3))(x)),
    "features on several axes": lambda net, x: net.norm(nn.DenseGeneral((2, 3))(x)),
    "scan": in_scan,
    "circular padding of a transposed one": lambda net, x: net.norm(
        nn.ConvTranspose(OUT, (3, 3), padding="CIRCULAR")(x)
    ),
    "norm before padding": lambda net, x: net.conv(net.norm(x)),
    "norm before padding, no bias": lambda net, x: net.conv(
        net.norm(x, use_bias=False)
    ),
    "norm before zeros between": lambda net, x: net.conv(
        net.norm(x), padding=0, input_dilation=(2, 2)
    ),
    "norm before circular padding": lambda net, x: net.conv(
        net.norm(x), padding="CIRCULAR"
    ),
    "norm before two": lambda net, x: (lambda y: nn.Dense(2)(y) + nn.Dense(2)(y))(
        net.norm(x)
    ),
    "an activation of the norm before a layer": lambda net, x: nn.Dense(2)(
        net.norm(x, activation="relu")
    ),
    "a residual of the norm before a layer": lambda net, x: nn.Dense(2)(
        net.kind(use_running_average=True)(x, residual=jnp.tanh(x))
    ),
    "a residual that the layer gives as well": lambda net, x: (
        lambda y: net.kind(use_running_average=True)(y, residual=y)
    )(net.conv(x)),
    "norm read beside its layer": lambda net, x: (lambda y: nn.Dense(OUT)(y) + y)(
        net.norm(x)
    ),
    "norm of another axis before a layer": lambda net, x: nn.Dense(3)(
        net.norm(x, axis=1)
    ),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_no_pairs(name):
    net, x = Net(NO_PAIRS[name]), sample(2, OUT, OUT, OUT)
    variables = prepared(net, x)

    def apply(variables, x):
        return net.apply(variables, x, mutable=["batch_stats"])[0]

    assert find_pairs(apply, variables, x) == []


def batch_norm(x, kernel, stats, axis=-1):
    stats = {k: stats[k] for k in ("mean", "var")}
    return jaxnorm.batch_norm(x, stats, axis=axis, use_running_average=True)[0]


def by_hand(y, mean, var):
    return (y - mean) * jax.lax.rsqrt(var + 1e-5)


def by_ref(x, kernel, stats):
    """Takes away what was 0 when it was made, but is written over."""
    shift = jax.new_ref(jnp.zeros(3))
    shift[...] = x.mean(0)
    return by_hand(x @ kernel - shift[...], stats["mean"], stats["var"])


def twice(kernel):
    return jnp.broadcast_to(kernel, (2, 3, 3)).reshape(6, 3)


# Of x and kernel, both (3, 3), and of statistics of shape (3,).
PRODUCTS: dict[str, tuple[Callable[..., Any], int | None]] = {
    # The model, and which axis of the kernel is folded.
    "x @ kernel": (lambda x, k, s: batch_norm(x @ k, k, s), -1),
    "x @ kernel.T": (lambda x, k, s: batch_norm(x @ k.T, k, s), -2),
    "kernel @ x": (lambda x, k, s: batch_norm(k @ x, k, s, axis=0), -2),
    "kernel.T @ x": (lambda x, k, s: batch_norm(k.T @ x, k, s, axis=0), -1),
    "of what is negative": (
        lambda x, k, s: by_hand(-(x @ k), s["mean"], s["var"]),
        None,
    ),
    "negative after": (lambda x, k, s: -by_hand(x @ k, s["mean"], s["var"]), -1),
    "a mean along two axes": (
        lambda x, k, s: (
            (x @ k - s["mean"] - s["mean"][:, None])[None]
            * jax.lax.rsqrt(s["var"] + 1e-5)
        ),
        None,
    ),
    "a variance within limits": (
        lambda x, k, s: by_hand(x @ k, s["mean"], jnp.minimum(s["var"], 0.5)),
        None,
    ),
    "another variable": (
        lambda x, k, s: by_hand(s["gain"] * (x @ k), s["mean"], s["var"]),
        None,
    ),
    "another variable after": (
        lambda x, k, s: by_hand(x @ k, s["mean"], s["var"]).sum() + s["gain"],
        None,
    ),
    "signs that cancel": (
        lambda x, k, s: (-(x @ k) + s["mean"]) / -jnp.sqrt(s["var"] + 1e-5),
        -1,
    ),
    "from the mean": (
        lambda x, k, s: (s["mean"] - x @ k) * -jax.lax.rsqrt(s["var"] + 1e-5),
        -1,
    ),
    "kernel @ x along x": (lambda x, k, s: batch_norm(k @ x, k, s), None),
    "a batch of kernels": (
        lambda x, k, s: batch_norm(jnp.einsum("nbi,bi->bn", x[:, None] + x, k), k, s),
        None,
    ),
    "a kernel spread out": (
        lambda x, k, s: batch_norm(jnp.tile(x, 2) @ twice(k), k, s),
        None,
    ),
    "an output spread out": (
        lambda x, k, s: by_hand(x[:1] @ k, jnp.tile(s["mean"], (3, 1)), s["var"][None]),
        None,
    ),
    "a value written over": (by_ref, None),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    body, axis = PRODUCTS[name]
    kernel, x = sample(3, 3), sample(3, 3)[::-1]
    stats = drawn(jaxnorm.init_stats(3) | {"gain": jnp.ones(3)})
    variables = {"params": {"a": {"kernel": kernel}}, "batch_stats": {"n": stats}}

    def apply(variables, x):
        kernel = variables["params"]["a"]["kernel"]
        with jax.numpy_rank_promotion("allow"):
            return body(x, kernel, variables["batch_stats"]["n"])

    pairs = find_pairs(apply, variables, x)
    assert pairs == ([] if axis is None else [Pair("a", "n", 1e-5, axis=axis)])


def test_a_norm_that_computes_in_bfloat16():
    variables = {
        "params": {"a": {"kernel": jnp.ones((3, 3))}},
        "batch_stats": {"n": jaxnorm.init_stats(3)},
    }

    def apply(variables, x):
        half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)
        y = x.astype(jnp.bfloat16) @ half["params"]["a"]["kernel"]
        mean, var = (half["batch_stats"]["n"][k][None] for k in ("mean", "var"))
        return by_hand(y, mean, var)

    (pair,) = find_pairs(apply, variables, sample(3, 3))
    assert pair[:2] == ("a", "n") and pair.epsilon == pytest.approx(1e-5, rel=4 * BF16)


@pytest.mark.parametrize(("norm_first", "axes"), [(False, [-4]), (True, [])])
def test_kernels_with_features_first(norm_first, axes):
    layer, stats = {"kernel": sample(3, 3, 1, 1)}, jaxnorm.init_stats(3)
    variables = {"params": {"a": layer}, "batch_stats": {"n": stats}}

    def apply(variables, x):
        kernel, stats = (
            variables["params"]["a"]["kernel"],
            variables["batch_stats"]["n"],
        )
        x = batch_norm(x, kernel, stats, axis=1) if norm_first else x
        y = jax.lax.conv(x, kernel, (1, 1), "VALID")
        return y if norm_first else batch_norm(y, kernel, stats, axis=1)

    pairs = find_pairs(apply, variables, sample(2, 3, 2, 2))
    assert [pair.axis for pair in pairs] == axes


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (lambda y, bias: y + bias, [("a", "n")]),
        (lambda y, bias: y * bias, []),
        (lambda y, bias: jnp.tanh(y) + bias, []),
        (lambda y, bias: y + bias + bias, []),
    ],
)
def test_the_bias_of_a_layer_after_a_norm_is_added(last, expected):
    layer, stats = {"kernel": sample(3, 3), "bias": jnp.ones(3)}, jaxnorm.init_stats(3)
    variables = {"params": {"a": layer}, "batch_stats": {"n": stats}}

    def apply(variables, x):
        kernel, bias = (variables["params"]["a"][k] for k in ("kernel", "bias"))
        x = batch_norm(x, kernel, variables["batch_stats"]["n"])
        return last(x @ kernel, bias[None])

    assert names(find_pairs(apply, variables, sample(3, 3))) == expected


# ---- What is said -----------------------------------------------------------------

TREE = {
    "params": {
        "Block_0": {"Conv_0": ONES, "norm": {"scale": jnp.ones(OUT)}},
        "Dense_0": {"kernel": jnp.ones((OUT, 3))},
    },
    "batch_stats": {
        "Block_0": {
            "norm": drawn(jaxnorm.init_stats(OUT)),
            "five": jaxnorm.init_stats(5),
        }
    },
    "cache": {"seen": jnp.ones(1)},
}
CONV, NORM = "Block_0/Conv_0", "Block_0/norm"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], "pairs must name a layer and a norm, got none"),
        ([("Conv_0", NORM)], f"no layer at 'Conv_0' has a kernel.*'{CONV}', 'Dense_0'"),
        ([("Block_0", NORM)], "no layer at 'Block_0' has a kernel"),
        ([(CONV, "norm")], f"no norm at 'norm' has running statistics.*'{NORM}'"),
        ({CONV: NORM, "Dense_0": NORM}, f"'{NORM}' is in 2 pairs"),
        ([(CONV, NORM), (CONV, "Block_0/five")], f"'{CONV}' is in 2 pairs"),
        ([(CONV, "Block_0/five")], f"fold 'Block_0/five' into '{CONV}': .* 5 features"),
        ([("Dense_0", NORM)], f"fold '{NORM}' into 'Dense_0': .* 6 features"),
        ([Pair("Dense_0", NORM, norm_first=True, axis=2)], "Dense_0.* has no axis 2"),
        ([Pair(CONV, NORM, norm_first=True, axis=-1)], "zeros that pad"),
        ([Pair(CONV, NORM, epsilon=-1)], "negative, got -1"),
    ],
)
def test_pairs_that_do_not_fit_are_named(pairs, words):
    with pytest.raises(ValueError, match=words):
        fold(TREE, pairs, epsilon=1e-5)


def test_epsilon_is_never_guessed():
    with pytest.raises(
        ValueError, match=f"{NORM}.*do not hold the epsilon.*find_pairs"
    ):
        fold(TREE, {CONV: NORM})
    by_pair = fold(TREE, [Pair(CONV, NORM, epsilon=0.5)], epsilon=1.0)
    kernel = by_pair["params"]["Block_0"]["Conv_0"]["kernel"]
    var = exact(TREE["batch_stats"]["Block_0"]["norm"]["var"])
    np.testing.assert_allclose(kernel[0, 0, 0], (var + 0.5) ** -0.5, rtol=1e-6)


def test_what_is_not_folded_is_kept():
    folded = fold(frozen_dict(TREE), {CONV: NORM}, epsilon=0.0)
    assert sorted(folded) == ["batch_stats", "cache", "params"]
    assert list(folded["batch_stats"]["Block_0"]) == ["five"]
    assert list(folded["params"]["Block_0"]) == ["Conv_0"]
    dense = (tree["params"]["Dense_0"]["kernel"] for tree in (folded, TREE))
    np.testing.assert_array_equal(*dense)
    assert "norm" in TREE["params"]["Block_0"]
    both = {CONV: NORM, "Dense_0": "three"}
    tree = TREE | {"batch_stats": {"a": {"norm": {}}, "three": jaxnorm.init_stats(3)}}
    tree["batch_stats"]["Block_0"] = {"norm": jaxnorm.init_stats(OUT)}
    assert fold(tree, both, epsilon=0.0)["batch_stats"] == {"a": {"norm": {}}}


def buffers(*trees):
    """Where the arrays are in memory."""
    return [v.unsafe_buffer_pointer() for v in jax.tree.leaves(trees)]


def assert_apart(given, result):
    """No leaf of `result` shares a buffer with another, or with one of `given`."""
    own = buffers(result)
    assert len({*own}) == len(own) and not {*own} & {*buffers(given)}


def test_results_can_be_donated():
    ones = jnp.ones(OUT)
    shared = {"mean": ones, "var": ones}
    tree = TREE | {"batch_stats": {"Block_0": {"norm": shared, "other": shared}}}
    assert_apart(tree, fold(tree, {CONV: NORM}, epsilon=0.0))
    layer = {"kernel": jnp.ones((IN, OUT)), "bias": ones, "mask": ones}
    assert_apart(layer, fold_output(layer, ones, jnp.zeros(OUT)))
    assert_apart(layer, fold_input(layer, jnp.ones(IN), jnp.zeros(IN)))
    params = {"scale": ones, "bias": ones}
    assert_apart([params, shared], affine_form(params, shared, epsilon=0.0))


class Partitioned(Net):
    @nn.compact
    def __call__(self, x):
        def init(fill, *names):
            return nn.with_partitioning(fill, names)

        kernel = init(nn.initializers.lecun_normal(), None, "model")
        x = nn.Dense(OUT, use_bias=not self.norms, kernel_init=kernel)(x)
        ones = init(nn.initializers.ones, "model")
        return self.norm(x, scale_init=ones)


def test_partitioned_variables_are_folded_and_stay_so():
    net, x = Partitioned(lambda net, x: x), sample(2, IN)
    variables = drawn(net.init(jax.random.key(0), x))
    pairs = find_pairs(net.apply, variables, x)
    assert names(pairs) == [("Dense_0", "BatchNorm_0")]
    automatic = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("model",), automatic)):  # constrains them
        assert find_pairs(net.apply, variables, x) == pairs
    folded = fold(variables, pairs)
    kernel = folded["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    got = Partitioned(net.body, norms=False).apply(folded, x)
    assert_same(got, net.apply(variables, x))


untyped: Any = jaxnorm.models  # as type checkers would refuse these calls
KERNEL = {"kernel": jnp.ones((IN, OUT))}
STATS = {"mean": jnp.zeros(OUT), "var": jnp.ones(OUT)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: untyped.fold_output({}, *form(OUT)), r"holds a 'kernel', got \[\]"),
        (lambda: untyped.fold_input(None, *form(OUT)), "layer must be nested.*None"),
        (
            lambda: untyped.fold_output({"kernel": "k"}, *form(OUT)),
            "arrays.*'k' at 'kernel'",
        ),
        (lambda: untyped.fold_output(KERNEL, None, 1), "^a must be an array.*None"),
        (
            lambda: untyped.fold_output(
                {"kernel": jnp.ones((2, 2), jnp.int8)}, *form(2)
            ),
            "kernel of int8: fold it into the floating point one",
        ),
        (
            lambda: untyped.fold_output(KERNEL, *form(OUT), axis="last"),
            "axis must be an integer, got 'last'",
        ),
        (
            lambda: untyped.fold_output(KERNEL, jnp.ones(OUT), 1j * jnp.ones(OUT)),
            "the kernel of the layer is float32, and would be complex",
        ),
        (
            lambda: untyped.fold_input(KERNEL, *form(IN), groups=0),
            "groups must be 1 or more",
        ),
        (
            lambda: untyped.fold_input(KERNEL, *form(IN), padded="VALID"),
            "padded must be True",
        ),
        (lambda: untyped.affine_form(None, STATS, epsilon=0), "^params must be.*None"),
        (
            lambda: untyped.affine_form({}, "stats", epsilon=0),
            "^stats must be.*'stats'",
        ),
        (
            lambda: untyped.affine_form({}, STATS, epsilon="1e-5"),
            "one real number, got '1e-5'",
        ),
        (
            lambda: untyped.affine_form({}, STATS, epsilon=float("nan")),
            "epsilon must be a number, got nan",
        ),
        (
            lambda: untyped.affine_form({"scale": jnp.ones(2)}, STATS, epsilon=0),
            r"of one shape, got \{'scale': \(2,\), 'mean': \(6,\)",
        ),
        (lambda: untyped.fold(None, {CONV: NORM}), "^variables must be.*None"),
        (
            lambda: untyped.fold({"params": None}, {CONV: NORM}),
            r"\['params'\] must be.*None",
        ),
        (
            lambda: untyped.fold({"batch_stats": {}}, {CONV: NORM}),
            r"no layer at .* \[\]",
        ),
        (lambda: untyped.fold(TREE, None), "pairs must be a list of pairs.*None"),
        (lambda: untyped.fold(TREE, CONV), "pairs must be a list of pairs.*'Block_0"),
        (
            lambda: untyped.fold(TREE, Pair(CONV, NORM)),
            "pairs must be a list of pairs.*Pair",
        ),
        (
            lambda: untyped.fold(TREE, (CONV, NORM)),
            "each of pairs must be the path.*Conv_0",
        ),
        (
            lambda: untyped.fold(TREE, [(CONV, NORM, 0, "no")]),
            "each of pairs must be.*'no'",
        ),
        (
            lambda: untyped.fold(TREE, [(CONV, NORM, "eps")]),
            f"cannot fold '{NORM}' .* real number, got 'eps'",
        ),
        (
            lambda: untyped.fold(
                {"params": {"d": KERNEL}, "batch_stats": {"l": [STATS]}},
                {"d": "l/0"},
                epsilon=0.0,
            ),
            "'l/0' is within a list",
        ),
        (lambda: untyped.find_pairs(None, TREE), "apply must be a function.*None"),
        (
            lambda: untyped.find_pairs(nn.Dense(2), TREE),
            "got a model of Dense.*model.apply",
        ),
        (
            lambda: untyped.find_pairs(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), TREE),
            "an NNX model: jaxnorm.nnx.fold",
        ),
        (lambda: untyped.find_pairs(max, nnx.Param(1)), "jaxnorm.nnx.variables"),
    ],
)
def test_other_kinds_of_arguments_are_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


# ---- NNX --------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, kind, rngs):
        zeros = {"kernel_init": nnx.initializers.zeros, "rngs": rngs}
        self.layers = nnx.List(
            [
                nnx.Conv(3, OUT, (3, 3), use_bias=False, **zeros),
                kind(OUT, rngs=rngs),
                nnx.Conv(OUT, OUT, (3, 3), **zeros),
            ]
        )
        self.norm = kind(OUT, epsilon=1e-2, use_scale=False, rngs=rngs)
        self.trap = kind(OUT, rngs=rngs)
        self.dense = nnx.Linear(OUT, 4, use_bias=False, **zeros)
        self.last = kind(4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.layers[1](self.layers[0](x)))
        x = nnx.relu(self.norm(self.layers[2](x)))
        return self.last(self.dense(nnx.relu(self.trap(x).mean((1, 2)))))


@pytest.fixture(scope="module", params=[nnx.BatchNorm, jaxnorm.nnx.BatchNorm])
def model(request):
    model = Model(request.param, nnx.Rngs(0))
    jaxnorm.nnx.update(model, drawn(jaxnorm.nnx.variables(model)))
    return model


def test_an_nnx_model_is_folded_into_a_copy(model):
    x = sample(2, 5, 5, 3)
    model.train()
    before = jaxnorm.nnx.variables(model)
    folded = jaxnorm.nnx.fold(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.tree.map(np.testing.assert_array_equal, jaxnorm.nnx.variables(model), before)
    assert not model.norm.use_running_average
    model.eval()
    assert_same(nnx.jit(folded)(x), nnx.jit(model)(x))
    kinds = [type(m) for m in (folded.layers[1], folded.norm, folded.last)]
    assert kinds == [Identity] * 3
    left = jaxnorm.nnx.variables(folded)
    assert list(left["batch_stats"]) == ["trap"]
    assert sorted(left["params"]["layers"][0]) == ["bias", "kernel"]


def test_a_norm_with_two_names_is_replaced_at_both():
    rngs = nnx.Rngs(0)
    model: Any = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
    )
    model.z_norm = model.layers[1]
    folded = jaxnorm.nnx.fold(model, sample(2, 3))
    assert type(folded.layers[1]) is type(folded.z_norm) is Identity
    assert type(model.z_norm) is nnx.BatchNorm


@pytest.mark.parametrize("factor", [None, 0.96])
def test_a_factor_that_half_precision_hides_is_seen(factor):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Dense(4, dtype=jnp.bfloat16)(x)
            y = y if factor is None else y * factor
            return nn.BatchNorm(use_running_average=True)(y.astype(jnp.float32))

    x = sample(2, 3)
    variables = Net().init(jax.random.key(0), x)
    assert len(find_pairs(Net().apply, variables, x)) == (factor is None)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_stride_may_pad_other_images(strides):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.Conv(4, (2, 2), strides=strides, padding="VALID")(x)

    x = sample(1, 8, 8, 3)
    variables = Net().init(jax.random.key(0), x)
    # What pads 8 x 8 images nothing, may pad 7 x 7 ones, if it is "SAME".
    assert len(find_pairs(Net().apply, variables, x)) == (strides == 1)


def test_a_norm_alone_is_no_pair():
    def apply(variables, x):
        return jaxnorm.batch_norm(
            x @ variables["params"]["kernel"],
            variables["batch_stats"],
            use_running_average=True,
        )[0]

    tree = {
        "params": {"kernel": jnp.ones((3, 4))},
        "batch_stats": jaxnorm.init_stats(4),
    }
    assert find_pairs(apply, tree, sample(2, 3)) == []


def test_nnx_pairs_may_be_given(model):
    x = sample(2, 5, 5, 3)
    pairs = [Pair("layers/2", "norm", 1e-2), ("dense", "last")]
    folded = jaxnorm.nnx.fold(model, pairs=pairs, epsilon=1e-5)
    model.eval()
    assert_same(nnx.jit(folded)(x), nnx.jit(model)(x))
    assert type(folded.layers[1]) is type(model.norm)


def test_an_nnx_layer_needs_a_place_for_the_bias():
    class Product(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((3, 3)))

        def __call__(self, x):
            return x @ self.kernel[...]

    model = nnx.Sequential(Product(), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="'layers/0', Product, has no .*'bias'"):
        jaxnorm.nnx.fold(model, sample(2, 3))
    with pytest.raises(ValueError, match="got none"):
        jaxnorm.nnx.fold(nnx.Sequential(nnx.relu), sample(2, 3))


class Fused(nnx.Module):
    """Norms that add a residual and apply an activation in their own call."""

    def __init__(self, norm, rngs, dtype=None):
        self.first = nnx.Conv(3, 4, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List([norm(rngs), norm(rngs)])

    def __call__(self, x, train=False, mask=None):
        flag = not train
        x = self.norms[0](self.first(x), flag)
        y = self.second(x)
        return self.norms[1](y, use_running_average=flag, residual=x, mask=mask)


def fused(norm, **kwargs):
    model = Fused(norm, nnx.Rngs(0), **kwargs)
    jaxnorm.nnx.update(model, drawn(jaxnorm.nnx.variables(model)))
    model.eval()
    return model


def named_norm(rngs, **kwargs):
    return jaxnorm.nnx.BatchNorm(4, rngs=rngs, **kwargs)


def generic_norm(rngs, use_scale=True, dtype=None, **kwargs):
    norm = jaxnorm.BatchNorm(**kwargs)
    return jaxnorm.nnx.Norm(norm, 4, use_scale=use_scale, dtype=dtype)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("norm", [named_norm, generic_norm])
def test_what_follows_a_norm_in_its_call_stays(norm, activation):
    model, x = fused(functools.partial(norm, activation=activation)), sample(2, 4, 4, 3)
    mask = np.arange(2 * 16 * 4).reshape(2, 4, 4, 4) % 5 > 0
    folded = jaxnorm.nnx.fold(model, x, train=False)
    assert [type(m) for m in folded.norms] == [Identity] * 2
    for given in (None, mask):
        expected = nnx.jit(model)(x, mask=given)
        assert_same(nnx.jit(folded)(x, mask=given), expected)
        same = jaxnorm.nnx.convert(model, jaxnorm.BatchNorm())
        assert_same(nnx.jit(same)(x, mask=given), expected)


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (named_norm, {}),
        (named_norm, {"use_scale": False, "use_bias": False}),
        (named_norm, {"dtype": jnp.bfloat16}),
        (generic_norm, {}),
        (generic_norm, {"dtype": jnp.float16}),
    ],
)
def test_the_dtype_of_a_norm_stays(norm, options):
    class Half(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layer = nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=rngs)
            self.norm = norm(rngs, **options)

        def __call__(self, x):
            return self.norm(self.layer(x))

    model, x = Half(), sample(2, 3)
    model.eval()
    expected = model(x).dtype
    assert jaxnorm.nnx.fold(model, x)(x).dtype == expected
    assert jaxnorm.nnx.convert(model, jaxnorm.BatchNorm())(x).dtype == expected


def test_nnx_copies_can_be_donated():
    model: Any = fused(named_norm)
    x = sample(2, 4, 4, 3)
    model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    held = jaxnorm.nnx.variables(model)
    copies = [
        held,
        nnx.state(jaxnorm.nnx.fold(model, x)),
        nnx.state(jaxnorm.nnx.convert(model, jaxnorm.DomainBatchNorm(num_domains=2))),
        nnx.state(jaxnorm.nnx.convert(model, jaxnorm.SwitchableNorm())),
    ]
    for copy in copies:
        arrays = [v for v in jax.tree.leaves(copy) if not is_key(v)]
        others = [v for v in jax.tree.leaves(nnx.state(model)) if not is_key(v)]
        assert_apart(others, arrays)
    before = held["params"]["first"]["kernel"]
    jaxnorm.nnx.update(model, held)
    assert_apart(held, [v for v in jax.tree.leaves(nnx.state(model)) if not is_key(v)])
    folded = jaxnorm.nnx.fold(model, x)
    expected = folded(x)
    jax.jit(lambda state: jax.tree.map(lambda v: v, state), donate_argnums=0)(
        nnx.state(model)
    )
    np.testing.assert_array_equal(folded(x), expected)
    assert not before.is_deleted()


def is_key(v):
    return jnp.issubdtype(v.dtype, jax.dtypes.prng_key)


class Own(nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return nnx.relu(super().__call__(x, *args, **kwargs))


class Set(nnx.BatchNorm):
    """Flax's, with another default."""

    def __init__(self, features, rngs):
        super().__init__(features, epsilon=1e-3, rngs=rngs)


class Doubled(jaxnorm.BatchNorm):
    def evaluate(self, x, params, stats, **kwargs):
        return 2 * super().evaluate(x, params, stats, **kwargs)


class Product(nnx.Module):
    """Has a place for a bias, which it adds or not."""

    def __init__(self, adds):
        self.kernel, self.bias = nnx.Param(sample(3, 3)), nnx.data(None)
        self.adds = adds

    def __call__(self, x):
        y = x @ self.kernel[...]
        return y + self.bias[...][None] if self.adds and self.bias is not None else y


class Held(nnx.Module):
    """Holds its variables in a dict."""

    def __init__(self):
        self.held = nnx.data({"kernel": nnx.Param(sample(3, 3))})
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x @ self.held["kernel"][...])


def chain(*modules):
    return nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), *modules)


def test_what_an_nnx_model_cannot_keep_is_named():
    rngs, x = nnx.Rngs(0), sample(2, 3)
    fold: Any = jaxnorm.nnx.fold
    assert type(fold(chain(Set(3, rngs=rngs)), x).layers[1]) is Identity
    generic = jaxnorm.nnx.Norm(Doubled(), 3)
    for norm in (Own(3, rngs=rngs), generic):
        with pytest.raises(ValueError, match=r"'layers/1', .*(Own|Norm), computes som"):
            fold(chain(norm), x)
    norm = nnx.BatchNorm(3, rngs=rngs)
    model = nnx.Sequential(Product(True), norm)
    model.eval()
    assert_same(fold(model, x)(x), model(x))
    model: Any = nnx.Sequential(Product(False), norm)
    with pytest.raises(ValueError, match="'layers/0', .*Product, does not add its"):
        fold(model, x)
    assert model.layers[0].bias is None and model.layers[1] is norm
    with pytest.raises(ValueError, match="variables at 'held' are not those of a mod"):
        fold(Held(), x)
    relu = jaxnorm.nnx.BatchNorm(3, activation="relu", rngs=rngs)
    model = nnx.Sequential(relu, nnx.Linear(3, 3, rngs=rngs))
    pairs = [Pair("layers/1", "layers/0", 1e-5, norm_first=True)]
    with pytest.raises(ValueError, match="'layers/0' applies activation='relu' before"):
        fold(model, pairs=pairs)
    relu.activation = None
    folded = fold(model, pairs=pairs)
    with pytest.raises(ValueError, match="'layers/0' is folded into the layer after"):
        folded.layers[0](x, residual=x)
    with pytest.raises(ValueError, match="'layers/0' is folded, and normalizes by no"):
        folded.layers[0](x, use_running_average=False)
    with pytest.raises(TypeError, match="model must be a flax.nnx.Module, got.*dict"):
        fold(jaxnorm.nnx.variables(model), x)
