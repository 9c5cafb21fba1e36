"""Batch norm in quantization-aware training, against the layer and its batch norm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from norms import assert_close

import jaxnorm
from jaxnorm.models import quantization_aware_layer

pytestmark = pytest.mark.usefixtures("strict_dtypes")

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 6, 6, 3)) + 1, jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(3, 3, 3, 5)), jnp.float32)
SCALE = jnp.asarray([1, 0, -2, 0.5, 3], jnp.float32)
BIAS = jnp.asarray([0, 1, -1, 2, 0.5], jnp.float32)
STATS = {
    "mean": jnp.asarray(RNG.normal(size=5), jnp.float32),
    "var": jnp.asarray(RNG.random(5) * 9 + 0.5, jnp.float32),
}


def convolution(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def dense(x, kernel):
    return x @ kernel


def identity(kernel):
    return kernel


def coarse(kernel):
    return kernel + lax.stop_gradient((kernel * 4).round() / 4 - kernel)


def aware(
    x, kernel, stats=STATS, scale: Any = SCALE, bias=BIAS, layer=convolution, **args
):
    args = {"quantize": identity, "freeze": False, **args}
    by_kernel = functools.partial(layer, x)
    return quantization_aware_layer(kernel, stats, scale, bias, layer=by_kernel, **args)


def composed(x, kernel, stats=STATS, scale=SCALE, bias=BIAS, layer=convolution, **args):
    args["use_running_average"] = args.pop("freeze", False)
    return jaxnorm.batch_norm(layer(x, kernel), stats, scale, bias, **args)


def assert_same(got, expected):
    assert_close(got[0], expected[0], size=64)
    assert got[1].keys() == expected[1].keys()
    for k in got[1]:
        assert_close(got[1][k], expected[1][k], size=64)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_with_the_identity_it_is_the_layer_and_batch_norm(freeze, traced):
    call = jax.jit(lambda flag: aware(X, KERNEL, freeze=flag if traced else freeze))
    got, expected = call(freeze), composed(X, KERNEL, freeze=freeze)
    assert_same(got, expected)
    moved = [not np.array_equal(got[1][k], STATS[k]) for k in STATS]
    assert moved == [not freeze] * 2


@pytest.mark.parametrize("freeze", [False, True])
def test_a_dense_layer_without_scale_and_bias(freeze):
    x, kernel = X.reshape(-1, 3), KERNEL[0, 0]
    args = {"scale": None, "bias": None, "layer": dense, "freeze": freeze}
    assert_same(aware(x, kernel, **args), composed(x, kernel, **args))


@pytest.mark.parametrize("epsilon", [1e-3, 2.0])
def test_settings_are_those_of_batch_norm(epsilon):
    mask = RNG.random((8, 6, 6, 1)) > 0.3
    args = {"momentum": 0.5, "epsilon": epsilon, "unbiased": True, "mask": mask}
    got = aware(X, KERNEL, **args)
    assert_same(got, composed(X, KERNEL, **args))
    assert (np.asarray(got[0])[~np.broadcast_to(mask, got[0].shape)] == 0).all()
    cumulative = {**STATS, "count": jnp.full(5, 2, jnp.int32)}
    args = {"stats": cumulative, "momentum": None}
    assert_same(aware(X, KERNEL, **args), composed(X, KERNEL, **args))


@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_are_those_of_the_composition(freeze):
    weights = jnp.asarray(RNG.normal(size=(8, 6, 6, 5)), jnp.float32)

    def slopes(f):
        loss = lambda *args: (f(*args, freeze=freeze)[0] * weights).sum()  # noqa: E731
        by_all = jax.jit(jax.grad(loss, (0, 1, 3, 4)))
        return by_all(X, KERNEL, STATS, SCALE, BIAS)

    for got, expected in zip(slopes(aware), slopes(composed), strict=True):
        size = np.abs(expected).max()
        assert size > 0.1
        assert_close(got / size, expected / size, size=256)


def quantized(x, stats, freeze):
    """The kernel that is quantized."""
    seen = []
    quantize = lambda kernel: seen.append(kernel) or coarse(kernel)  # noqa: E731
    y, _ = aware(x, KERNEL, stats, quantize=quantize, freeze=freeze)
    assert len(seen) == 1
    return seen[0], y


def test_what_is_quantized_follows_the_running_statistics_alone():
    expected = KERNEL * (SCALE / np.sqrt(STATS["var"] + 1e-5)).reshape(1, 1, 1, -1)
    for x, freeze in ((X, False), (3 * X + 1, False), (X, True)):
        kernel, _ = quantized(x, STATS, freeze)
        assert_close(kernel, expected)
    wide = {**STATS, "var": STATS["var"] * 4 + 3e-5}  # and epsilon
    assert_close(quantized(X, wide, False)[0] * 2, expected)


def test_with_a_coarse_quantizer_frozen_is_what_inference_computes():
    kernel, y = quantized(X, STATS, True)
    slope = SCALE / jnp.sqrt(STATS["var"] + 1e-5)
    bias = (BIAS - STATS["mean"] * slope).reshape(1, 1, 1, -1)
    assert_close(y, convolution(X, coarse(kernel)) + bias, size=64)
    # In training it is corrected, and the moments are those of the exact output.
    kernel, y = quantized(X, STATS, False)
    exact = np.asarray(convolution(X, KERNEL), np.float64)
    mean, std = exact.mean((0, 1, 2)), np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    correction = np.sqrt(np.asarray(STATS["var"]) + 1e-5) / std
    raw = np.asarray(convolution(X, coarse(kernel)), np.float64)
    shift = np.asarray(BIAS) - mean * np.asarray(SCALE) / std
    assert_close(y, raw * correction + shift, size=64)
    _, stats = aware(X, KERNEL, quantize=coarse)
    assert_same((y, stats), (y, composed(X, KERNEL)[1]))


@pytest.mark.parametrize("by_running", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_marks_of_freeze_hold(by_running, update):
    stats = jaxnorm.models.freeze(STATS, use_running_average=by_running, update=update)
    assert_same(aware(X, KERNEL, stats), composed(X, KERNEL, stats))


def test_frozen_by_a_bool_the_layer_runs_once():
    calls = []

    def layer(x, kernel):
        calls.append(kernel)
        return convolution(x, kernel)

    aware(X, KERNEL, layer=layer, freeze=True)
    assert len(calls) == 1
    aware(X, KERNEL, layer=layer)
    assert len(calls) == 3


def test_devices_pool_the_moments():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    step = jax.shard_map(
        lambda x: aware(x, KERNEL, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=(P("data"), P()),
    )
    assert_same(jax.jit(step)(X), composed(X, KERNEL))


def test_half_precision_keeps_its_dtype():
    x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    y, stats = aware(x, kernel)
    assert y.dtype == jnp.bfloat16 and stats["var"].dtype == jnp.float32
    expected = composed(X, KERNEL)[0]
    assert abs(np.asarray(y, np.float32) - expected).max() < 0.1


def test_errors():
    with pytest.raises(ValueError, match=r"scale has shape \(3, 5\), .* are \(5,\)"):
        aware(X, KERNEL, scale=jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\)"):
        aware(X, KERNEL, bias=jnp.ones(4))
    with pytest.raises(ValueError, match=r"stats\['mean'\] has shape \(5,\)"):
        aware(X, KERNEL[..., :4], scale=None)
    with pytest.raises(ValueError, match="one single value"):
        aware(X[:1, :1, :1], KERNEL)
    with pytest.raises(TypeError, match="freeze must be a boolean scalar, got int32"):
        jax.jit(lambda flag: aware(X, KERNEL, freeze=flag))(1)
