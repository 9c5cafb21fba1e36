"""Running statistics of fixed weights: the moments of the whole data set."""

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

SAMPLES, FEATURES = 48, 3
# Where the square of the mean is 1e9 times the variance, and two normal features.
DATA = np.random.default_rng(0).normal(size=(SAMPLES, 4, FEATURES))
DATA = (DATA * [0.1, 2, 1] + [3000, -1, 0]).astype(np.float32)
EXACT = DATA.astype(np.float64)


class Net(nn.Module):
    """Batch norm of the input, and of something that depends on the first."""

    axis_name: str | None = None
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, train=True, mask=None):
        norm = functools.partial(
            jl.BatchNorm, use_running_average=not train, axis_name=self.axis_name
        )
        x = norm(name="input", dtype=self.dtype)(x, mask=mask)
        x = nn.relu(nn.Dense(2, name="dense")(x) + x[..., :1] ** 2)
        return norm(name="hidden", dtype=self.dtype)(x, mask=mask)


def variables(seed=0):
    made = jax.jit(Net().init)(jax.random.key(seed), DATA[:2])
    params = jax.tree.map(lambda v: v + 0.1 * jnp.arange(v.size).reshape(v.shape), made)
    return params


def apply(variables, batch):
    return Net().apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]


def split(*sizes):
    assert sum(sizes) == SAMPLES
    return np.split(DATA, np.cumsum(sizes)[:-1])


def assert_moments(stats, x, rtol=1e-6, unbiased=False):
    x = x.reshape(-1, x.shape[-1])
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol, rtol)
    np.testing.assert_allclose(stats["var"], x.var(0, ddof=int(unbiased)), rtol, rtol)


@pytest.mark.parametrize(
    "sizes", [(48,), (16, 16, 16), (1, 46, 1), (30, 2, 16)], ids=str
)
def test_the_moments_are_those_of_the_whole_however_it_is_split(sizes):
    before = variables()
    stats = jaxnorm.models.recalibrate(apply, before, split(*sizes))
    assert jax.tree.structure(stats) == jax.tree.structure(before["batch_stats"])
    assert_moments(stats["input"], EXACT, rtol=2e-5)


def test_hidden_layers_see_batches_unless_told_otherwise():
    # Near 0, as a running mean of 3000 is rounded by a thousandth of the deviation.
    data = DATA - np.array([3000, 0, 0], np.float32)
    before, batches = variables(), np.split(data, 3)
    stats = jaxnorm.models.recalibrate(apply, before, batches)
    hidden = [hidden_in_float64(before, batch.astype(np.float64)) for batch in batches]
    assert_moments(stats["hidden"], np.concatenate(hidden), rtol=1e-5)
    passes = []

    def progress(batches):
        passes.append(1)
        return batches

    exact = jaxnorm.models.recalibrate(
        apply, before, batches, layer_by_layer=True, progress=progress
    )
    whole = data.astype(np.float64)
    assert_moments(exact["input"], whole, rtol=1e-5)
    assert_moments(exact["hidden"], hidden_in_float64(before, whole), rtol=1e-5)
    assert abs(exact["hidden"]["var"] - stats["hidden"]["var"]).min() > 1e-3
    assert len(passes) == 3  # for two layers, and to see that nothing changes


def hidden_in_float64(variables, x):
    """The input of the second norm, if the first normalizes by the moments of x."""
    mean, var = x.mean((0, 1)), x.var((0, 1))
    return after_the_first(variables, (x - mean) / np.sqrt(var + 1e-5))


def after_the_first(variables, x):
    """The input of the second norm, from what the first has standardized."""
    params = jax.tree.map(np.float64, variables["params"])
    x = x * params["input"]["scale"] + params["input"]["bias"]
    dense = x @ params["dense"]["kernel"] + params["dense"]["bias"]
    return np.maximum(dense + x[..., :1] ** 2, 0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(FEATURES)(x)
        x = jl.BatchNorm(use_running_average=not train)(x)
        return nn.relu(x), x


def test_layers_of_a_scan_are_recalibrated_one_by_one():
    how: Any = {"variable_axes": {"params": 0, "batch_stats": 0}, "length": 3}
    how |= {"split_rngs": {"params": True}, "in_axes": nn.broadcast}
    stack = nn.scan(Block, **how)()
    data = DATA - np.array([3000, 0, 0], np.float32)
    before = stack.init(jax.random.key(0), data, True)

    def apply(variables, x):
        return stack.apply(variables, x, True, mutable=True)[1]["batch_stats"]

    stats = jaxnorm.models.recalibrate(
        apply, before, np.split(data, 3), layer_by_layer=True
    )
    result: Any = stack.apply({**before, "batch_stats": stats}, data, False)
    normalized = result[1]
    np.testing.assert_allclose(normalized.mean((1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std((1, 2)), 1, atol=1e-4)


def test_layers_left_out_normalize_by_their_statistics():
    data = DATA - np.array([3000, 0, 0], np.float32)
    before = variables()
    own = {"mean": jnp.array([1.0, 0, -1]), "var": jnp.array([2.0, 1, 3])}
    before = {**before, "batch_stats": before["batch_stats"] | {"input": own}}
    stats = jaxnorm.models.recalibrate(
        apply, before, [data], where="hidden".__eq__, layer_by_layer=True
    )
    mean, var = (np.asarray(v, np.float64) for v in own.values())
    x = (data - mean) / np.sqrt(var + 1e-5)
    assert_moments(stats["hidden"], after_the_first(before, x), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, stats["input"], own)


def test_a_norm_that_is_called_twice_cannot_settle():
    norm = jaxnorm.BatchNorm()

    def apply(variables, x):
        y, stats = norm(x, {}, variables["batch_stats"]["norm"])
        return {"norm": norm(3 * jax.nn.relu(y) + 2, {}, stats)[1]}

    tree = {"batch_stats": {"norm": norm.init_stats((FEATURES,))}}
    with pytest.raises(ValueError, match=r"\['norm'\] do not settle.*several times"):
        jaxnorm.models.recalibrate(apply, tree, [DATA], layer_by_layer=True)
    jaxnorm.models.recalibrate(apply, tree, [DATA])


def test_evaluation_after_it_is_normalized():
    before = variables()
    unit = jax.tree.map(jnp.zeros_like, before["params"])
    for name in ("input", "hidden"):
        unit[name]["scale"] = jnp.ones_like(unit[name]["scale"])
    unit["dense"]["kernel"] = before["params"]["dense"]["kernel"]
    stats = jaxnorm.models.recalibrate(
        apply, before | {"params": unit}, split(10, 20, 18), layer_by_layer=True
    )
    y: Any = Net().apply({"params": unit, "batch_stats": stats}, DATA, train=False)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1)), 1, atol=1e-4)


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_the_number_of_devices_does_not_matter(way):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    batches = [
        jax.device_put(batch, NamedSharding(mesh, P("data")))
        for batch in split(8, 24, 16)
    ]

    def on_shards(variables, batch):
        net = Net(axis_name="data")
        return net.apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    spread = jax.shard_map(
        on_shards, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    call = apply if way == "jit" else spread
    stats = jaxnorm.models.recalibrate(call, variables(), batches)
    assert_moments(stats["input"], EXACT, rtol=2e-5)
    one = jaxnorm.models.recalibrate(apply, variables(), split(8, 24, 16))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), stats, one)


def test_any_signature_any_iterable_and_masks():
    def batches():
        for x in split(20, 28):
            mask = np.arange(4) < np.arange(1, len(x) + 1)[:, None] % 5
            padded = np.where(mask[..., None], x, np.nan)
            yield {"x": padded, "mask": mask[..., None]}

    def masked(variables, batch):
        return Net().apply(variables, **batch, mutable=True)[1]["batch_stats"]

    stats = jaxnorm.models.recalibrate(masked, variables(), batches())
    valid = [batch["x"][batch["mask"][..., 0]] for batch in batches()]
    assert_moments(stats["input"], np.concatenate(valid).astype(np.float64), rtol=2e-5)


def test_the_variance_may_be_unbiased():
    stats = jaxnorm.models.recalibrate(apply, variables(), split(8, 40), unbiased=True)
    assert_moments(stats["input"], EXACT, rtol=2e-5, unbiased=True)


def test_counts_have_no_limit():
    """2**33 elements, of which 2**31 - 2 in each of four batches and 8 in another."""

    def apply(variables, batch):
        mean, size = batch
        new = {
            "batch_mean": mean,
            "batch_var": jnp.ones(1),
            "batch_size": size,
            "batch_residue": jnp.zeros(1),
        }
        return {"norm": variables["batch_stats"]["norm"] | new}

    tree = {"params": {}, "batch_stats": {"norm": jaxnorm.init_stats(1)}}
    many, few = np.array([2**31 - 2], np.int32), np.array([8], np.int32)
    means = np.array([[0.0], [1.0], [2.0], [3.0], [1e6]], np.float32)
    batches = list(zip(means, [many] * 4 + [few], strict=True))
    stats = jaxnorm.models.recalibrate(apply, tree, batches)["norm"]
    mean = (1.5 * 4 * (2**31 - 2) + 8e6) / 2**33
    np.testing.assert_allclose(stats["mean"], mean, 1e-6)
    offset = (means[:, 0] - mean) ** 2
    var = 1 + (offset[:4].sum() * (2**31 - 2) + offset[4] * 8) / 2**33
    np.testing.assert_allclose(stats["var"], var, 1e-6)


def test_only_the_chosen_layers_change():
    before = variables()
    stats = jaxnorm.models.recalibrate(apply, before, split(48), where="hidden".__eq__)
    jax.tree.map(
        np.testing.assert_array_equal, stats["input"], before["batch_stats"]["input"]
    )
    assert (stats["hidden"]["var"] != before["batch_stats"]["hidden"]["var"]).all()


def test_marks_and_counts_stay():
    before = variables()
    frozen = before | {"batch_stats": jaxnorm.models.freeze(before["batch_stats"])}
    stats = jaxnorm.models.recalibrate(apply, frozen, split(48))
    assert jaxnorm.models.frozen(stats) == jaxnorm.models.frozen(frozen["batch_stats"])
    assert_moments(stats["input"], EXACT, rtol=2e-5)


def test_half_precision_and_features_without_data():
    norm = jaxnorm.BatchNorm()
    x = np.random.default_rng(0).normal(5, 1, (64, 2))
    mask = np.array([True, False])

    def apply(variables, batch):
        stats = variables["batch_stats"]["norm"]
        return {"norm": norm(batch, {}, stats, mask=mask)[1]}

    tree = {"batch_stats": {"norm": jaxnorm.init_stats(2)}}
    batches = [jnp.asarray(part, jnp.bfloat16) for part in np.split(x, 4)]
    stats = jaxnorm.models.recalibrate(apply, tree, batches)["norm"]
    rounded = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(stats["mean"], [rounded[:, 0].mean(), 0], 1e-6)
    np.testing.assert_allclose(stats["var"], [rounded[:, 0].var(), 1], 1e-5)
    assert stats["mean"].dtype == jnp.float32


def test_nnx_models():
    rngs = nnx.Rngs(0)
    model: Any = nnx.Sequential(
        jx.BatchNorm(FEATURES, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        jx.Norm(jaxnorm.BatchNorm(), FEATURES),
    )
    model.eval()
    jx.recalibrate(model, split(16, 32), layer_by_layer=True)
    assert_moments(jx.variables(model)["batch_stats"]["layers"][0], EXACT, rtol=2e-5)
    np.testing.assert_allclose(model.layers[2].var[...], 1, 1e-3)  # nothing dropped
    assert model.layers[0].use_running_average
    batches = [{"a": batch} for batch in split(24, 24)]
    before = jx.variables(model)
    jx.recalibrate(
        model, batches, lambda model, b: model(b["a"] + 1), where="layers/0".__eq__
    )
    after = jx.variables(model)["batch_stats"]["layers"]
    assert_moments(after[0], EXACT + 1, rtol=2e-5)
    jax.tree.map(
        np.testing.assert_array_equal, after[2], before["batch_stats"]["layers"][2]
    )


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return jl.BatchNorm(use_running_average=False, name="ours")(x)


def test_failures_name_the_layer_and_the_batch():
    before, bad = variables(), DATA.copy()
    bad[20] = np.nan
    with pytest.raises(ValueError, match=r"batch 1 .*layer '(input|hidden)'.*not fini"):
        jaxnorm.models.recalibrate(apply, before, np.split(bad, 3))
    with pytest.raises(ValueError, match="no batches"):
        jaxnorm.models.recalibrate(apply, before, [])
    with pytest.raises(TypeError, match="layer_by_layer.*list_iterator"):
        jaxnorm.models.recalibrate(apply, before, iter([DATA]), layer_by_layer=True)
    with pytest.raises(ValueError, match=r"none of the layers.*\['hidden', 'input'\]"):
        jaxnorm.models.recalibrate(apply, before, [DATA], where=lambda path: False)

    def partial(variables, batch):
        return {"input": apply(variables, batch)["input"]}

    with pytest.raises(ValueError, match=r"no statistics of the layers \['hidden'\]"):
        jaxnorm.models.recalibrate(partial, before, [DATA])

    def evaluating(variables, batch):
        new = Net().apply(variables, batch, train=False, mutable=["batch_stats"])[1]
        return new["batch_stats"]

    with pytest.raises(ValueError, match="have gathered nothing.*training mode"):
        jaxnorm.models.recalibrate(evaluating, before, [DATA])

    net = FlaxNet()
    mixed = net.init(jax.random.key(0), DATA)

    def flax(variables, batch):
        return net.apply(variables, batch, mutable=True)[1]["batch_stats"]

    with pytest.raises(ValueError, match=r"\['BatchNorm_0'\] have gathered nothing"):
        jaxnorm.models.recalibrate(flax, mixed, [DATA])
    jaxnorm.models.recalibrate(flax, mixed, [DATA], where="ours".__eq__)

    model: Any = nnx.Sequential(jx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="batch 1 .*'layers/0'"):
        jx.recalibrate(model, np.split(bad, 3))
    assert not model.layers[0].mean[...].any()


# ---- Averages of variables --------------------------------------------------------


def step(value, stats, count):
    layer = {"mean": jnp.full(2, stats), "var": jnp.full(2, stats + 1)}
    return {
        "params": {"kernel": jnp.full(3, value), "table": jnp.arange(2) + count},
        "batch_stats": {"norm": layer | {"count": jnp.full(2, count)}},
    }


def test_averages_of_variables_with_each_policy():
    average, new = step(1.0, 4.0, 1), step(2.0, 8.0, 2)
    for policy, mean in (("average", 5.0), ("copy", 8.0), ("recalibrate", 4.0)):
        got = jax.jit(functools.partial(jaxnorm.models.ema, batch_stats=policy))(
            average, new, 0.75
        )
        np.testing.assert_array_equal(got["params"]["kernel"], 1.25)
        np.testing.assert_array_equal(got["params"]["table"], [2, 3])
        layer = got["batch_stats"]["norm"]
        np.testing.assert_array_equal(layer["mean"], mean)
        np.testing.assert_array_equal(layer["var"], mean + 1)
        assert layer["count"][0] == (1 if policy == "recalibrate" else 2)


def test_the_average_of_all_steps():
    average = step(0.0, 0.0, 0)
    for n, value in enumerate((3.0, 5.0, 10.0)):
        average = jaxnorm.models.ema(
            average, step(value, value, n), n / (n + 1), batch_stats="average"
        )
    np.testing.assert_allclose(average["params"]["kernel"], 6, 1e-6)
    np.testing.assert_allclose(average["batch_stats"]["norm"]["mean"], 6, 1e-6)


def test_averages_of_half_precision_move_and_spectral_norm_is_copied():
    half = {"params": {"k": jnp.zeros(1, jnp.bfloat16)}}
    new = {"params": {"k": jnp.full(1, 1000.0, jnp.bfloat16)}}
    assert jaxnorm.models.ema(half, new, 0.999, batch_stats="copy")["params"]["k"] == 1
    u = {"SpectralNorm_0": {"Dense_0/kernel/u": jnp.zeros(2)}}
    moved = jax.tree.map(lambda v: v + 1, u)
    for extra in ({}, {"norm": jaxnorm.init_stats(2)}):
        trees = [{"params": {}, "batch_stats": tree | extra} for tree in (u, moved)]
        for policy in ("average", "recalibrate"):
            got = jaxnorm.models.ema(trees[0], trees[1], 0.5, batch_stats=policy)[
                "batch_stats"
            ]
            assert (got["SpectralNorm_0"]["Dense_0/kernel/u"] == 1).all()
    stats = {"batch_stats": {"norm": jaxnorm.init_stats(2)}}
    with pytest.raises(ValueError, match=r"only the other has \['norm'\]"):
        jaxnorm.models.ema(
            {"params": {}}, {"params": {}} | stats, 0.5, batch_stats="average"
        )


def test_averages_keep_their_dtypes_and_frozen_layers():
    average = {"params": {"k": jnp.ones(2, jnp.bfloat16)}, "batch_stats": {}}
    new = {"params": {"k": jnp.zeros(2)}, "batch_stats": {}}
    got = jaxnorm.models.ema(average, new, 0.5, batch_stats="average")
    assert got["params"]["k"].dtype == jnp.bfloat16
    stats = jaxnorm.models.freeze({"norm": jaxnorm.init_stats(2)})
    frozen = {"params": {}, "batch_stats": stats}
    got = jaxnorm.models.ema(frozen, frozen, 0.5, batch_stats="average")
    assert jaxnorm.models.frozen(got["batch_stats"]) == jaxnorm.models.frozen(stats)
    with pytest.raises(ValueError, match="batch_stats must be one of.*'mean'"):
        jaxnorm.models.ema(average, new, 0.5, batch_stats="mean")
