"""Scales of norms in the layers after them: the folded model is the model."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.models import fold_scales

FEATURES = 8
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, FEATURES)), jnp.float32)


def drawn(tree):
    """Values as of a trained model: scales are about 1, and all else about 0."""
    rng = np.random.default_rng(0)

    def draw(path, v):
        center = jax.tree_util.keystr(path[-1:]).count("scale")
        return jnp.asarray(rng.normal(center, 0.5, v.shape), v.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def assert_close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all() and np.abs(want).max() > 0.1
    limit = tolerance * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=limit)


# ---- Linen ------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a transformer, norms first."""

    norm: Any = jaxnorm.linen.LayerNorm
    affine: bool = True
    biases: bool = True

    @nn.compact
    def __call__(self, x):
        flags = {"use_scale": self.affine}
        if "Layer" in self.norm.__name__:
            flags["use_bias"] = self.affine
        attention = nn.MultiHeadDotProductAttention(2, use_bias=self.biases)
        x = x + attention(self.norm(**flags)(x))
        h = self.norm(**flags)(x)
        gate = nn.silu(nn.Dense(3 * FEATURES, use_bias=self.biases)(h))
        h = gate * nn.Dense(3 * FEATURES, use_bias=self.biases)(h)
        return x + nn.Dense(FEATURES)(h)


def zero_centered(use_scale):
    norm = jaxnorm.RMSNorm(zero_centered_scale=True)
    return jaxnorm.linen.Norm(norm, use_scale=use_scale)


NORMS = {
    "layer norm": jaxnorm.linen.LayerNorm,
    "rms norm": jaxnorm.linen.RMSNorm,
    "one plus scale": zero_centered,
    "flax's layer norm": nn.LayerNorm,
    "flax's rms norm": nn.RMSNorm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_block_of_a_transformer(name):
    norm = NORMS[name]
    model, plain = Block(norm), Block(norm, affine=False)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    before = jax.tree.map(np.array, variables)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    folded = fold_scales(model.apply, variables, shape)
    expected = jax.eval_shape(plain.init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, expected)
    assert_close(plain.apply(folded, X), model.apply(variables, X))
    jax.tree.map(lambda v: v.delete(), folded)  # in buffers of its own
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_numbers():
    """Against the formula, in float64."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxnorm.linen.LayerNorm(name="norm")(x)
            return nn.DenseGeneral((2, 3), name="dense")(x)

    variables = drawn(jax.eval_shape(Model().init, jax.random.key(0), X))
    folded = fold_scales(Model().apply, variables, X)["params"]
    exact: Any = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
    norm, dense = exact["norm"], exact["dense"]
    assert [*folded] == ["dense"]
    kernel = np.einsum("i,ihd->ihd", norm["scale"], dense["kernel"])
    np.testing.assert_allclose(folded["dense"]["kernel"], kernel, rtol=2e-7)
    bias = dense["bias"] + np.einsum("i,ihd->hd", norm["bias"], dense["kernel"])
    np.testing.assert_allclose(folded["dense"]["bias"], bias, rtol=0, atol=2e-6)


def test_layers_without_a_bias_get_one_for_that_of_the_norm():
    model = Block(biases=False)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    folded = fold_scales(model.apply, variables, X)
    assert folded["params"]["Dense_0"]["bias"].shape == (3 * FEATURES,)
    of_heads = folded["params"]["MultiHeadDotProductAttention_0"]["query"]["bias"]
    assert of_heads.shape == (2, FEATURES // 2)
    out = {"bias": jnp.zeros(FEATURES)}  # which attention has for all or none
    attention = folded["params"]["MultiHeadDotProductAttention_0"]
    attention["out"] = attention["out"] | out
    y = Block(affine=False).apply(folded, X)
    assert_close(y, model.apply(variables, X))


def test_scales_alone_add_no_bias():
    model = Block(jaxnorm.linen.RMSNorm, biases=False)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    folded = fold_scales(model.apply, variables, X)
    plain = Block(jaxnorm.linen.RMSNorm, affine=False, biases=False)
    assert_close(plain.apply(folded, X), model.apply(variables, X))


def test_some_norms_may_be_chosen():
    variables = drawn(jax.eval_shape(Block().init, jax.random.key(0), X))
    folded = fold_scales(Block().apply, variables, X, where="LayerNorm_1".__eq__)
    params, old = folded["params"], variables["params"]
    assert "LayerNorm_0" in params and "LayerNorm_1" not in params
    np.testing.assert_array_equal(params["Dense_2"]["kernel"], old["Dense_2"]["kernel"])


def test_boxes_and_dtypes_stay():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, ("model",))
            x = jaxnorm.linen.RMSNorm(scale_init=init, dtype=jnp.bfloat16)(x)
            init = nn.with_partitioning(nn.initializers.ones, ("model", None))
            settings = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
            return nn.Dense(3, kernel_init=init, use_bias=False, **settings)(x)

    variables = Model().init(jax.random.key(0), X)
    kernel = fold_scales(Model().apply, variables, X)["params"]["Dense_0"]["kernel"]
    assert kernel.names == ("model", None) and kernel.value.dtype == jnp.bfloat16


class Layer(nn.Module):
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        norm = jaxnorm.linen.RMSNorm(use_scale=self.affine)
        return x + nn.Dense(FEATURES)(norm(x)), None


def test_stacked_layers_are_folded_one_by_one():
    def stacked(affine):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(Layer, length=3, **axes)(affine)

    model = stacked(True)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    with pytest.raises(ValueError, match=r"RMSNorm_0: its scale, of shape \(3, 8\)"):
        fold_scales(model.apply, variables, X)
    one = Layer().apply
    folded = jax.vmap(lambda variables: fold_scales(one, variables, X))(variables)
    assert_close(stacked(False).apply(folded, X)[0], model.apply(variables, X)[0])


# ---- What is refused --------------------------------------------------------------


def norm(x, params, shift=True):
    bias = params["norm"].get("bias") if shift else None
    return jaxnorm.layer_norm(x, params["norm"]["scale"], bias)


def product(x, params, name="dense"):
    return x @ params[name]["kernel"] + params[name]["bias"]


def residual(x, params):
    x = norm(x, params)
    return x + product(x, params)


def returned(x, params):
    x = norm(x, params)
    return product(x, params), x


def activated(x, params):
    return product(jax.nn.relu(norm(x, params)), params)


def shared_kernel(x, params):
    return product(product(norm(x, params), params), params)


def tied(x, params):
    return norm(x, params) @ params["embed"]["embedding"].T


def another_axis(x, params):
    return jnp.einsum("bld,lk->bkd", norm(x, params), params["long"]["kernel"])


def several_axes(x, params):
    return jnp.einsum("bld,ldk->bk", norm(x, params), params["both"]["kernel"])


def split_features(x, params):
    x = norm(x, params).reshape(2, 5, 2, 4)
    return x @ params["half"]["kernel"]


def bias_that_is_not_added(x, params):
    dense = params["dense"]
    return norm(x, params) @ dense["kernel"] * dense["bias"]


def twice_the_bias_of_heads(x, params):
    heads = params["heads"]
    y = jnp.einsum("bld,dhk->blhk", norm(x, params), heads["kernel"])
    return y + 2 * heads["bias"]


def scaled_bias(x, params):
    return product(norm(x, params) * 0.5, params)


def twice_the_bias(x, params):
    x = norm(x, params) + params["norm"]["bias"]
    return product(x, params)


def without_bias(x, params):
    x, bias = norm(x, params, shift=False), params["norm"]["bias"]
    return product(x, params) + bias


def minus_the_bias(x, params):
    return product(norm(x, params, shift=False) - params["norm"]["bias"], params)


def divided_by_the_scale(x, params):
    return product(x / params["norm"]["scale"] + params["norm"]["bias"], params)


def squared_scale(x, params):
    return product(norm(x, params) * params["norm"]["scale"], params)


def with_and_without_offset(x, params):
    scale = params["norm"]["scale"]
    x = jaxnorm.rms_norm(x, 1 + scale) + jaxnorm.rms_norm(x, scale)
    return product(x + params["norm"]["bias"], params)


def offset_by_another(x, params):
    scale = params["norm"]["scale"] + params["dense"]["bias"]
    return product(jaxnorm.rms_norm(x, scale), params)


def offset_of_a_part(x, params):
    scale = 1 + 0.5 * params["norm"]["scale"]
    return product(jaxnorm.rms_norm(x, scale), params)


def twice_the_scale(x, params):
    scale = params["norm"]["scale"] + params["norm"]["scale"]
    return product(jaxnorm.rms_norm(x, scale + 1), params)


def offset_of_each(x, params):
    scale = params["norm"]["scale"] + jnp.arange(8.0)
    return product(jaxnorm.rms_norm(x, scale), params)


def masked(x, params):
    x = jaxnorm.layer_norm(x, **params["norm"], mask=x > 0)
    return product(x, params)


def convolved(x, params):
    x, kernel = norm(x, params), params["conv"]["kernel"]
    dims = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, kernel, [1], "VALID", dimension_numbers=dims)


def unread(x, params):
    return product(x, params)


REFUSED = {
    residual: "'add' reads it, which is no layer|something is added that is not scaled",
    returned: "the model returns it",
    activated: "'max' reads it, which is no layer",
    shared_kernel: "the kernel of the layer at 'dense' is read elsewhere, too",
    tied: "'dot_general' reads it, which is no layer",
    another_axis: "'long' sums over more than the features, or along another axis",
    several_axes: "'both' sums over more than the features",
    split_features: r"split or spread by 'reshape', from shape \(2, 5, 8\)",
    bias_that_is_not_added: "'dense' does not add its bias to its output",
    twice_the_bias_of_heads: "'heads' does not add its bias to its output, as it is",
    scaled_bias: "what is scaled, or its bias, is multiplied by something",
    twice_the_bias: "its scale and bias are not added along one axis",
    without_bias: "something is added that is not scaled",
    minus_the_bias: "reads it without its scale or its bias",
    divided_by_the_scale: "something is divided by it",
    squared_scale: "what is scaled, or its bias, is multiplied by something",
    with_and_without_offset: "its scale and bias are not added along one axis",
    offset_by_another: "something is added that is not scaled",
    offset_of_a_part: "something is added that is not scaled",
    twice_the_scale: "something is added that is not scaled",
    offset_of_each: "something is added that is not scaled",
    masked: "'select_n' reads it, which is no layer",
    convolved: "the layer at 'conv' is a convolution",
    unread: "no layer reads it",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_what_is_not_exact_is_refused(model):
    layers = {
        "dense": (FEATURES, FEATURES),
        "long": (5, 3),
        "both": (5, FEATURES, 3),
        "half": (4, 4),
        "heads": (FEATURES, 2, 4),
        "conv": (1, FEATURES, 3),
    }
    params: Any = {k: {"kernel": jnp.ones(shape)} for k, shape in layers.items()}
    params["dense"]["bias"] = jnp.ones(FEATURES)
    params["heads"]["bias"] = jnp.ones((2, 4))
    params["norm"] = {"scale": jnp.ones(FEATURES), "bias": jnp.ones(FEATURES)}
    params["embed"] = {"embedding": jnp.ones((3, FEATURES))}

    def apply(variables, x):
        with jax.numpy_rank_promotion("allow"):
            return model(x, variables["params"])

    words = f"(?s)cannot be folded.*norm: .*({REFUSED[model]}).*with `where`"
    with pytest.raises(ValueError, match=words):
        fold_scales(apply, {"params": params}, X)


def test_one_number_for_all_features_is_no_scale_of_them():
    def apply(variables, x):
        scale, dense = (variables["params"][k] for k in ("norm", "dense"))
        return (x * scale["scale"].reshape(1, 1, 1)) @ dense["kernel"]

    params = {"norm": {"scale": jnp.ones(1)}, "dense": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match="norm: 'mul' broadcasts its features"):
        fold_scales(apply, {"params": params}, X)


def test_other_norms_are_named():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(jaxnorm.linen.GroupNorm(2)(x))
            x = nn.Dense(4)(jaxnorm.linen.BatchNorm(True)(x))
            return nn.Dense(4)(jaxnorm.linen.Norm(jaxnorm.DynamicTanh())(x))

    variables = Model().init(jax.random.key(0), X)
    words = r"(?s)GroupNorm_0: its features are split.*\n    Norm_0: it has .*'alpha'"
    with pytest.raises(ValueError, match=words):
        fold_scales(Model().apply, variables, X)
    with pytest.raises(ValueError, match="`where` means none of the norms with a sca"):
        fold_scales(Model().apply, variables, X, where="BatchNorm_0".__eq__)


# ---- NNX --------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    def __init__(self, norm, rngs, **flags):
        self.norm1, self.norm2 = (norm(FEATURES, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            2, FEATURES, decode=False, rngs=rngs, **flags
        )
        self.layers = nnx.List(
            [
                nnx.Linear(FEATURES, 3 * FEATURES, rngs=rngs, **flags),
                nnx.Linear(3 * FEATURES, FEATURES, rngs=rngs),
            ]
        )

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        up, down = self.layers
        return x + down(nnx.gelu(up(self.norm2(x))))


def generic(num_features, rngs):
    return jaxnorm.nnx.Norm(jaxnorm.RMSNorm(), (num_features,), rngs=rngs)


NNX_NORMS = {
    "layer norm": jaxnorm.nnx.LayerNorm,
    "rms norm": jaxnorm.nnx.RMSNorm,
    "generic": generic,
    "flax's layer norm": nnx.LayerNorm,
    "flax's rms norm": nnx.RMSNorm,
}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", NNX_NORMS)
def test_an_nnx_block_is_folded_into_a_copy(name, use_bias):
    model = NNXBlock(NNX_NORMS[name], nnx.Rngs(0), use_bias=use_bias)
    model.eval()
    nnx.update(model, drawn(nnx.state(model, nnx.Param)))
    before = jax.tree.map(np.array, nnx.state(model))
    folded = jaxnorm.nnx.fold_scales(model, X)
    for module in (folded.norm1, folded.norm2):
        assert not jax.tree.leaves(nnx.state(module))
        assert not getattr(module, "use_scale", False)
    assert_close(folded(X), model(X))
    jax.tree.map(lambda v: v.delete(), nnx.state(folded))  # in buffers of its own
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


class OwnNorm(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(FEATURES))

    def __call__(self, x):
        return jaxnorm.rms_norm(x, self.scale[...])


class Kernel(nnx.Module):
    """A layer that has no place for a bias, or does not add it."""

    def __init__(self, **bias):
        self.kernel = nnx.Param(jnp.ones((FEATURES, 3)))
        for name, value in bias.items():
            setattr(self, name, value)

    def __call__(self, x):
        return x @ self.kernel[...]


def test_what_an_nnx_model_cannot_fold_is_said():
    rngs = nnx.Rngs(0)
    layer, norm = nnx.Linear(8, 3, rngs=rngs), jaxnorm.nnx.LayerNorm(8, rngs=rngs)
    for modules, words in (
        ((OwnNorm(), layer), "'layers/0' is .*OwnNorm, which may need its parameters"),
        ((norm, Kernel()), "'layers/1', Kernel, has no attribute 'bias'"),
        ((norm, Kernel(bias=nnx.data(None))), "'layers/1' does not add its bias"),
        ((norm, nnx.relu, layer), "layers/0: 'max' reads it, which is no layer"),
        ((nnx.relu, layer), "there are no norms with a scale"),
    ):
        with pytest.raises(ValueError, match=words):
            jaxnorm.nnx.fold_scales(nnx.Sequential(*modules), X)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: fold_scales(nn.Dense(3), {}, X), r"fold_scales\(model\.apply"),
        (lambda: fold_scales(Kernel(), {}, X), r"jaxnorm\.nnx\.fold_scales\(model"),
        (
            lambda: fold_scales(print, cast(Any, 3), X),
            "variables must be nested mappings",
        ),
        (
            lambda: jaxnorm.nnx.fold_scales(cast(Any, {}), X),
            "model must be a flax.nnx.Module",
        ),
    ],
)
def test_other_kinds_of_arguments_are_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_a_kernel_that_reads_the_norm_twice_is_scaled_once():
    params = {
        "norm": {"scale": jnp.array([3.0, 4.0])},
        "q": {"kernel": jnp.ones((2, 1))},
    }

    def apply(variables, x):
        p = variables["params"]
        y = jaxnorm.rms_norm(x, p["norm"].get("scale"))
        return y @ p["q"]["kernel"], (2 * y) @ p["q"]["kernel"]

    x = jnp.array([[1.0, 2.0]])
    folded = fold_scales(apply, {"params": params}, x)
    np.testing.assert_array_equal(folded["params"]["q"]["kernel"], [[3.0], [4.0]])


def either_axis(x, scale, kernel):
    y = jaxnorm.rms_norm(x, scale)
    return y @ kernel, y @ kernel.T


def with_and_without_an_offset(x, scale, kernel):
    return jaxnorm.rms_norm(x, scale) @ kernel, jaxnorm.rms_norm(x, 1 + scale) @ kernel


@pytest.mark.parametrize("model", [either_axis, with_and_without_an_offset])
def test_a_kernel_that_reads_the_norm_in_two_ways_is_refused(model):
    """Scaled for one of them, it would be wrong for the other."""
    square = jnp.ones((FEATURES, FEATURES))
    params = {"norm": {"scale": jnp.ones(FEATURES)}, "q": {"kernel": square}}

    def apply(variables, x):
        p = variables["params"]
        return model(x, p["norm"]["scale"], p["q"]["kernel"])

    words = "norm: a layer reads it along several axes, or with several offsets"
    with pytest.raises(ValueError, match=words):
        fold_scales(apply, {"params": params}, X)
