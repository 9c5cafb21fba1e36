"""Other implementations' values, where they are right, from tests/golden/make.py."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm

PATH = pathlib.Path(__file__).parent / "golden" / "golden.npz"
GOLDEN = dict(np.load(PATH))
EPSILON = 0.01  # of all the cases that have one


def case(name):
    """The arrays of a case, in float64."""
    found = {
        k.partition("/")[2]: v.astype(np.float64)
        for k, v in GOLDEN.items()
        if k.startswith(name + "/")
    }
    assert found, name
    return found


def close(actual, desired, limit=1e-5):
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, desired, rtol=limit, atol=limit / 5)


def check(norm, g, params, stats=None, step=None, limit=1e-5):
    """Output, state and gradients of a training step; returns the new state.

    `params` are named as here, with the name that the other implementation has.
    """
    x, dy, y, dx = (
        g[k] if step is None else g[k][step] for k in ("x", "dy", "y", "dx")
    )
    values = {k: g[v] for k, v in params.items()}

    @jax.jit
    def run(x, params):
        out, pull, new = jax.vjp(
            lambda x, p: norm(x, p, stats or {}), x, params, has_aux=True
        )
        return out, new, *pull(dy)

    out, new, grad, grads = run(x, values)
    close(out, y, limit)
    close(grad, dx, limit)
    for k, other in params.items():
        desired = g[f"d{other}"]
        close(grads[k], desired if step is None else desired[step], limit)
    return new


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


AFFINE = {"scale": "scale", "bias": "bias"}


@pytest.mark.parametrize(
    "name, norm, params",
    [
        ("torch_layer_norm", jaxnorm.LayerNorm(epsilon=EPSILON), AFFINE),
        ("torch_rms_norm", jaxnorm.RMSNorm(epsilon=EPSILON), {"scale": "scale"}),
        (
            "torch_group_norm",
            jaxnorm.GroupNorm(num_groups=4, epsilon=EPSILON),
            AFFINE,
        ),
        (
            "torch_local_response_norm_5",
            jaxnorm.LocalResponseNorm(size=5, alpha=0.3, beta=0.6, k=2.0),
            {},
        ),
        (
            "torch_local_response_norm_4",
            jaxnorm.LocalResponseNorm(size=4, alpha=0.3, beta=0.6, k=2.0),
            {},
        ),
        (
            "timm_evo_norm_s0",
            jaxnorm.EvoNormS0(num_groups=4, epsilon=EPSILON),
            AFFINE | {"slope": "v"},
        ),
        (
            "timm_filter_response_norm",
            jaxnorm.FilterResponseNorm(epsilon=EPSILON),
            AFFINE | {"threshold": "tau"},
        ),
        (
            "timm_global_response_norm",
            jaxnorm.GlobalResponseNorm(epsilon=EPSILON),
            AFFINE,
        ),
    ],
)
def test_stateless(name, norm, params):
    check(norm, case(name), params)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("torch_batch_norm", jaxnorm.BatchNorm),
        ("torch_instance_norm", jaxnorm.RunningInstanceNorm),
    ],
)
def test_running_statistics_of_torch(name, kind):
    """PyTorch's momentum is ours subtracted from 1, and it keeps unbiased variances."""
    g = case(name)
    norm = kind(epsilon=EPSILON, momentum=0.9, unbiased=True)
    stats = {k: g[k] for k in ("mean", "var")}
    for step in range(3):
        stats = check(norm, g, AFFINE, stats, step)
        close(stats["mean"], g["new_mean"][step])
        close(stats["var"], g["new_var"][step])
    params = {k: g[k] for k in AFFINE}
    y, _ = norm(g["x"][-1], params, stats, use_running_average=True)
    close(y, g["y_eval"])


def test_evo_norm_b0_of_timm():
    """timm normalizes by the biased variance and keeps the unbiased one."""
    g = case("timm_evo_norm_b0")
    norm = jaxnorm.EvoNormB0(epsilon=EPSILON, momentum=0.9, unbiased=True)
    names = AFFINE | {"slope": "v"}
    stats = check(norm, g, names, {"var": g["var"]})
    close(stats["var"], g["new_var"])
    params = {k: g[v] for k, v in names.items()}
    y, _ = norm(g["x"], params, stats, use_running_average=True)
    close(y, g["y_eval"])


def test_renorm_of_keras():
    """Keras averages deviations, with epsilon in them, and clips r to [rmin, rmax]; the
    paper's 1 / rmax is its rmin here, and each step starts from its averages."""
    g = case("keras_batch_renorm")
    rmax, rmin, dmax = 1.25, 0.7, 0.4
    mean, deviation = g["renorm_mean"], g["renorm_stddev"]
    params = {k: g[k] for k in AFFINE}
    for step in range(3):
        x = g["x"][step]
        stats = {"mean": mean, "var": deviation**2 - EPSILON}
        y, pull = jax.vjp(
            functools.partial(_renorm, params, stats, rmin, rmax, dmax), x
        )
        close(y, g["y"][step], 3e-5)
        close(pull(g["dy"][step])[0], g["dx"][step], 3e-5)
        mean, deviation = g["new_renorm_mean"][step], g["new_renorm_stddev"][step]


def _renorm(params, stats, rmin, rmax, dmax, x):
    """Our limits are reciprocal: features below 1 are taken with those of rmin."""
    low, high = (
        jaxnorm.BatchRenorm(epsilon=EPSILON, rmax=limit, dmax=dmax)(x, params, stats)[0]
        for limit in (1 / rmin, rmax)
    )
    ratio = jnp.sqrt((x.var((0, 1, 2)) + EPSILON) / (stats["var"] + EPSILON))
    return jnp.where(ratio < 1, low, high)


def check_kernel(function, g, params):
    """An effective kernel, and the gradients of what it is made of."""
    args = [g[k] for k in params]
    weight, pull = jax.vjp(function, *args)
    close(weight, g["weight"])
    for k, grad in zip(params, pull(g["dweight"]), strict=True):
        close(grad, g[f"d{k}"])


@pytest.mark.parametrize("name", ["torch_weight_norm_conv", "torch_weight_norm_linear"])
def test_weight_norm_of_torch(name):
    check_kernel(jaxnorm.weight_norm, case(name), ("v", "g"))


def test_weight_standardization_of_timm():
    check_kernel(
        lambda w: jaxnorm.weight_standardize(w, epsilon=EPSILON),
        case("timm_std_conv"),
        ("w",),
    )

    def scaled(w, gain):
        return jaxnorm.weight_standardize(w, 1.7 * gain, epsilon=EPSILON, scaled=True)

    check_kernel(scaled, case("timm_scaled_std_conv"), ("w", "gain"))


def test_spectral_norm_of_torch():
    """PyTorch's iteration ends with the other vector, so that its singular value is a
    half step ahead of that which Flax and jaxnorm take."""
    g = case("torch_spectral_norm")
    _, u, sigma = jaxnorm.spectral_norm(g["w"], g["u"])
    close(u, g["new_u"])
    close(
        sigma,
        jnp.linalg.norm(g["w"] @ g["u"] / jnp.linalg.norm(g["w"] @ g["u"]) @ g["w"]),
    )
    ahead = g["w"] / jnp.linalg.norm(g["w"] @ u)
    close(ahead, g["weight"])
