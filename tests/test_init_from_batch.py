"""Parameters by which the outputs of layers are standardized on a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx
from jaxnorm.models import init_from_batch

RNG = np.random.default_rng(0)
X = RNG.normal(3, [1, 0.1, 10], (16, 5, 3)).astype(np.float32)


class Net(nn.Module):
    """Dense layers without bias and in a transform, weight norm and an ActNorm."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, mask=None):
        dense = functools.partial(nn.Dense, param_dtype=self.param_dtype)
        x = jl.Norm(jaxnorm.ActNorm(), name="act")(x, mask=mask)
        self.sow("seen", "first", x)
        x = nn.tanh(dense(4, use_bias=False, name="plain")(x))
        x = nn.tanh(nn.remat(nn.Dense)(4, param_dtype=self.param_dtype, name="in")(x))
        x = jl.WeightNorm(dense(6, name="normed"))(x)
        self.sow("seen", "third", x)
        return nn.Dense(2, name="head")(nn.tanh(x))


class NnxNet(nnx.Module):
    """The same for NNX."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.act = jx.Norm(jaxnorm.ActNorm(), 3)
        self.plain = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
        self.inner = nnx.Linear(4, 4, rngs=rngs)
        normed = nnx.Linear(4, 6, rngs=rngs)
        self.normed = jx.WeightNorm(normed, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x, mask=None):
        x = nnx.tanh(self.plain(self.act(x, mask=mask)))
        x = nnx.tanh(nnx.remat(lambda layer, x: layer(x))(self.inner, x))
        return self.head(nnx.tanh(self.normed(x)))


def started(seed=0, **options):
    params = Net(**options).init(jax.random.key(seed), X)["params"]
    biased = jax.tree.map(lambda v: v + 0.3 if v.ndim < 2 else v, params)
    return {"params": biased}


def in_float64(params, x, valid=None, per_feature=True, center=True):
    """The same, layer by layer, with kernels and biases as they should become."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    new = jax.tree.map(np.copy, params)
    valid = np.ones(x.shape[:-1], bool) if valid is None else valid
    x = np.where(valid[..., None], x, 0).astype(np.float64)

    def standardized(y, weight, scale, bias=None):
        """Changes `scale` and `bias`, so that y is what is returned."""
        over = 0 if per_feature else None
        mean, std = y[valid].mean(over), y[valid].std(over)
        mean = mean if center and bias is not None else np.zeros_like(mean)
        new[weight][scale] /= std
        if bias is not None:
            new[weight if bias == "bias" else bias]["bias"][:] -= mean
            new[weight if bias == "bias" else bias]["bias"][:] /= std
        return (y - mean) / std

    def dense(x, name):
        layer = params[name]
        return x @ layer["kernel"] + layer.get("bias", 0)

    x = standardized(
        x * params["act"]["scale"] + params["act"]["bias"], "act", "scale", "bias"
    )
    x = np.where(valid[..., None], x, 0)
    x = np.tanh(standardized(dense(x, "plain"), "plain", "kernel"))
    x = np.tanh(standardized(dense(x, "in"), "in", "kernel", "bias"))
    kernel, gain = params["normed"]["kernel"], params["WeightNorm_0"]
    kernel = kernel / np.linalg.norm(kernel, axis=0) * gain["normed/kernel/scale"]
    y = x @ kernel + params["normed"]["bias"]
    x = standardized(y, "WeightNorm_0", "normed/kernel/scale", "normed")
    standardized(dense(np.tanh(x), "head"), "head", "kernel", "bias")
    return new


def assert_same(a, b, tolerance=2e-5):
    for (path, v), w in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        assert np.isfinite(np.asarray(v, np.float32)).all(), path
        scale = abs(np.asarray(w)).max()
        np.testing.assert_allclose(
            np.asarray(v, np.float64), w, tolerance, tolerance * scale, err_msg=path
        )


@pytest.mark.parametrize("options", [{}, {"per_feature": False}, {"center": False}])
def test_each_layer_is_standardized_in_turn(options):
    variables, x = started(), X - 2.9  # whose mean no tanh is saturated by
    params = init_from_batch(Net().apply, variables, x, **options)
    assert_same(params, in_float64(variables["params"], x, **options))


def test_the_first_outputs_have_mean_0_and_variance_1():
    params = init_from_batch(Net().apply, started(), X)
    y, rest = Net().apply({"params": params}, X, mutable=["seen"])
    seen = [v[0] for v in jax.tree.leaves(rest, is_leaf=lambda v: type(v) is tuple)]
    for v in (y, *seen):
        np.testing.assert_allclose(v.mean((0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(v.std((0, 1)), 1, rtol=1e-5)


def as_nnx(params):
    """The parameters of `Net` for `NnxNet`."""
    params = dict(params)
    gain = params.pop("WeightNorm_0")["normed/kernel/scale"]
    normed = {"layer_instance": params.pop("normed"), "scales": {("kernel",): gain}}
    return params | {"inner": params.pop("in"), "normed": normed}


@pytest.mark.parametrize("masked", [False, True])
def test_nnx_models_are_as_linen_models(masked):
    variables, model = started(), NnxNet()
    jx.update(model, {"params": as_nnx(variables["params"])})
    before = nnx.graphdef(model)
    mask = np.arange(5) < RNG.integers(1, 6, (16, 1)) if masked else None
    own = None if mask is None else mask[..., None]
    jx.init_from_batch(model, X, lambda model, x: model(x, mask=own), mask=mask)
    got = jx.variables(model)["params"]
    assert_same(got, as_nnx(in_float64(variables["params"], X, mask)))
    assert nnx.graphdef(model) == before


def test_what_a_mask_excludes_counts_for_nothing():
    variables = started()
    mask = np.arange(5) < RNG.integers(1, 6, (16, 1))
    x = np.where(mask[..., None], X, np.nan)
    apply = functools.partial(Net().apply, mask=mask[..., None])
    params = init_from_batch(apply, variables, x, mask=mask)
    assert_same(params, in_float64(variables["params"], X, mask))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_norm_takes_the_mask_that_it_is_called_with(api):
    """And gives 0 where that is false, which the next layer then sees."""
    params = started()["params"]
    mask = (np.arange(5) < RNG.integers(1, 5, (16, 1)))[..., None]
    x = np.where(mask, X, np.nan)
    where = ("act", "plain").__contains__
    if api == "linen":
        apply = functools.partial(Net().apply, mask=mask)
        new = init_from_batch(apply, {"params": params}, x, where=where)
    else:
        model = NnxNet()
        jx.update(model, {"params": as_nnx(params)})
        jx.init_from_batch(model, x, lambda m, x: m(x, mask=mask), where=where)
        new = jx.variables(model)["params"]
    valid = X[mask[..., 0]].astype(np.float64)
    mean, std = valid.mean(0), valid.std(0)
    scaled = np.where(mask, (X - mean) / std, 0) @ np.float64(params["plain"]["kernel"])
    expected = np.float64(params["plain"]["kernel"]) / scaled.std((0, 1))
    assert_same(new["act"], {"bias": -mean / std, "scale": 1 / std})
    assert_same(new["plain"], {"kernel": expected})


def test_half_precision_keeps_its_dtypes():
    variables = started(param_dtype=jnp.bfloat16)
    params = init_from_batch(Net(param_dtype=jnp.bfloat16).apply, variables, X)
    dtypes = [jax.tree.map(lambda v: v.dtype, t) for t in (params, variables["params"])]
    assert dtypes[0] == dtypes[1]
    assert params["plain"]["kernel"].dtype == jnp.bfloat16
    assert_same(params, in_float64(variables["params"], X), tolerance=2e-2)


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_devices_count_as_one(way):
    variables, mesh = started(), Mesh(np.array(jax.devices()), ("data",))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    tool = functools.partial(init_from_batch, Net().apply)
    if way == "shard_map":
        tool = functools.partial(tool, axis_name="data")
        tool = jax.shard_map(tool, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert_same(tool(variables, x), in_float64(variables["params"], X))


def test_layers_of_a_scan_are_taken_one_by_one():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.Dense(3, name="dense")(x)
            return nn.tanh(y), y

    how: Any = {"split_rngs": {"params": True}, "length": 4}
    both: Any = {"params": 0, "init_from_batch": 0}
    stack = nn.scan(Layer, variable_axes=both, **how)()
    variables = stack.init(jax.random.key(0), X, None)
    call = functools.partial(called_with, stack)
    params = init_from_batch(call, variables, X[:, 0])
    result: Any = stack.apply({"params": params}, X[:, 0], None)
    np.testing.assert_allclose(result[1].mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(result[1].std(1), 1, rtol=1e-5)
    hidden = nn.scan(Layer, variable_axes={"params": 0}, **how)()
    with pytest.raises(ValueError, match=r"'dense' is within a transform.*variable_ax"):
        init_from_batch(functools.partial(called_with, hidden), variables, X)


def called_with(stack, variables, x, mutable):
    return stack.apply(variables, x, None, mutable=mutable)


def test_traced_features_without_variance_stay():
    model = nn.Dense(2)
    kernel, bias = jnp.array([[0.0, 2.0]] * 3), jnp.array([3.0, 0.0])
    variables = {"params": {"kernel": kernel, "bias": bias}}
    init = jax.jit(functools.partial(init_from_batch, model.apply))
    stays = init(variables, jnp.asarray(X).at[0].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, stays, variables["params"])
    params = init(variables, X)
    y = X.astype(np.float64).sum(-1) * 2
    np.testing.assert_allclose(params["kernel"][0], [0, 2 / y.std()], 1e-5)
    np.testing.assert_allclose(params["bias"], [3, -y.mean() / y.std()], 1e-5)


class Equalized(nn.Module):
    """A bias that is multiplied, as in layers of equalized learning rates."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (3, 2))
        bias = self.param("bias", nn.initializers.zeros, (2,))
        return x @ kernel + 0.01 * jnp.broadcast_to(bias, (*x.shape[:-1], 2))


def test_a_bias_that_is_not_added_as_it_is_raises():
    model = nn.Sequential([Equalized()])
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="do not add their biases as they are"):
        init_from_batch(model.apply, variables, X + 5)


@pytest.mark.parametrize("jit", [True, False])
def test_wrappers_in_a_sequence(jit):
    wrap = jaxnorm.linen.WeightNorm
    model = nn.Sequential([wrap(nn.Dense(4)), nn.relu, wrap(nn.Dense(2))])
    variables = model.init(jax.random.key(0), X)
    init = functools.partial(init_from_batch, model.apply)
    params = (jax.jit(init) if jit else init)(variables, X)
    y = np.asarray(model.apply({"params": params}, X), np.float64).reshape(-1, 2)
    np.testing.assert_allclose(y.std(0), 1, 1e-4)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-4)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(3, name="both")
        return dense(nn.tanh(dense(x)))


class Unused(nn.Module):
    def setup(self):
        self.used, self.unused = nn.Dense(3), nn.Dense(3)

    def __call__(self, x):
        self.unused(x) if self.is_initializing() else None
        return self.used(x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jl.SpectralNorm(nn.Dense(3, name="dense"))(x, update_stats=True)


def initial(model, x=X):
    return model, model.init(jax.random.key(0), x)


ZERO = nn.Dense(2, kernel_init=nn.initializers.zeros)
TURNED = nn.ConvTranspose(4, (3,), transpose_kernel=True, name="up")


@pytest.mark.parametrize(
    ("model", "x", "options", "words"),
    [
        (Shared(), X, {}, r"'both' is called 2 times"),
        (Unused(), X, {}, r"\['unused'\] are not called"),
        (Spectral(), X, {}, r"\['dense'\] are not proportional"),
        (ZERO, X, {}, "variance 0 in 2 of 2 features"),
        (nn.Dense(2), X * np.nan, {}, "not finite in 2 of 2 features"),
        (TURNED, X, {}, r"'kernel' has shape \(3, 4, 3\), .* has 4 features"),
        (nn.Dense(2), X, {"where": lambda p: False}, "none of the layers with a kern"),
        (nn.LayerNorm(), X, {}, "there are no layers with a kernel"),
        (nn.Dense(2), X, {"mask": np.ones((2, 5))}, r"mask has shape \(2, 5\), whic"),
    ],
)
def test_failures_name_the_layer(model, x, options, words):
    model, variables = initial(model)
    with pytest.raises(ValueError, match=words):
        init_from_batch(model.apply, variables, x, **options)


def test_models_of_nnx_fail_alike_and_stay_as_they_are():
    class Twice(nnx.Module):
        def __init__(self):
            self.both = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.both(self.both(x))

    model = Twice()
    before = jx.variables(model)
    with pytest.raises(ValueError, match="'both' is called 2 times"):
        jx.init_from_batch(model, X)
    jax.tree.map(np.testing.assert_array_equal, jx.variables(model), before)
    assert type(model.both) is nnx.Linear
    with pytest.raises(TypeError, match="must return what model.apply does"):
        init_from_batch(lambda v, x, mutable: x, started(), X)


def test_statistics_and_other_layers_stay():
    rngs = nnx.Rngs(0)
    norm = jx.BatchNorm(4, rngs=rngs)
    model: Any = nnx.Sequential(nnx.Conv(3, 4, (3,), rngs=rngs), norm, nnx.tanh)
    jx.init_from_batch(model, X)
    assert not model.layers[1].mean[...].any()
    np.testing.assert_array_equal(model.layers[1].scale[...], 1)
    y = model.layers[0](X)
    np.testing.assert_allclose(y.std((0, 1)), 1, rtol=1e-5)


# ---- ActNorm ----------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [-1, 1, (1, 2)])
def test_flows_have_the_inverse_and_the_log_determinant(masked, axis):
    norm = jaxnorm.ActNorm(axis=axis)
    x = X[:4]
    mask = RNG.random(x.shape) < 0.7 if masked else None
    shape = norm.axes(x.shape).feature_shape
    params = {k: RNG.normal(size=shape).astype(np.float32) for k in ("scale", "bias")}
    y, _ = norm(x, params, {}, mask=mask)
    back = norm.inverse(y, params, mask=mask)
    kept = x if mask is None else np.where(mask, x, 0)
    np.testing.assert_allclose(back, kept, rtol=1e-4, atol=1e-4)
    got = norm.log_det(x, params, mask=mask)
    for i, example in enumerate(x):
        jacobian = jax.jacobian(lambda v: norm(v[None], params, {})[0][0])(example)
        jacobian = np.asarray(jacobian, np.float64).reshape(example.size, -1)
        valid = np.ones(example.size, bool) if mask is None else mask[i].ravel()
        _, exact = np.linalg.slogdet(jacobian[np.ix_(valid, valid)])
        np.testing.assert_allclose(got[i], exact, rtol=1e-5, atol=1e-5)


def test_what_a_flow_is_given_is_checked():
    norm, params = jaxnorm.ActNorm(), {"scale": jnp.ones(2)}
    wrong: Any = {"mask": "some"}
    for call in (norm.inverse, norm.log_det):
        with pytest.raises(ValueError, match=r"scale has shape \(2,\), but the feat"):
            call(X, params)
        with pytest.raises(ValueError, match="ActNorm has no parameter"):
            call(X, {"gain": jnp.ones(3)})
        with pytest.raises(TypeError, match="mask must be boolean"):
            call(X, {}, **wrong)
    with pytest.raises(ValueError, match="must be that of examples, got axis=0 for an"):
        jaxnorm.ActNorm(axis=0).log_det(X, {})
    assert norm.inverse(X.astype(jnp.bfloat16), {}).dtype == jnp.bfloat16
    assert norm.log_det(X.astype(jnp.bfloat16), {}).dtype == jnp.float32
