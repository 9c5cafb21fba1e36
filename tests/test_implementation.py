"""Kernels where they are asked for: as without them, or an error that says why not."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from norms import assert_close
from test_activation import EXACT

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _kernels as kernels

CASES = {
    "layer": (jaxnorm.LayerNorm(), (6, 5, 256)),
    "rms": (jaxnorm.RMSNorm(epsilon=1e-3), (16, 128)),
    "group": (jaxnorm.GroupNorm(num_groups=4), (3, 4, 4, 64)),
    "group relu": (jaxnorm.GroupNorm(num_groups=2, activation="relu"), (2, 8, 8, 32)),
    "group silu": (jaxnorm.GroupNorm(num_groups=8, activation="silu"), (2, 16, 64)),
    "instance": (jaxnorm.InstanceNorm(), (2, 4, 8, 32)),
}


def problem(name, dtype=np.float32):
    norm, shape = CASES[name]
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(0.5, 2, shape).astype(dtype) for _ in range(2))
    params = {
        k: rng.uniform(0.5, 2, shape[-1:]).astype(np.float32) for k in norm.param_names
    }
    return norm, x, params, dy


def by_kernels(norm, x, params):
    """What normalize does with an implementation, interpreted."""
    axes = norm.axes(x.shape)
    how = kernels.KernelCall(
        "triton",
        norm.epsilon,
        jnp.dtype(x.dtype),
        interpret=True,
        center=norm.center,
        activation=getattr(norm, "activation", None),
    )
    return kernels.normalized(how, axes, x, params["scale"], params.get("bias"))


def exact(norm, x, params):
    """The float64 reference, with the activation by hand."""
    kinds = {
        jaxnorm.LayerNorm: reference.layer_norm,
        jaxnorm.RMSNorm: reference.rms_norm,
        jaxnorm.InstanceNorm: reference.instance_norm,
    }
    ref = kinds.get(type(norm))
    if ref is None:
        ref = functools.partial(reference.group_norm, num_groups=norm.num_groups)
    args = [params[k] for k in norm.param_names]
    y = ref(np.asarray(x, np.float64), *args, epsilon=norm.epsilon).y
    return EXACT[norm.activation](y) if getattr(norm, "activation", None) else y


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_kernels_give_what_xla_gives(name, dtype):
    norm, x, params, dy = problem(name, dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def both(f, x, dy):
        y, pull = jax.vjp(f, x, params)
        return y, *pull(dy)

    y, dx, dparams = both(functools.partial(by_kernels, norm), x, dy)
    wide = x.astype(np.float32)  # nothing but the results of kernels is rounded
    plain = both(lambda x, params: norm(x, params, {})[0], wide, dy.astype(np.float32))
    _, ex, eparams = plain
    assert y.dtype == dtype
    assert_close(y, exact(norm, x, params), dtype=dtype, summed=4, size=2)
    assert_close(dx, np.asarray(ex, np.float64), dtype=dtype, summed=4, size=4)
    for k, v in dparams.items():
        assert v.dtype == params[k].dtype
        size = 1 + np.abs(np.asarray(eparams[k])).max()
        assert_close(v, eparams[k], dtype=jnp.float32, summed=x.size, size=size)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_in_the_program_only_where_asked_for(name):
    norm, x, params, dy = problem(name, jnp.bfloat16)

    def traced(implementation):
        asked = type(norm)(**(vars(norm) | {"implementation": implementation}))

        def gradient(x, params, dy):
            return jax.vjp(lambda *a: asked(*a, {})[0], x, params)[1](dy)

        return str(jax.make_jaxpr(gradient)(x, params, dy))

    assert "pallas_call" in traced("triton")
    assert "pallas_call" not in traced(None)
    assert "pallas_call" not in traced("xla")


UNFIT = {
    "they do not take a mask": ("layer", {"mask": np.ones(1, bool)}, {}),
    "they do not take axis_name": ("layer", {}, {"axis_name": "i"}),
    "they do not take a residual": ("group", {"residual": np.ones((3, 4, 4, 64))}, {}),
    "kernels take bfloat16, float16, float32, got complex64": ("rms", "complex", {}),
    "kernels of columns take activations": ("group", {}, {"activation": "gelu"}),
    "not for axes (1, 2)": ("layer", {}, {"reduction_axes": (1, 2)}),
    "of the shape of the last axis": ("group", "per example", {}),
    "implementation='cuda' is none of": ("layer", {}, {"implementation": "cuda"}),
}


@pytest.mark.parametrize("message", UNFIT)
def test_what_does_not_fit_says_why(message):
    name, call, settings = UNFIT[message]
    norm, x, params, _ = problem(name)
    settings = vars(norm) | {"implementation": "triton"} | settings
    if call == "complex":
        call, x = {}, x + 1j
    if call == "per example":
        call, params = {}, {"scale": np.ones((3, 64), np.float32)}
    with pytest.raises(ValueError, match=re.escape(message)):
        norm = type(norm)(**settings)
        jax.vmap(lambda x: norm(x, params, {}, **call), axis_name="i")(x[None])


def test_batch_norm_and_traced_epsilons_have_no_kernels():
    x = np.ones((4, 8, 128), np.float32)
    assert "implementation" not in inspect.signature(jaxnorm.batch_norm).parameters
    with pytest.raises(ValueError, match="there are kernels for the last axis alone"):
        axes = jaxnorm.Axes.keep(x.shape, -1)
        jaxnorm.normalize(x, {}, axes, epsilon=1e-5, implementation="mosaic")

    def f(epsilon):
        return jaxnorm.layer_norm(x, epsilon=epsilon, implementation="triton")

    with pytest.raises(ValueError, match="an epsilon that is traced"):
        jax.jit(f)(1e-6)


def test_classes_of_both_apis_ask_for_it():
    x = np.ones((2, 4, 32), np.float32)
    for kind in ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"):
        groups = {"num_groups": 4} if kind == "GroupNorm" else {}
        linen = getattr(jaxnorm.linen, kind)(implementation="triton", **groups)
        with pytest.raises(ValueError, match="they do not take a mask"):
            linen.init(jax.random.key(0), x, mask=np.ones(1, bool))
        layer = getattr(jaxnorm.nnx, kind)(
            32, implementation="triton", rngs=nnx.Rngs(0), **groups
        )
        with pytest.raises(ValueError, match="they do not take a mask"):
            layer(x, mask=np.ones(1, bool))
