# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false
"""Writes golden.npz: what PyTorch, timm and Keras compute, for the tests to compare.

Run it once, on a CPU, in an environment of its own. The file in the repository is from
Python 3.11 and

    pip install torch==2.13.0 keras==3.15.1 numpy==2.4.6
    pip install --no-deps timm==1.0.31
    python tests/golden/make.py

Keras has had BatchNormalization(renorm=True) since 3.14.0. Switchable Norm has no case:
its reference implementation is not on PyPI.

Arrays are named case/array. All have their channels last: images are (N, H, W, C),
kernels of convolutions (H, W, in, out), of dense layers (in, out).

PyTorch and timm compute in float64, from inputs that float32 holds exactly, and their
results are rounded to float32 once, at the end. (timm's EvoNorm and filter response
norm take their statistics in float32 all the same.) Keras's batch norm computes in
float32 whatever it is given, and its variance is the mean square less the squared mean:
its values are good to about 1e-5.

Gradients are those of sum(y * dy), for weights of sum(weight * dweight). Where there
are several training steps, the first axis of x, dy, y and the state counts them.

The epsilons are large so that a wrong place for one shows.
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np

# Only where the script is run: pytest imports this file as well, to look for doctests,
# and the tests need none of these.
if __name__ == "__main__":
    # timm's own __init__ files import torchvision, which its layers do not need.
    for package in "timm", "timm.layers":
        spec = importlib.util.find_spec(package)
        assert spec, "pip install --no-deps timm"
        sys.modules[package] = importlib.util.module_from_spec(spec)
    os.environ["KERAS_BACKEND"] = "torch"

    import keras
    import torch
    from timm.layers.evo_norm import EvoNorm2dB0, EvoNorm2dS0
    from timm.layers.filter_response_norm import FilterResponseNormTlu2d
    from timm.layers.grn import GlobalResponseNorm
    from timm.layers.std_conv import ScaledStdConv2d, StdConv2d
    from torch import nn
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

CHANNELS = 8
IMAGES = (3, 3, 2, CHANNELS)
EPSILON = 1e-2
STEPS = 3


def timm_evo_norm_b0(rng):
    """One training step and an evaluation of the same images, epsilon .01.

    timm divides by the biased variance of the batch, and moves running_var by .1
    towards the unbiased one.
    """
    layer = EvoNorm2dB0(CHANNELS, eps=EPSILON, momentum=0.1)
    params = parameters(rng, layer, scale="weight", bias="bias", v="v")
    before = state(rng, layer, var="running_var")
    train = forward_and_gradients(rng, layer, params)
    after = {"new_var": layer.running_var}
    layer.eval()
    y_eval = channels_last(layer(channels_first(train["x"])))
    return values(params) | before | train | after | {"y_eval": y_eval}


def timm_evo_norm_s0(rng):
    """Groups 4, epsilon .01: the root is of the group's biased variance + epsilon."""
    layer = EvoNorm2dS0(CHANNELS, groups=4, eps=EPSILON)
    params = parameters(rng, layer, scale="weight", bias="bias", v="v")
    return values(params) | forward_and_gradients(rng, layer, params)


def timm_filter_response_norm(rng):
    """With the thresholded linear unit, max(y, tau). Epsilon .01, not learned."""
    layer = FilterResponseNormTlu2d(CHANNELS, eps=EPSILON)
    params = parameters(rng, layer, scale="weight", bias="bias", tau="tau")
    return values(params) | forward_and_gradients(rng, layer, params)


def timm_global_response_norm(rng):
    """Epsilon .01, added to the mean over the channels of the norms."""
    layer = GlobalResponseNorm(CHANNELS, eps=EPSILON, channels_last=True)
    params = parameters(rng, layer, scale="weight", bias="bias")
    return values(params) | forward_and_gradients(rng, layer, params, channel=-1)


def timm_std_conv(rng):
    """Standardized kernel of a convolution, epsilon .01, biased variance."""
    return standardized_kernel(rng, StdConv2d(4, CHANNELS, (3, 2), eps=EPSILON))


def timm_scaled_std_conv(rng):
    """The same times gain * gamma / sqrt(fan-in), with a gain per output, gamma 1.7."""
    layer = ScaledStdConv2d(4, CHANNELS, (3, 2), eps=EPSILON, gamma=1.7, bias=False)
    gain = draw(rng, CHANNELS, mean=1)
    return standardized_kernel(rng, layer, gain) | {"gain": gain}


def torch_local_response_norm_5(rng):
    """Size 5, alpha .3, beta .6, k 2. PyTorch divides alpha by the size."""
    return local_response_norm(rng, size=5)


def torch_local_response_norm_4(rng):
    """Size 4, the rest as above. Channel c gathers c - 2 to c + 1."""
    return local_response_norm(rng, size=4)


def torch_batch_norm(rng):
    """Three training steps, then an evaluation. Epsilon .01, momentum .1."""
    return steps_of_torch(rng, nn.BatchNorm2d(CHANNELS, eps=EPSILON, momentum=0.1))


def torch_instance_norm(rng):
    """The same with running statistics: each step's are the mean over the examples."""
    layer = nn.InstanceNorm2d(
        CHANNELS, eps=EPSILON, momentum=0.1, affine=True, track_running_stats=True
    )
    return steps_of_torch(rng, layer)


def torch_group_norm(rng):
    """Groups 4, epsilon .01."""
    layer = nn.GroupNorm(4, CHANNELS, eps=EPSILON)
    params = parameters(rng, layer, scale="weight", bias="bias")
    return values(params) | forward_and_gradients(rng, layer, params)


def torch_layer_norm(rng):
    """Over the channels, epsilon .01."""
    layer = nn.LayerNorm(CHANNELS, eps=EPSILON)
    params = parameters(rng, layer, scale="weight", bias="bias")
    return values(params) | forward_and_gradients(rng, layer, params, channel=-1)


def torch_rms_norm(rng):
    """Over the channels, epsilon .01."""
    layer = nn.RMSNorm(CHANNELS, eps=EPSILON)
    params = parameters(rng, layer, scale="weight")
    return values(params) | forward_and_gradients(rng, layer, params, channel=-1)


def torch_weight_norm_conv(rng):
    """One norm for each output: g / norm(v) * v, without epsilon."""
    return weight_normalized(rng, nn.Conv2d(4, CHANNELS, (3, 2), bias=False))


def torch_weight_norm_linear(rng):
    """The same for a dense layer."""
    return weight_normalized(rng, nn.Linear(5, CHANNELS, bias=False))


def torch_spectral_norm(rng):
    """One power iteration in training, then an evaluation, which makes none."""
    layer = spectral_norm(nn.Linear(5, CHANNELS, bias=False), n_power_iterations=1)
    originals = layer.parametrizations.weight
    norm, original = originals[0], originals.original
    w, dweight = draw(rng, (5, CHANNELS)), draw(rng, (5, CHANNELS))
    # PyTorch's iteration starts from v. Here v is what u leads to, as after an earlier
    # iteration, so that one that starts from u comes to the same new_u.
    u = unit(draw(rng, CHANNELS))
    v = unit(w @ u)
    assign(original, w.T)
    assign(norm._u, u)
    assign(norm._v, v)

    weight = layer.weight
    loss = (weight * tensor(dweight.T)).sum()
    (dw,) = torch.autograd.grad(loss, [original])
    layer.eval()
    return {
        "w": w,
        "u": u,
        "v": v,
        "weight": array(weight).T,
        "new_u": array(norm._u),
        "new_v": array(norm._v),
        "weight_eval": array(layer.weight).T,
        "dweight": dweight,
        "dw": array(dw).T,
    }


def keras_batch_renorm(rng):
    """Three training steps, then an evaluation of the last images.

    Epsilon .01, momentum .9 for the moving_ statistics, renorm_momentum .8 for the
    renorm_ ones; r is clipped to .7 and 1.25, d to -.4 and .4.
    """
    layer = keras.layers.BatchNormalization(
        momentum=0.9,
        epsilon=EPSILON,
        renorm=True,
        renorm_momentum=0.8,
        renorm_clipping={"rmin": 0.7, "rmax": 1.25, "dmax": 0.4},
    )
    layer.build((None, None, None, CHANNELS))
    params = {"scale": layer.gamma.value, "bias": layer.beta.value}
    assign(params["scale"], draw(rng, CHANNELS, mean=1))
    assign(params["bias"], draw(rng, CHANNELS))
    names = (
        "moving_mean",
        "moving_variance",
        "moving_stddev",
        "renorm_mean",
        "renorm_stddev",
    )

    def step():
        train = forward_and_gradients(
            rng, lambda x: layer(x, training=True), params, channel=-1
        )
        return train | {f"new_{k}": array(getattr(layer, k).value) for k in names}

    before = {k: array(getattr(layer, k).value) for k in names}
    steps = stacked(step)
    y_eval = layer(tensor(steps["x"][-1]), training=False)
    return values(params) | before | steps | {"y_eval": y_eval}


def steps_of_torch(rng, layer):
    """STEPS training steps, then an evaluation of the last images."""
    params = parameters(rng, layer, scale="weight", bias="bias")
    before = state(rng, layer, mean="running_mean", var="running_var")

    def step():
        train = forward_and_gradients(rng, layer, params)
        after = {"new_mean": layer.running_mean, "new_var": layer.running_var}
        return train | {k: array(t) for k, t in after.items()}

    steps = stacked(step)
    layer.eval()
    y_eval = channels_last(layer(channels_first(steps["x"][-1])))
    return values(params) | before | steps | {"y_eval": y_eval}


def stacked(step):
    """What each of STEPS calls returns, by name, along a new first axis."""
    steps = [step() for _ in range(STEPS)]
    return {k: np.stack([s[k] for s in steps]) for k in steps[0]}


def local_response_norm(rng, size):
    layer = nn.LocalResponseNorm(size, alpha=0.3, beta=0.6, k=2.0)
    return forward_and_gradients(rng, layer, {})


def weight_normalized(rng, layer):
    layer = weight_norm(layer)
    originals = layer.parametrizations.weight
    g, v = originals.original0, originals.original1
    assign(g, draw(rng, CHANNELS, mean=1).reshape(g.shape))
    assign(v, draw(rng, v.shape))
    dweight = tensor(draw(rng, v.shape))
    weight = layer.weight
    dg, dv = torch.autograd.grad((weight * dweight).sum(), [g, v])
    return {
        "g": array(g).ravel(),
        "v": kernel(v),
        "weight": kernel(weight),
        "dweight": kernel(dweight),
        "dg": array(dg).ravel(),
        "dv": kernel(dv),
    }


def standardized_kernel(rng, layer, gain=None):
    """The kernel that the layer convolves with, and gradients.

    timm does not keep it: it is read off the responses to one image for each entry.
    """
    assign(layer.weight, draw(rng, layer.weight.shape, mean=0.1, std=0.15))
    leaves = {"dw": layer.weight}
    if gain is not None:
        assign(layer.gain, gain.reshape(layer.gain.shape))
        leaves["dgain"] = layer.gain
    layer.padding = (0, 0)
    fan_in = layer.weight[0].numel()
    images = torch.eye(fan_in).reshape(fan_in, *layer.weight.shape[1:])
    weight = layer(images).reshape(fan_in, -1).T.reshape(layer.weight.shape)
    dweight = tensor(draw(rng, weight.shape))
    grads = torch.autograd.grad((weight * dweight).sum(), list(leaves.values()))
    grads = dict(zip(leaves, grads, strict=True))
    out = {
        "w": kernel(layer.weight),
        "weight": kernel(weight),
        "dweight": kernel(dweight),
        "dw": kernel(grads["dw"]),
    }
    return out | ({} if gain is None else {"dgain": array(grads["dgain"]).ravel()})


def forward_and_gradients(rng, layer, params, channel=1):
    """x, dy, y = layer(x), and the gradients of sum(y * dy) by x and parameters."""
    images, dy = draw_images(rng), draw(rng, IMAGES)
    x = channels_first(images, channel).requires_grad_()
    y = layer(x)
    loss = (y * channels_first(dy, channel)).sum()
    dx, *grads = torch.autograd.grad(loss, [x, *params.values()])
    y, dx = channels_last(y, channel), channels_last(dx, channel)
    grads = {f"d{k}": array(g) for k, g in zip(params, grads, strict=True)}
    return {"x": images, "dy": dy, "y": y, "dx": dx} | grads


def parameters(rng, layer, **names):
    """The layer's parameters by our names for them, with random values."""
    params = {ours: getattr(layer, theirs) for ours, theirs in names.items()}
    for name, param in params.items():
        assign(param, draw(rng, CHANNELS, mean=1 if name in ("scale", "v") else 0))
    return params


def state(rng, layer, **names):
    """Gives running statistics random values, and returns them by our names."""
    before = {}
    for ours, theirs in names.items():
        before[ours] = draw(rng, CHANNELS)
        if ours == "var":
            before[ours] = 1 + before[ours] ** 2
        assign(getattr(layer, theirs), before[ours])
    return before


def draw(rng, shape, mean: float = 0, std: float = 0.5):
    return (mean + std * rng.standard_normal(shape)).astype(np.float32)


def draw_images(rng):
    """Channels that differ in mean and variance."""
    std, mean = np.linspace(0.3, 2, CHANNELS), np.linspace(-1, 1.5, CHANNELS)
    return draw(rng, IMAGES, rng.permutation(mean), rng.permutation(std))


def unit(x):
    return (x / np.linalg.norm(x.astype(np.float64))).astype(np.float32)


def assign(variable, value):
    with torch.no_grad():
        variable.copy_(tensor(value))


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def array(t):
    """A copy: torch goes on to update running statistics in place."""
    return t.detach().numpy().copy()


def values(params):
    return {k: array(p) for k, p in params.items()}


def channels_first(x, channel=1):
    return tensor(np.moveaxis(x, -1, channel))


def channels_last(t, channel=1):
    return np.moveaxis(array(t), channel, -1)


def kernel(t):
    """(out, in, H, W) to (H, W, in, out), and (out, in) to (in, out)."""
    t = array(t)
    return np.moveaxis(t, (0, 1), (-1, -2))


CASES = (
    timm_evo_norm_b0,
    timm_evo_norm_s0,
    timm_filter_response_norm,
    timm_global_response_norm,
    timm_std_conv,
    timm_scaled_std_conv,
    torch_local_response_norm_5,
    torch_local_response_norm_4,
    torch_batch_norm,
    torch_instance_norm,
    torch_group_norm,
    torch_layer_norm,
    torch_rms_norm,
    torch_weight_norm_conv,
    torch_weight_norm_linear,
    torch_spectral_norm,
    keras_batch_renorm,
)


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    arrays = {}
    for case in CASES:
        # Its name is its seed, so that a new case leaves the others as they are.
        rng = np.random.default_rng(list(case.__name__.encode()))
        for name, value in case(rng).items():
            value = value if isinstance(value, np.ndarray) else array(value)
            arrays[f"{case.__name__}/{name}"] = value.astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
