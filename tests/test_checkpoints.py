"""Models of torch, Keras and Haiku and their twins: names, layouts, training, errors.

What the others compute is in tests/golden/checkpoints.npz, from checkpoints.py there.
"""

import functools
import pathlib
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx
from flax.core import freeze as frozen_dict
from named_values import filled
from torch_resnet import ResNet, torch_name

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm.linen import BatchNorm

PATH = pathlib.Path(__file__).parent / "golden" / "checkpoints.npz"
GOLDEN = dict(np.load(PATH))


def case(name, when=""):
    """The arrays of a case, or of its model before or after training."""
    start = f"{name}/{when}/" if when else f"{name}/"
    found = {k[len(start) :]: v for k, v in GOLDEN.items() if k.startswith(start)}
    assert found, start
    return found


def shapes_of(model, *args, dtype: Any = np.float64, **kwargs) -> Any:
    """The variables of a Linen model, as shapes of `dtype`; counts stay integers."""
    found = jax.eval_shape(
        functools.partial(model.init, **kwargs), jax.random.key(0), *args
    )
    return jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(
            v.shape, v.dtype if v.dtype == np.int32 else dtype
        ),
        found,
    )


def same(actual, desired):
    """The same keys, each with the same bits."""
    assert sorted(actual) == sorted(desired)
    for key, value in desired.items():
        assert actual[key].dtype == value.dtype, key
        np.testing.assert_array_equal(actual[key], value, err_msg=key)


def flat(tree):
    """The leaves of a tree by their paths."""
    leaves, name = jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): v for path, v in leaves}


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


# ---- Fifty steps of torch and of its twin -----------------------------------------


class Twin(nn.Module):
    """The model of `torch_training`, with norms of torch's arguments."""

    @nn.compact
    def __call__(self, x, train):
        def norm(name, momentum):
            settings = jaxnorm.models.norm_settings(
                "torch", eps=1e-3, momentum=momentum
            )
            return BatchNorm(use_running_average=not train, name=name, **settings)

        padding = ((1, 1), (1, 1))
        conv1 = nn.Conv(6, (3, 3), padding=padding, use_bias=False, name="conv1")
        x = nn.relu(norm("bn1", 0.1)(conv1(x)))
        conv2 = nn.Conv(
            8, (3, 3), 2, padding="VALID", feature_group_count=2, name="conv2"
        )
        x = nn.relu(norm("bn2", None)(conv2(x)))
        return nn.Dense(4, name="fc")(x.mean((1, 2)))


def trained(variables, images, labels, steps):
    """Losses of SGD as in `torch_training`, and the variables after it."""
    model, optimizer = Twin(), optax.sgd(0.05, momentum=0.9)

    def loss_fn(params, stats, x, y):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new["batch_stats"]

    def step(state, batch):
        params, stats, opt_state = state
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(params, stats, *batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    @jax.jit
    def run(params, stats):
        turns = np.arange(steps) % len(images)
        state = params, stats, optimizer.init(params)
        return jax.lax.scan(step, state, (images[turns], labels[turns]))

    (params, stats, _), losses = run(variables["params"], variables["batch_stats"])
    return losses, {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("dtype, limit", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_a_twin_trains_as_torch_does(in_float64, dtype, limit):
    g = case("torch_training")
    images = g["images"].astype(dtype)
    template = shapes_of(Twin(), images[0], dtype=dtype, train=True)
    variables, report = jaxnorm.models.from_checkpoint(
        "torch", case("torch_training", "start"), template
    )
    assert report.dropped == ("bn1.num_batches_tracked",)

    losses, end = trained(variables, images, g["labels"], len(g["losses"]))
    np.testing.assert_allclose(losses, g["losses"], rtol=limit)
    y = jax.jit(functools.partial(Twin().apply, train=False))(end, images[0])
    np.testing.assert_allclose(y, g["y"], rtol=limit, atol=limit)

    # What torch counts in bn1 has no place here and no effect there.
    desired = case("torch_training", "end") | {"bn1.num_batches_tracked": np.int64(0)}
    state_dict = jaxnorm.models.to_checkpoint("torch", end)
    assert sorted(state_dict) == sorted(desired)
    assert state_dict["bn2.num_batches_tracked"] == 50
    for key, value in desired.items():
        np.testing.assert_allclose(state_dict[key], value, rtol=limit, atol=limit)
        assert state_dict[key].dtype in (dtype, np.int64)


# ---- ResNets by the names of torchvision and timm ---------------------------------


RESNETS = {
    "torchvision_basic": ResNet((1, 1, 1, 1)),
    "torchvision_bottleneck": ResNet(
        (2, 1, 1, 1), bottleneck=True, groups=4, group_width=4
    ),
    "timm_basic": ResNet((2, 1, 1, 1), widths=(16, 24, 32, 40)),
    "timm_bottleneck_d": ResNet(
        (1, 1, 1, 1), bottleneck=True, widths=(8, 16, 24, 32), deep_stem=True
    ),
}


def named_checkpoint(name):
    """The state dict of one of the ResNets, with the values that its names decide."""
    lines = [str(line).split(" ") for line in GOLDEN[f"{name}/shapes"]]
    shapes = {k: tuple(int(n) for n in text.split(",") if n) for k, text in lines}
    return {k: np.asarray(filled(k, shape)) for k, shape in shapes.items()}


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_maps_and_evaluates_alike(in_float64, name):
    model, checkpoint = RESNETS[name], named_checkpoint(name)
    images = filled("images", (2, 32, 32, 3)).astype(np.float64)
    variables, report = jaxnorm.models.from_checkpoint(
        "torch", checkpoint, shapes_of(model, images), rename=torch_name
    )
    counts = [k for k in checkpoint if k.endswith("num_batches_tracked")]
    assert list(report.dropped) == counts
    assert len(report.mapped) + len(counts) == len(checkpoint)
    y = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(y, GOLDEN[f"{name}/y"], rtol=1e-9, atol=1e-9)


# ---- Every kind of layer ----------------------------------------------------------


class TorchLayers(nn.Module):
    transpose_kernel: bool

    @nn.compact
    def __call__(self, tokens):
        up = functools.partial(nn.ConvTranspose, transpose_kernel=self.transpose_kernel)
        x = nn.Embed(7, 4, name="embed")(tokens)
        # Padding 1 of torch is 3 - 1 - 1 here, and its 0 is 2 - 1 - 0.
        x = up(4, (3, 2), (2, 2), padding=((1, 1), (1, 1)), name="up")(x)
        x = up(6, (3, 3), padding="VALID", name="wider")(x)
        settings = jaxnorm.models.norm_settings("torch", "GroupNorm", num_groups=2)
        x = nn.GroupNorm(**settings, name="group_norm")(x)
        line = nn.Conv(6, 3, padding="VALID", feature_group_count=6, name="line")
        settings = jaxnorm.models.norm_settings("torch", "LayerNorm")
        x = nn.LayerNorm(**settings, name="layer_norm")(line(x.mean(1)))
        return nn.Dense(3, name="fc")(x)


def torch_layers(transpose_kernel):
    kind = "transpose_kernel" if transpose_kernel else "conv_transpose"
    tokens = case("torch_layers")["tokens"]
    model = TorchLayers(transpose_kernel)
    return model, tokens, None, {"up": kind, "wider": kind}


class KerasLayers(nn.Module):
    transpose_kernel: bool

    @nn.compact
    def __call__(self, x):
        up = functools.partial(
            nn.ConvTranspose, transpose_kernel=self.transpose_kernel, padding="VALID"
        )

        def settings(method="BatchNorm", **arguments):
            return jaxnorm.models.norm_settings("keras", method, **arguments)

        norm = functools.partial(BatchNorm, use_running_average=True, **settings())
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = norm(use_scale=False)(nn.Conv(4, (3, 3), feature_group_count=4)(x))
        x = up(5, (3, 2), (2, 2))(x)
        x = nn.GroupNorm(**settings("GroupNorm", groups=1))(x)
        x = up(5, (2, 2))(x).mean((1, 2))
        x = nn.Dense(6)(nn.LayerNorm(**settings("LayerNorm"))(x))
        return nn.Dense(2)(nn.RMSNorm(**settings("RMSNorm"))(x))


KERAS_NAMES = {
    "BatchNorm_0": "sequential/batch_normalization",
    "BatchNorm_1": "sequential/batch_normalization_1",
    "ConvTranspose_0": "sequential/conv2d_transpose",
    "ConvTranspose_1": "sequential/conv2d_transpose_1",
    "Conv_0": "sequential/conv2d",
    "Conv_1": "sequential/depthwise_conv2d",
    "Dense_0": "sequential/dense",
    "Dense_1": "sequential/dense_1",
    "GroupNorm_0": "sequential/group_normalization",
    "LayerNorm_0": "sequential/layer_normalization",
    "RMSNorm_0": "sequential/rms_normalization",
}


def keras_layers(transpose_kernel):
    kind = "transpose_kernel" if transpose_kernel else "conv_transpose"
    kinds = {"ConvTranspose_0": kind, "ConvTranspose_1": kind, "Conv_1": "depthwise"}
    x = case("keras_layers")["x"].astype(np.float64)
    return KerasLayers(transpose_kernel), x, KERAS_NAMES, kinds


class HaikuLayers(nn.Module):
    transpose_kernel: bool

    @nn.compact
    def __call__(self, x):
        up = functools.partial(nn.ConvTranspose, transpose_kernel=self.transpose_kernel)

        def settings(method="BatchNorm", **arguments):
            return jaxnorm.models.norm_settings("haiku", method, **arguments)

        x = nn.Conv(4, (3, 3), use_bias=False, name="conv2_d")(x)
        norm = BatchNorm(
            use_running_average=True, name="batch_norm", **settings(decay_rate=0.5)
        )
        x = up(5, (3, 2), (2, 2), name="conv2_d_transpose")(nn.relu(norm(x)))
        x = up(5, (3, 3), name="conv2_d_transpose_1")(x)
        x = nn.Conv(5, (3, 3), feature_group_count=5, name="depthwise_conv2_d")(x)
        x = nn.LayerNorm(name="layer_norm", **settings("LayerNorm"))(x.mean((1, 2)))
        x = nn.Dense(6, name="linear_1")(x)
        x = nn.RMSNorm(name="rms_norm", **settings("RMSNorm"))(x)
        return nn.Dense(2, name="linear")(x)


def haiku_layers(transpose_kernel):
    kind = "transpose_kernel" if transpose_kernel else "conv_transpose"
    kinds = {"conv2_d_transpose": kind, "conv2_d_transpose_1": kind}
    return HaikuLayers(transpose_kernel), case("haiku_layers")["x"], None, kinds


def haiku_checkpoint():
    """As Haiku nests it: {"params": {module: {name: array}}, "state": ...}."""
    out = {}
    for key, value in case("haiku_layers", "start").items():
        collection, _, rest = key.partition("/")
        module, _, name = rest.rpartition("/")
        out.setdefault(collection, {}).setdefault(module, {})[name] = value
    return out


LAYERS = {"torch": torch_layers, "keras": keras_layers, "haiku": haiku_layers}


def converted(framework, transpose_kernel=False):
    """A model of one of each layer, its input, checkpoint, variables, and how."""
    model, x, rename, kinds = LAYERS[framework](transpose_kernel)
    how = {"rename": rename, "kinds": kinds}
    checkpoint = case(f"{framework}_layers", "start")
    if framework == "haiku":
        checkpoint = haiku_checkpoint()
    template = shapes_of(model, x)
    variables, report = jaxnorm.models.from_checkpoint(
        framework, checkpoint, template, **how
    )
    return model, x, checkpoint, variables, report, how


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("framework", LAYERS)
def test_every_layer_evaluates_alike(in_float64, framework, transpose_kernel):
    model, x, _, variables, _, _ = converted(framework, transpose_kernel)
    y = jax.jit(model.apply)(variables, x)
    # Keras's batch norm computes in float32, whatever it is given.
    limit = 1e-5 if framework == "keras" else 1e-9
    np.testing.assert_allclose(y, case(f"{framework}_layers")["y"], limit, limit)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_round_trips_are_exact(in_float64, framework, transpose_kernel):
    _, _, checkpoint, variables, _, how = converted(framework, transpose_kernel)
    back = jaxnorm.models.to_checkpoint(
        framework, variables, template=checkpoint, **how
    )
    same(back, checkpoint)
    assert all(v.flags.c_contiguous and v.flags.writeable for v in back.values())
    # Without a template nothing tells that a norm is Keras's RMSNormalization.
    back = jaxnorm.models.to_checkpoint(framework, variables, **how)
    same(
        {
            k.replace("rms_normalization/gamma", "rms_normalization/scale"): v
            for k, v in back.items()
        },
        checkpoint,
    )


def test_the_round_trip_of_haiku(in_float64):
    """The averages are as they were; what they are made of is of many steps."""
    _, _, checkpoint, variables, report, how = converted("haiku")
    state = [k for k in case("haiku_layers", "start") if k.startswith("state")]
    assert {*report.dropped} == {k for k in state if not k.endswith("average")}
    back = jaxnorm.models.to_checkpoint("haiku", variables, template=checkpoint, **how)
    same(flat(back["params"]), flat(checkpoint["params"]))
    for name, before in checkpoint["state"].items():
        after = back["state"][name]
        np.testing.assert_array_equal(after["average"], before["average"])
        assert after["counter"].dtype == np.int32 and after["counter"].shape == ()
        # As in hk.ExponentialMovingAverage, at the decay rate that is the slowest.
        debiased = after["hidden"] / (1 - 0.999999 ** int(after["counter"]))
        np.testing.assert_array_equal(debiased, before["average"])


def test_a_resnet_goes_back_bit_for_bit(in_float64):
    checkpoint = named_checkpoint("timm_bottleneck_d")
    template = shapes_of(
        RESNETS["timm_bottleneck_d"], jnp.zeros((1, 32, 32, 3)), dtype=np.float32
    )
    variables, _ = jaxnorm.models.from_checkpoint(
        "torch", checkpoint, template, rename=torch_name
    )
    back = jaxnorm.models.to_checkpoint("torch", variables, rename=torch_name)
    counts = {k: np.int64(0) for k in checkpoint if k.endswith("tracked")}
    same(back, checkpoint | counts)


# ---- Weight norm and spectral norm ------------------------------------------------


class LinenWrappers(nn.Module):
    """The model of `torch_wrappers`, wrapped in place."""

    @nn.compact
    def __call__(self, x):
        norm, spectral = jaxnorm.linen.WeightNorm, jaxnorm.linen.SpectralNorm
        up = nn.ConvTranspose(6, (2, 2), (2, 2), padding="VALID", name="1")
        x = norm(nn.Conv(4, (3, 3), name="0"))(x)
        x = norm(up, feature_axes=-2)(x)  # torch's are the inputs here
        x = spectral(nn.Conv(5, (3, 3), name="2"))(x, update_stats=False)
        x = norm(nn.Dense(4, name="5"), feature_axes=None)(x.mean((1, 2)))
        x = spectral(nn.Dense(6, name="6"))(x, update_stats=False)
        last = nn.Dense(5, use_bias=False, name="7")
        x = spectral(last)(x, update_stats=False)
        return norm(nn.Dense(3, name="8"))(x)


class LinenHolders(nn.Module):
    """The same, whose wrappers hold their layers."""

    def setup(self):
        norm, spectral = jaxnorm.linen.WeightNorm, jaxnorm.linen.SpectralNorm
        up = nn.ConvTranspose(6, (2, 2), (2, 2), padding="VALID")
        self.layers = [
            norm(nn.Conv(4, (3, 3))),
            norm(up, feature_axes=-2),
            spectral(nn.Conv(5, (3, 3))),
            norm(nn.Dense(4), feature_axes=None),
            spectral(nn.Dense(6)),
            spectral(nn.Dense(5, use_bias=False)),
            norm(nn.Dense(3)),
        ]

    def __call__(self, x):
        a, b, c, *others, last = self.layers
        x = c(b(a(x)), update_stats=False).mean((1, 2))
        x = others[0](x)
        x = others[2](others[1](x, update_stats=False), update_stats=False)
        return last(x)


def nnx_wrappers():
    rngs = nnx.Rngs(0)
    norm = functools.partial(jaxnorm.nnx.WeightNorm, rngs=rngs)
    spectral = functools.partial(jaxnorm.nnx.SpectralNorm, rngs=rngs)
    up = nnx.ConvTranspose(4, 6, (2, 2), (2, 2), padding="VALID", rngs=rngs)
    model = nnx.Sequential(
        norm(nnx.Conv(3, 4, (3, 3), rngs=rngs)),
        norm(up, feature_axes=-2),
        spectral(nnx.Conv(6, 5, (3, 3), rngs=rngs)),
        lambda x: x.mean((1, 2)),
        lambda x: x,
        norm(nnx.Linear(5, 4, rngs=rngs), feature_axes=None),
        spectral(nnx.Linear(4, 6, rngs=rngs)),
        spectral(nnx.Linear(6, 5, use_bias=False, rngs=rngs)),
        norm(nnx.Linear(5, 3, rngs=rngs)),
    )
    model.eval()
    return model


HELD = {f"layers_{i}": str(n) for i, n in enumerate((0, 1, 2, 5, 6, 7, 8))}
OF_WRAPPERS: dict[str, dict[str, Any]] = {
    "linen": {"kinds": {"1": "conv_transpose"}},
    "held": {"rename": HELD, "kinds": {"layers_1": "conv_transpose"}},
    "nnx": {"rename": {"layers": ""}, "kinds": {"layers/1": "conv_transpose"}},
}


def wrappers(name):
    """The model, its variables, and the report of them."""
    checkpoint, x = case("torch_wrappers", "start"), case("torch_wrappers")["images"]
    model: Any = nnx_wrappers() if name == "nnx" else LinenWrappers()
    model = LinenHolders() if name == "held" else model
    template = jaxnorm.nnx.variables(model) if name == "nnx" else shapes_of(model, x)
    in_float64 = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, np.float64), template
    )
    variables, report = jaxnorm.models.from_checkpoint(
        "torch", checkpoint, in_float64, **OF_WRAPPERS[name]
    )
    return model, variables, report


@pytest.mark.parametrize("name", OF_WRAPPERS)
def test_wrapped_layers_evaluate_alike(in_float64, name):
    model, variables, report = wrappers(name)
    x = np.asarray(case("torch_wrappers")["images"], np.float64)
    if name == "nnx":
        called = jax.tree.map(lambda v: v.astype(np.float64), nnx.state(model))
        nnx.update(model, called)
        jaxnorm.nnx.update(model, variables)
        y = model(x)
    else:
        y = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(y, case("torch_wrappers")["y"], 1e-9, 1e-9)
    dropped = ["2.weight_v", "6.parametrizations.weight.0._v", "7.weight_v"]
    assert sorted(report.dropped) == dropped


@pytest.mark.parametrize("name", OF_WRAPPERS)
def test_wrapped_layers_go_back(in_float64, name):
    """Bit for bit, but for the vector that torch keeps and Flax does not."""
    checkpoint = case("torch_wrappers", "start")
    _, variables, _ = wrappers(name)
    how = OF_WRAPPERS[name]
    back = jaxnorm.models.to_checkpoint("torch", variables, template=checkpoint, **how)
    left = {key for key in checkpoint if key.endswith("_v") and key[:-1] + "u" in back}
    assert len(left) == 3
    for key in left:
        np.testing.assert_allclose(back.pop(key), checkpoint.pop(key), 1e-9, 1e-9)
    same(back, checkpoint)

    # Without a template, under the names of the kind that is not deprecated.
    back = jaxnorm.models.to_checkpoint("torch", variables, **how)
    scale = back.pop("8.parametrizations.weight.original0")
    np.testing.assert_array_equal(scale, checkpoint["8.weight_g"])
    assert back["7.parametrizations.weight.0._v"].shape == (6,)
    assert back["1.parametrizations.weight.original0"].shape == (4, 1, 1, 1)
    assert not [key for key in back if re.search("weight_|_sigma", key)]


def test_sigma_is_that_of_the_kernel(in_float64):
    _, variables, report = wrappers("linen")
    sigma = variables["batch_stats"]["SpectralNorm_1"]["6/kernel/sigma"]
    kernel = case("torch_wrappers", "start")["6.parametrizations.weight.original"]
    np.testing.assert_allclose(sigma, np.linalg.svd(kernel)[1][0], 1e-9)
    mapped = {row.path: row for row in report.mapped}
    row = mapped["batch_stats/SpectralNorm_1/6/kernel/sigma"]
    assert row.key == "6.parametrizations.weight.original"
    assert row.change == "its largest singular value"


def test_the_vector_that_torch_keeps(in_float64):
    """Of a transposed convolution, whose outputs are the second axis in torch."""
    kernel = np.random.default_rng(0).normal(size=(2, 3, 3, 4))
    u = np.linalg.svd(kernel.reshape(-1, 4))[2][:1]
    params = {"up": {"kernel": kernel}}
    stats = {"SpectralNorm_0": {"up/kernel/u": u, "up/kernel/sigma": np.ones(())}}
    back = jaxnorm.models.to_checkpoint(
        "torch",
        {"params": params, "batch_stats": stats},
        kinds={"up": "conv_transpose"},
    )
    matrix = np.moveaxis(back["up.parametrizations.weight.original"], 1, 0)
    v = back["up.parametrizations.weight.0._v"]
    np.testing.assert_allclose(np.linalg.norm(v), 1, 1e-12)
    image = matrix.reshape(4, -1) @ v
    np.testing.assert_allclose(image / np.linalg.norm(image), u[0], 1e-9, 1e-9)


def test_torch_loads_wrapped_layers(in_float64):
    torch = pytest.importorskip("torch")
    _, variables, _ = wrappers("linen")
    kinds = OF_WRAPPERS["linen"]
    state_dict = jaxnorm.models.to_checkpoint("torch", variables, **kinds)
    parametrized = torch.nn.utils.parametrizations
    norm = parametrized.weight_norm(torch.nn.Linear(5, 3))
    spectral = parametrized.spectral_norm(torch.nn.Linear(4, 6))
    for module, name in ((norm, "8."), (spectral, "6.")):
        own = {
            k.removeprefix(name): torch.from_numpy(v)
            for k, v in state_dict.items()
            if k.startswith(name)
        }
        module.double().load_state_dict(own)
    kernel = case("torch_wrappers", "start")["8.weight_v"]
    scale = case("torch_wrappers", "start")["8.weight_g"]
    expected = kernel / np.linalg.norm(kernel, axis=1, keepdims=True) * scale
    np.testing.assert_allclose(norm.weight.detach().numpy(), expected, 1e-9)
    largest = np.linalg.svd(spectral.eval().weight.detach().numpy())[1][0]
    np.testing.assert_allclose(largest, 1, 1e-9)


def test_what_does_not_fit_a_wrapper_is_named():
    def ones(*shape):
        return np.ones(shape, np.float32)

    def problems(source, template):
        return "\n".join(raised(source, template))

    template = {
        "params": {
            "WeightNorm_0": {"a/kernel/scale": ones(3)},
            "a": {"kernel": ones(2, 3), "bias": ones(3)},
        }
    }
    arrays = {"a.weight_v": ones(3, 2), "a.weight": ones(3, 2)}
    text = problems(arrays | {"a.weight_g": ones(1, 2)}, template)
    assert "scale: 'a.weight_g' of shape (1, 2) becomes (1, 2), the template" in text
    assert "not used: 'a.weight'" in text
    text = problems({"a.weight": ones(3, 2), "a.bias": ones(3)}, template)
    assert "scale: there is no 'a.parametrizations.weight.original0'" in text


# ---- Trees, dtypes, files ---------------------------------------------------------


def small_state_dict(dtype: Any = np.float32) -> dict[str, Any]:
    """A convolution, a norm and a dense layer of torch."""
    names = {
        "conv.weight": (4, 3, 2, 2),
        "bn.weight": (4,),
        "bn.bias": (4,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "bn.num_batches_tracked": (),
        "fc.weight": (2, 4),
        "fc.bias": (2,),
    }
    found = {k: np.asarray(filled(k, shape)) for k, shape in names.items()}
    return {k: v.astype(dtype if v.ndim else v.dtype) for k, v in found.items()}


def small_template(dtype: Any = np.float32) -> dict[str, Any]:
    def leaf(*shape):
        return np.zeros(shape, dtype)

    return {
        "params": {
            "conv": {"kernel": leaf(2, 2, 3, 4)},
            "bn": {"scale": leaf(4), "bias": leaf(4)},
            "fc": {"kernel": leaf(4, 2), "bias": leaf(2)},
        },
        "batch_stats": {"bn": {"mean": leaf(4), "var": leaf(4)}},
    }


def test_each_statistic_and_parameter_is_where_it_belongs():
    source = small_state_dict()
    variables, _ = jaxnorm.models.from_checkpoint("torch", source, small_template())
    desired = {
        "batch_stats/bn/mean": source["bn.running_mean"],
        "batch_stats/bn/var": source["bn.running_var"],
        "params/bn/bias": source["bn.bias"],
        "params/bn/scale": source["bn.weight"],
        "params/conv/kernel": np.moveaxis(source["conv.weight"], (0, 1), (3, 2)),
        "params/fc/bias": source["fc.bias"],
        "params/fc/kernel": source["fc.weight"].T,
    }
    same({k: np.asarray(v) for k, v in flat(variables).items()}, desired)


def test_the_report_prints_as_a_table():
    _, report = jaxnorm.models.from_checkpoint(
        "torch",
        small_state_dict(np.float16) | {"ema.decay": np.float32(1)},
        small_template(),
        keep=lambda path: path == "fc",
        ignore=lambda key: key.startswith("ema."),
    )
    change = "float16 to float32"
    assert str(report).splitlines() == [
        f"batch_stats/bn/mean  bn.running_mean  {change}",
        f"batch_stats/bn/var   bn.running_var   {change}",
        f"params/bn/bias       bn.bias          {change}",
        f"params/bn/scale      bn.weight        {change}",
        f"params/conv/kernel   conv.weight      OIS to SIO, {change}",
        "dropped: bn.num_batches_tracked",
        "ignored: fc.weight",
        "ignored: fc.bias",
        "ignored: ema.decay",
        "kept: params/fc/bias",
        "kept: params/fc/kernel",
    ]


def test_kept_layers_are_the_templates():
    template = small_template()
    template["params"]["fc"] = {"kernel": np.ones((4, 9)), "bias": np.ones(9)}
    variables, _ = jaxnorm.models.from_checkpoint(
        "torch", small_state_dict(), template, keep=lambda path: path == "fc"
    )
    assert variables["params"]["fc"] == template["params"]["fc"]


def test_a_count_is_that_of_torch():
    source, template = small_state_dict(), small_template()
    template["batch_stats"]["bn"]["count"] = np.zeros(4, np.int32)
    variables, report = jaxnorm.models.from_checkpoint("torch", source, template)
    count = variables["batch_stats"]["bn"]["count"]
    assert count.dtype == np.int32 and report.dropped == ()
    assert count.tolist() == [int(source["bn.num_batches_tracked"])] * 4 != [0] * 4
    same(jaxnorm.models.to_checkpoint("torch", variables), source)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_safetensors_go_both_ways(tmp_path, dtype):
    source, path = small_state_dict(dtype), tmp_path / "model.safetensors"
    safetensors.numpy.save_file(source, path)
    variables, _ = jaxnorm.models.from_checkpoint(
        "torch", safetensors.numpy.load_file(path), small_template(dtype)
    )
    assert {v.dtype for v in jax.tree.leaves(variables)} == {np.dtype(dtype)}
    source |= {"bn.num_batches_tracked": np.int64(0)}
    back = jaxnorm.models.to_checkpoint("torch", variables, template=source)
    safetensors.numpy.save_file(back, path)
    same(safetensors.numpy.load_file(path), source)


class Tensor:
    """As much of a tensor of torch in bfloat16 on a GPU as is read from it."""

    dtype = "torch.bfloat16"

    def __init__(self, array, where="cuda", grad=True):
        self.array, self.where, self.grad = array, where, grad
        self.shape = array.shape

    def detach(self):
        return Tensor(self.array, self.where, False)

    def cpu(self):
        return Tensor(self.array, "cpu", self.grad)

    def float(self):
        tensor = Tensor(self.array.astype(np.float32), self.where, self.grad)
        tensor.dtype = "torch.float32"
        return tensor

    def __array__(self, dtype=None, copy=None):
        if (self.where, self.grad, self.dtype) == ("cpu", False, "torch.float32"):
            return self.array
        raise TypeError("can't convert it to numpy")


def test_tensors_on_a_device_in_training_and_bfloat16():
    source = small_state_dict(ml_dtypes.bfloat16)
    source["bn.num_batches_tracked"] = np.int64(0)
    tensors = {k: Tensor(v) if v.ndim else v for k, v in source.items()}
    for dtype in (np.float32, ml_dtypes.bfloat16):
        template = small_template(dtype)
        variables, report = jaxnorm.models.from_checkpoint("torch", tensors, template)
        expected, same_report = jaxnorm.models.from_checkpoint(
            "torch", source, template
        )
        same(flat(variables), flat(expected))
        assert report == same_report
    back = jaxnorm.models.to_checkpoint("torch", variables, template=tensors)
    wide = {k: v.astype(np.float32) if v.ndim else v for k, v in source.items()}
    same(back, wide)
    same(jaxnorm.models.to_checkpoint("torch", variables), wide)
    same(jaxnorm.models.to_checkpoint("torch", variables, template=source), source)


def test_torch_takes_what_is_written():
    torch = pytest.importorskip("torch")

    def module():
        parts = {"conv": torch.nn.Conv2d(3, 4, 2, bias=False)}
        parts |= {"bn": torch.nn.BatchNorm2d(4), "fc": torch.nn.Linear(4, 2)}
        return torch.nn.ModuleDict(parts).to(torch.bfloat16)

    model, twin = module(), module()
    source = dict([*model.named_parameters(), *model.named_buffers()])
    for dtype in (np.float32, ml_dtypes.bfloat16):
        variables, _ = jaxnorm.models.from_checkpoint(
            "torch", source, small_template(dtype)
        )
        for template in (None, source):
            back = jaxnorm.models.to_checkpoint("torch", variables, template=template)
            tensors = {k: torch.from_numpy(v) for k, v in back.items()}
            twin.load_state_dict(tensors)
            for key, value in model.state_dict().items():
                assert torch.equal(twin.state_dict()[key], value)


def test_what_cannot_be_read_is_named():
    source = small_state_dict() | {"fc.bias": Tensor(np.zeros(2, np.complex64))}
    source["fc.bias"].dtype = "torch.qint8"
    lines = raised(source, small_template())
    assert lines[1].startswith("params/fc/bias: 'fc.bias' of Tensor is no array of")
    text = unwritten(small_template(), template=source)
    assert "the template: 'fc.bias' of Tensor is no array of numbers" in text
    shapes = jax.eval_shape(small_template)
    assert "params/fc/bias: 'bias' has no value here" in unwritten(shapes)


def test_the_values_are_copies():
    source, template = small_state_dict(), small_template()
    variables, _ = jaxnorm.models.from_checkpoint("torch", source, template)
    before = jax.tree.map(np.array, variables)
    for value in source.values():
        value[...] = 7
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    for value in jaxnorm.models.to_checkpoint("torch", variables).values():
        value[...] = 7
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_trees_keep_their_types():
    template = frozen_dict(small_template())
    variables, _ = jaxnorm.models.from_checkpoint("torch", small_state_dict(), template)
    assert type(variables) is type(template)
    assert jax.tree.structure(variables) == jax.tree.structure(template)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body = nnx.List(
            [
                nnx.Conv(3, 4, (2, 2), use_bias=False, rngs=rngs),
                jaxnorm.nnx.BatchNorm(4, rngs=rngs),
            ]
        )
        self.fc = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.body[1](self.body[0](x)).mean((1, 2)))


@pytest.fixture
def nnx_model():
    with jax.default_prng_impl("rbg"):  # compiles fast
        return Model()


def test_nnx_models_and_lists(nnx_model):
    """A list's index is a part of a name, in torch as in NNX."""
    source = small_state_dict()
    names = {"conv": "body.0", "bn": "body.1", "fc": "fc"}
    source = {re.sub(r"^\w+", lambda m: names[m[0]], k): v for k, v in source.items()}
    template = jaxnorm.nnx.variables(nnx_model)
    variables, _ = jaxnorm.models.from_checkpoint("torch", source, template)
    jaxnorm.nnx.update(nnx_model, variables)
    np.testing.assert_array_equal(
        nnx_model.body[1].var[...], source["body.1.running_var"]
    )
    back = jaxnorm.models.to_checkpoint("torch", jaxnorm.nnx.variables(nnx_model))
    same(back, source | {"body.1.num_batches_tracked": np.int64(0)})


def test_linen_to_nnx_is_a_matter_of_names(nnx_model):
    linen, _ = jaxnorm.models.from_checkpoint(
        "torch", small_state_dict(), small_template()
    )
    names = {"body/0": "conv", "body/1": "bn"}
    template = jaxnorm.nnx.variables(nnx_model)
    variables, _ = jaxnorm.models.from_checkpoint("flax", linen, template, rename=names)
    jaxnorm.nnx.update(nnx_model, variables)
    back = jaxnorm.models.to_checkpoint(
        "flax", jaxnorm.nnx.variables(nnx_model), rename=names
    )
    same(flat(back), {k: np.asarray(v) for k, v in flat(linen).items()})


@pytest.mark.parametrize(
    "rename",
    [
        {"conv": "net.stem.0", "": "net"},
        lambda path: {"conv": "net.stem.0"}.get(path, f"net.{path}"),
    ],
)
def test_beginnings_of_paths_can_be_renamed(rename):
    source = {
        f"net.{k}".replace("net.conv", "net.stem.0"): v
        for k, v in small_state_dict().items()
    }
    variables, _ = jaxnorm.models.from_checkpoint(
        "torch", source, small_template(), rename=rename
    )
    back = jaxnorm.models.to_checkpoint("torch", variables, rename=rename)
    assert {*back} == {*source}


def test_a_beginning_ends_with_a_part_of_the_path():
    leaf = {"bias": np.zeros(2, np.float32)}
    params = {"layer1": {"a": leaf}, "layer10": {"a": leaf}}
    back = jaxnorm.models.to_checkpoint(
        "torch", {"params": params}, rename={"layer1": "first"}
    )
    assert sorted(back) == ["first.a.bias", "layer10.a.bias"]


def test_arrays_of_no_layer_keep_their_names():
    leaves = {"cls_token": (1, 1, 4), "lone.weight": (3,)}
    source = {k: np.ones(shape, np.float32) for k, shape in leaves.items()}
    params = {"cls_token": source["cls_token"], "lone": {"kernel": np.zeros(3)}}
    template = {"params": params}
    template = jax.tree.map(np.float32, template)
    variables, _ = jaxnorm.models.from_checkpoint("torch", source, template)
    same(jaxnorm.models.to_checkpoint("torch", variables), source)


@pytest.mark.parametrize(
    "framework, key",
    [
        ("torch", "embed.weight"),
        ("keras", "embed/embeddings"),
        ("haiku", "params/embed/embeddings"),
        ("flax", "params/embed/embedding"),
    ],
)
def test_embeddings(framework, key):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    source = jaxnorm.models.to_checkpoint(
        framework, {"params": {"embed": {"embedding": table}}}
    )
    same(flat(source), {key: table})
    template = {"params": {"embed": {"embedding": 0 * table}}}
    variables, _ = jaxnorm.models.from_checkpoint(framework, source, template)
    np.testing.assert_array_equal(variables["params"]["embed"]["embedding"], table)


# ---- Settings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, desired",
    [
        (("torch",), {"epsilon": 1e-5, "momentum": 0.9, "unbiased": True}),
        (("keras",), {"epsilon": 1e-3, "momentum": 0.99, "unbiased": False}),
        (("flax",), {"epsilon": 1e-5, "momentum": 0.99, "unbiased": False}),
        (("flax", "LayerNorm"), {"epsilon": 1e-6}),
        (("haiku", "LayerNorm"), {"epsilon": 1e-5}),
        (("keras", "GroupNorm"), {"epsilon": 1e-3}),
        (("torch", "RMSNorm"), {"epsilon": float(np.finfo(np.float32).eps)}),
    ],
)
def test_defaults_of_the_frameworks(given, desired):
    assert jaxnorm.models.norm_settings(*given) == desired
    getattr(jaxnorm, (*given, "BatchNorm")[1])(**desired)


def test_flax_defaults_are_those_of_the_table():
    for method in ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"):
        layer = getattr(nn, method)()
        settings = jaxnorm.models.norm_settings("flax", method)
        settings.pop("unbiased", None)
        assert settings == {k: getattr(layer, k) for k in settings}


def test_arguments_of_the_frameworks():
    settings = jaxnorm.models.norm_settings
    assert settings("torch", momentum=None)["momentum"] is None
    assert settings("torch", momentum=0.25)["momentum"] == 0.75
    assert settings("torch", "RMSNorm", eps=None)["epsilon"] == 2.0**-23
    assert settings("haiku", decay_rate=0.9, eps=1e-3) == {
        "epsilon": 1e-3,
        "momentum": 0.9,
        "unbiased": False,
    }
    assert settings("keras", "GroupNorm", groups=4)["num_groups"] == 4
    norm = jaxnorm.RunningInstanceNorm(**settings("torch", "RunningInstanceNorm"))
    assert norm.momentum == 0.9 and norm.unbiased


# ---- Errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: jaxnorm.models.norm_settings("tensorflow"),
            r"one of \['flax', 'haiku'",
        ),
        (
            lambda: jaxnorm.models.norm_settings("torch", "IterNorm"),
            "method must be one of",
        ),
        (
            lambda: jaxnorm.models.norm_settings("keras", eps=1),
            r"\['epsilon', .* \['eps'\]",
        ),
        (lambda: jaxnorm.models.norm_settings("haiku"), "no default in Haiku"),
        (
            lambda: jaxnorm.models.norm_settings("keras", momentum=None),
            "must be a number",
        ),
    ],
)
def test_settings_that_do_not_exist(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def raised(source, template, framework="torch", **how):
    """The lines of the error that loading `source` raises."""
    with pytest.raises(ValueError) as error:
        jaxnorm.models.from_checkpoint(framework, source, template, **how)
    return [line.strip() for line in str(error.value).splitlines()]


def test_one_error_names_all_that_does_not_fit():
    source, template = small_state_dict(), small_template()
    source["head.weight"] = source.pop("fc.weight")
    source["bn.running_var"] = source["bn.running_var"][:3]
    source["other.num_batches_tracked"] = np.int64(0)
    source["bn.bias"] = source["bn.bias"].astype(np.int32)
    first, *lines, last = raised(source, template)
    assert first == "the torch checkpoint and the template do not fit:"
    assert lines == [
        "batch_stats/bn/var: 'bn.running_var' of shape (3,) becomes (3,), the template "
        "has (4,)",
        "params/bn/bias: 'bn.bias' is of int32, the template of float32",
        "params/fc/kernel: there is no 'fc.weight', but of its size are "
        "['head.weight']",
        "not used: 'head.weight'",
        "not used: 'other.num_batches_tracked'",
    ]
    for word in ("`rename`", "`kinds`", "`keep`", "`ignore`"):
        assert word in last


def test_the_error_of_a_kernel_says_which_kinds_would_fit():
    source = {"up.weight": np.ones((3, 5, 2, 2), np.float32)}
    template = {"params": {"up": {"kernel": np.zeros((2, 2, 3, 5), np.float32)}}}
    assert raised(source, template)[1] == (
        "params/up/kernel: 'up.weight' of shape (3, 5, 2, 2) becomes (2, 2, 5, 3), the "
        "template has (2, 2, 3, 5); of the kinds ['conv_transpose'] it would fit"
    )


def test_a_kernel_of_other_rank_does_not_fit():
    source = {"fc.weight": np.ones((5, 3, 1, 1), np.float32)}
    template = {"params": {"fc": {"kernel": np.zeros((3, 5), np.float32)}}}
    line = raised(source, template)[1]
    assert "becomes (5, 3, 1, 1), the template has (3, 5)" in line


def test_only_axes_of_length_1_are_left_out():
    source = {"params": {"norm": {"scale": np.ones((1, 3, 2), np.float32)}}}
    template = {"params": {"norm": {"scale": np.zeros((2, 3), np.float32)}}}
    line = raised(source, template, "haiku")[1]
    assert "becomes (1, 3, 2), the template has (2, 3)" in line


def test_what_is_not_an_array_does_not_fit():
    source = small_state_dict() | {"fc.bias": "none"}
    assert "'fc.bias' is of <U4" in raised(source, small_template())[1]


def test_marks_are_given_after_loading():
    template = small_template()
    template["batch_stats"] = jaxnorm.models.freeze(
        template["batch_stats"], update=True
    )
    assert raised(small_state_dict(), template)[1] == (
        "batch_stats/bn/running: is a mark of `jaxnorm.models.freeze`: freeze what is "
        "returned"
    )


def test_keep_needs_values_and_layers():
    template = small_template()
    template["params"]["fc"]["kernel"] = jax.ShapeDtypeStruct((4, 2), np.float32)
    lines = raised(small_state_dict(), template, keep=lambda path: path == "fc")
    assert "params/fc/kernel: has no value to keep" in lines
    lines = raised(small_state_dict(), template, keep=lambda path: path == "head")
    assert "`keep` means no layer of the model" in lines


@pytest.mark.parametrize(
    "how, words",
    [
        ({"rename": {"conf": "conv"}}, r"`rename` holds \['conf'\], but .*'bn', 'con"),
        ({"kinds": {"con": "depthwise"}}, r"`kinds` holds \['con'\]"),
        ({"kinds": {"conv": "deep"}}, "the kind of the kernel of 'conv' must be one"),
    ],
)
def test_paths_and_kinds_that_do_not_exist(how, words):
    for call in (
        lambda: jaxnorm.models.from_checkpoint("torch", {}, small_template(), **how),
        lambda: jaxnorm.models.to_checkpoint("torch", small_template(), **how),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("tree", [{}, {"cache": {"x": 1}}, {"conv": {"kernel": 1}}])
def test_templates_are_variables(tree):
    with pytest.raises(ValueError, match="the variables of a model must be"):
        jaxnorm.models.from_checkpoint("torch", {}, tree)


def unwritten(variables, framework="torch", **how):
    with pytest.raises(ValueError) as error:
        jaxnorm.models.to_checkpoint(framework, variables, **how)
    return str(error.value)


def test_what_other_frameworks_have_not_flax_has():
    marked = {"batch_stats": jaxnorm.models.freeze({"bn": jaxnorm.init_stats(2)})}
    written = jaxnorm.models.to_checkpoint("flax", marked)
    jax.tree.map(np.testing.assert_array_equal, written, marked)
    u = {"SpectralNorm_0": {"Dense_0/kernel/u": np.ones((1, 2))}}
    for framework in ("flax", "torch"):
        text = unwritten({"batch_stats": u}, framework)
        assert "kernel/u: a name with '/' in it" in text
    gathering = {
        "batch_stats": jaxnorm.models.accumulate({"bn": jaxnorm.init_stats(2)})
    }
    text = unwritten(gathering)
    assert "batch_mean: it has no counterpart; `jaxnorm.models.unfreeze` and" in text


def test_what_cannot_be_written_is_named():
    variables = small_template()
    stats = jaxnorm.models.freeze(variables["batch_stats"])
    text = unwritten(variables | {"batch_stats": stats})
    assert (
        "batch_stats/bn/held: it has no counterpart; `jaxnorm.models.unfreeze`" in text
    )
    assert "batch_stats/bn/running: it has no" in text

    text = unwritten(variables, rename={"fc": "conv"})
    assert "params/fc/kernel: 'conv.weight' is the key of another leaf, too" in text

    stats = {"bn": jaxnorm.init_stats(4, momentum=None)}
    text = unwritten(variables | {"batch_stats": stats}, "keras")
    assert "batch_stats/bn/count: it has no counterpart" in text

    text = unwritten({"params": {"WeightNorm_0": {"a/kernel/scale": np.ones(2)}}})
    assert "params/WeightNorm_0/a/kernel/scale: a name with '/' in it" in text

    text = unwritten(variables, "haiku")
    assert "batch_stats/bn/mean: its shape is that of the layer's input: pass" in text


def test_marks_stay_in_flax():
    stats = jaxnorm.models.freeze(small_template()["batch_stats"])
    back = jaxnorm.models.to_checkpoint("flax", {"batch_stats": stats})
    assert sorted(back["batch_stats"]["bn"]) == ["held", "mean", "running", "var"]


def test_a_result_must_be_like_its_template():
    variables, like = small_template(), small_state_dict(np.float16)
    back = jaxnorm.models.to_checkpoint("torch", variables, template=like)
    assert list(back) == list(like) and back["fc.bias"].dtype == np.float16
    del like["fc.bias"]
    like |= {"head.bias": np.zeros(2), "bn.weight": np.zeros((1, 4))}
    text = unwritten(variables, template=like)
    assert "the template lacks 'fc.bias'" in text
    assert "the model has nothing for 'head.bias'" in text
    assert "'bn.weight' is (4,), in the template (1, 4)" in text


def test_a_count_is_not_written_where_the_template_has_none():
    like = small_state_dict()
    del like["bn.num_batches_tracked"]
    back = jaxnorm.models.to_checkpoint("torch", small_template(), template=like)
    assert list(back) == list(like)
