# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false
"""Writes checkpoints.npz: models of other frameworks, what they return, how they train.

Run it once, on a CPU, in an environment of its own. The file in the repository is from
Python 3.11 and

    pip install torch==2.13.0 timm==1.0.31 keras==3.15.1 numpy==2.4.6
    pip install jax==0.10.2 dm-haiku==0.0.17
    pip install --no-deps torchvision==0.28.0
    python tests/golden/checkpoints.py

Arrays are named case/array; those of a model case/start/key or case/end/key, with the
keys of the framework. Images are (N, H, W, C). All is computed in float64, from values
that float32 holds exactly, but for batch norm in Keras, which takes float32.

The weights of the ResNets follow from their names, as `named_values.filled` says, and
only names and shapes are stored.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

# Only where the script is run: pytest imports this file as well, to look for doctests,
# and the tests need none of these.
if __name__ == "__main__":
    # torchvision's own __init__ files load its compiled operators, which its models do
    # without.
    for package in "torchvision", "torchvision.models":
        spec = importlib.util.find_spec(package)
        assert spec, "pip install --no-deps torchvision"
        sys.modules[package] = importlib.util.module_from_spec(spec)
    os.environ["KERAS_BACKEND"] = "torch"
    sys.path.append(str(Path(__file__).parents[1]))

    import haiku
    import jax
    import keras
    import timm.models.resnet as timm_resnet
    import torch
    import torchvision.models.resnet as torchvision_resnet
    from named_values import filled
    from torch import nn

STEPS = 50
BATCHES = 5


def torch_training(rng):
    """Fifty steps of SGD, rate .05 and momentum .9, on five batches in turn.

    The first norm has momentum .1, the second None; both have epsilon 1e-3.
    """
    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.1)
    model.conv2 = nn.Conv2d(6, 8, 3, stride=2, groups=2)
    model.bn2 = nn.BatchNorm2d(8, eps=1e-3, momentum=None)
    model.fc = nn.Linear(8, 4)
    fill(rng, model)
    out = state_of(model, "start")
    images = draw(rng, (BATCHES, 8, 7, 7, 3))
    labels = rng.integers(4, size=(BATCHES, 8))

    def logits(x):
        x = torch.relu(model.bn1(model.conv1(channels_first(x))))
        return model.fc(torch.relu(model.bn2(model.conv2(x))).mean((2, 3)))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch = step % BATCHES
        optimizer.zero_grad()
        target = torch.tensor(labels[batch])
        loss = nn.functional.cross_entropy(logits(images[batch]), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    y = array(logits(images[0]))
    out |= {"images": images, "labels": labels, "losses": np.array(losses), "y": y}
    return out | state_of(model, "end")


def torch_layers(rng):
    """One of each layer: tokens of 5 x 3, looked up, then as an image."""
    model = nn.Sequential()
    model.embed = nn.Embedding(7, 4)
    model.up = nn.ConvTranspose2d(4, 4, (3, 2), stride=2, padding=(1, 0))
    model.wider = nn.ConvTranspose2d(4, 6, 3)
    model.group_norm = nn.GroupNorm(2, 6)
    model.line = nn.Conv1d(6, 6, 3, groups=6)
    model.layer_norm = nn.LayerNorm(6)
    model.fc = nn.Linear(6, 3)
    fill(rng, model)
    tokens = rng.integers(7, size=(2, 5, 3))
    x = model.embed(torch.tensor(tokens)).movedim(-1, 1)
    x = model.group_norm(model.wider(model.up(x)))
    x = model.line(x.mean(2)).movedim(1, -1)
    y = array(model.fc(model.layer_norm(x)))
    return state_of(model, "start") | {"tokens": tokens, "y": y}


def torch_wrappers(rng):
    """Weight norm and spectral norm of torch, of the old kind and of the new.

    The power iterations have settled, as torch takes no step of them in evaluation.
    """
    old, new = nn.utils, nn.utils.parametrizations
    model = nn.Sequential(
        old.weight_norm(nn.Conv2d(3, 4, 3, padding=1)),
        new.weight_norm(nn.ConvTranspose2d(4, 6, 2, stride=2)),
        old.spectral_norm(nn.Conv2d(6, 5, 3, padding=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        new.weight_norm(nn.Linear(5, 4), dim=None),
        new.spectral_norm(nn.Linear(4, 6)),
        old.spectral_norm(nn.Linear(6, 5, bias=False)),
        old.weight_norm(nn.Linear(5, 3)),
    )
    fill(rng, model)
    images = draw(rng, (2, 6, 4, 3))
    for _ in range(500):
        model(channels_first(images))
    y = array(model.eval()(channels_first(images)))
    return state_of(model, "start") | {"images": images, "y": y}


def torchvision_basic(rng):
    kind = torchvision_resnet
    return named(kind.ResNet(kind.BasicBlock, [1, 1, 1, 1], num_classes=5))


def torchvision_bottleneck(rng):
    """ResNeXt's groups, too, to have them."""
    kind = torchvision_resnet
    model = kind.ResNet(
        kind.Bottleneck, [2, 1, 1, 1], num_classes=5, groups=4, width_per_group=4
    )
    return named(model)


def timm_basic(rng):
    kind = timm_resnet
    model = kind.ResNet(
        kind.BasicBlock, (2, 1, 1, 1), num_classes=5, channels=(16, 24, 32, 40)
    )
    return named(model)


def timm_bottleneck_d(rng):
    """The ResNet-D, with a stem of three convolutions and an average over strides."""
    kind = timm_resnet
    model = kind.ResNet(
        kind.Bottleneck,
        (1, 1, 1, 1),
        num_classes=5,
        stem_width=32,
        stem_type="deep",
        avg_down=True,
        channels=(8, 16, 24, 32),
    )
    return named(model)


def keras_layers(rng):
    """One of each layer, under the names that Keras gives them."""
    keras.config.set_floatx("float64")
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((6, 5, 3)),
            layers.Conv2D(4, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.BatchNormalization(scale=False),
            layers.Conv2DTranspose(5, (3, 2), strides=2),
            layers.GroupNormalization(groups=1),
            layers.Conv2DTranspose(5, 2),
            layers.GlobalAveragePooling2D(),
            layers.LayerNormalization(),
            layers.Dense(6),
            layers.RMSNormalization(),
            layers.Dense(2),
        ],
        name="sequential",
    )
    for variable in model.variables:
        value = draw(rng, variable.shape)
        variable.assign(np.abs(value) if "variance" in variable.path else value)
    x = draw(rng, (2, 6, 5, 3))
    y = keras.ops.convert_to_numpy(model(x, training=False))
    weights = {f"start/{v.path}": array(v.value) for v in model.variables}
    return weights | {"x": x, "y": y}


def haiku_layers(rng):
    """One of each layer, after three training steps of the norm at decay rate .5."""

    def network(x, is_training):
        norm = haiku.BatchNorm(True, True, decay_rate=0.5)
        x = norm(haiku.Conv2D(4, 3, with_bias=False)(x), is_training)
        x = haiku.Conv2DTranspose(5, (3, 2), stride=2)(jax.nn.relu(x))
        x = haiku.DepthwiseConv2D(1, 3)(haiku.Conv2DTranspose(5, 3)(x))
        x = haiku.LayerNorm(-1, True, True)(x.mean((1, 2)))
        return haiku.Linear(2)(haiku.RMSNorm(-1)(haiku.Linear(6)(x)))

    with jax.enable_x64(True):
        model = haiku.transform_with_state(network)
        images = draw(rng, (4, 2, 6, 5, 3)).astype(np.float64)
        params, state = model.init(jax.random.key(0), images[0], True)
        params = jax.tree.map(lambda v: draw(rng, v.shape).astype(v.dtype), params)
        for x in images[1:]:
            _, state = model.apply(params, state, None, x, True)
        y, _ = model.apply(params, state, None, images[0], False)
        out = {
            f"start/{collection}/{module}/{name}": np.asarray(value)
            for collection, tree in (("params", params), ("state", state))
            for module, arrays in tree.items()
            for name, value in arrays.items()
        }
        return out | {"x": images[0], "y": np.asarray(y)}


def named(model):
    """Names and shapes of a ResNet, and its logits of two images."""
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict(
        {k: torch.as_tensor(filled(k, shape)) for k, shape in shapes.items()}
    )
    model.eval()
    y = model(channels_first(filled("images", (2, 32, 32, 3))))
    text = [f"{k} {','.join(map(str, shape))}" for k, shape in shapes.items()]
    return {"shapes": np.array(text), "y": array(y)}


def fill(rng, model):
    """Gives all parameters and running statistics random values."""
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            new = draw(rng, value.shape)
            value.copy_(tensor(np.abs(new) if "var" in name else new))


def state_of(model, when):
    return {f"{when}/{k}": array(v) for k, v in model.state_dict().items()}


def draw(rng, shape):
    return (0.5 * rng.standard_normal(tuple(shape))).astype(np.float32)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def array(t):
    """A copy: torch goes on to update running statistics in place."""
    return t.detach().numpy().copy()


def channels_first(x):
    return tensor(np.moveaxis(x, -1, 1))


CASES = (
    torch_training,
    torch_layers,
    torch_wrappers,
    torchvision_basic,
    torchvision_bottleneck,
    timm_basic,
    timm_bottleneck_d,
    keras_layers,
    haiku_layers,
)


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    arrays = {}
    for case in CASES:
        # Its name is its seed, so that a new case leaves the others as they are.
        rng = np.random.default_rng(list(case.__name__.encode()))
        for name, value in case(rng).items():
            arrays[f"{case.__name__}/{name}"] = value
    np.savez_compressed(Path(__file__).with_name("checkpoints.npz"), **arrays)


if __name__ == "__main__":
    main()
