"""Kernels that are the default on a GPU, by a file; on a GPU that is pretended."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

import jaxnorm
from jaxnorm._kernels import defaults
from jaxnorm.models import implementations

DEVICE = "NVIDIA H200"
BOXES = {
    DEVICE: [
        {
            "pattern": "rows",
            "backend": "triton",
            "dtypes": ["bfloat16"],
            "features": [768, 8192],
            "least_bytes": 2**20,
        },
        {
            "pattern": "columns",
            "backend": "triton",
            "dtypes": ["bfloat16", "float32"],
            "features": [64, 640],
            "least_bytes": 2**20,
        },
    ]
}


@pytest.fixture
def pretended(monkeypatch):
    """The first device is a GPU of `DEVICE`'s kind, with `BOXES` for it."""
    device = types.SimpleNamespace(device_kind=DEVICE, compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(defaults, "_boxes", lambda: defaults.parsed(BOXES))
    return device


def gradient(norm):
    def both(x, *params):
        y, pull = jax.vjp(norm, x, *params)
        return pull(y)

    return both


def given(shape, dtype=jnp.bfloat16):
    params = [jax.ShapeDtypeStruct(shape[-1:], jnp.float32)] * 2
    return jax.ShapeDtypeStruct(shape, dtype), *params


def code_of_gradient(norm, shape, dtype=jnp.bfloat16):
    found = implementations(gradient(norm), *given(shape, dtype))
    (of_gradient,) = (v for v in found if "gradient" in v.operation)
    return of_gradient


group_silu = functools.partial(jaxnorm.group_norm, activation="silu")


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("norm", "shape"),
    [(jaxnorm.layer_norm, (2048, 4096)), (group_silu, (4, 32, 32, 320))],
)
def test_what_the_file_names_runs_unless_xla_is_asked_for(norm, shape):
    assert code_of_gradient(norm, shape).kernel == "a kernel for NVIDIA's GPUs"
    asks = functools.partial(norm, implementation="xla")
    said = str(implementations(gradient(asks), *given(shape)))
    assert "kernel for NVIDIA" not in said


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2048, 512), jnp.bfloat16),  # too narrow
        ((2048, 16384), jnp.bfloat16),  # too wide
        ((2048, 4096), jnp.float32),  # of another dtype
        ((64, 4096), jnp.bfloat16),  # too small
    ],
)
def test_what_is_in_no_box_is_xlas(shape, dtype):
    assert code_of_gradient(jaxnorm.layer_norm, shape, dtype).kernel is None


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_batch_norm_has_no_kernels_by_default(activation):
    """They are measured for the groups of each example alone."""
    norm = jaxnorm.BatchNorm(activation=activation)
    x, *params = given((64, 28, 28, 128))
    stats = {"mean": jnp.zeros(128), "var": jnp.ones(128)}

    def loss(x, scale, bias):
        return norm(x, {"scale": scale, "bias": bias}, stats)[0].sum()

    said = str(implementations(jax.grad(loss), x, *params))
    assert "activated" not in said and "kernel for NVIDIA" not in said


@pytest.mark.parametrize(
    ("kind", "capability"), [("NVIDIA H100", "9.0"), ("AMD", "gfx942")]
)
def test_another_gpu_has_no_defaults(pretended, kind, capability):
    pretended.device_kind, pretended.compute_capability = kind, capability
    assert code_of_gradient(jaxnorm.layer_norm, (2048, 4096)).kernel is None


@pytest.mark.usefixtures("pretended")
def test_sizes_that_are_not_known_have_no_defaults():
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
    assert defaults.backend("rows", x.shape, 4096, x.dtype) is None


def test_a_kernel_that_is_asked_for_is_found_on_a_gpu(pretended, monkeypatch):
    monkeypatch.setattr(defaults, "_boxes", dict)
    asks = functools.partial(jaxnorm.layer_norm, implementation="triton")
    assert code_of_gradient(asks, (512, 1024)).kernel
    pretended.compute_capability = "gfx942"
    assert "this one is gfx942" in str(code_of_gradient(asks, (512, 1024)))
