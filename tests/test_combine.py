"""Statistics of several models: merged, blended, swapped, reset, split; converted."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from norms import NORMS

import jaxnorm
from jaxnorm import _marks as marks
from jaxnorm import linen as jl
from jaxnorm import nnx as jx


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tree_of(x):
    """The statistics of one layer over all of x."""
    norm = jaxnorm.BatchNorm(momentum=0.0)
    return {"block": {"norm": norm(x, {}, norm.init_stats((x.shape[-1],)))[1]}}


@pytest.mark.parametrize("offset", [0, 1000])
def test_merged_statistics_are_those_of_all_the_data(offset):
    rng = np.random.default_rng(0)
    parts = [
        rng.normal(offset + i, 1 + i, (n, 3)).astype(np.float32)
        for i, n in enumerate((10, 40, 30))
    ]
    trees = [tree_of(x) for x in parts]
    merge = jax.jit(jaxnorm.models.merge)
    got = merge(trees, [len(x) for x in parts])["block"]["norm"]
    whole = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(got["mean"], whole.mean(0), 1e-6)
    np.testing.assert_allclose(got["var"], whole.var(0), 2e-4 if offset else 1e-6)
    alike = jaxnorm.models.merge(trees)["block"]["norm"]
    np.testing.assert_allclose(
        alike["mean"], np.mean([x.mean(0) for x in parts], axis=0), 1e-6
    )


def test_merging_keeps_the_rest_of_the_first():
    first = {"a": jaxnorm.init_stats(2, momentum=None), "b": {"var": jnp.ones(2)}}
    other = jax.tree.map(lambda v: v + 3, first)
    got = jaxnorm.models.merge([first, other])
    np.testing.assert_allclose(got["a"]["mean"], 1.5)
    np.testing.assert_allclose(got["a"]["var"], 2.5 + 1.5**2)
    np.testing.assert_allclose(got["b"]["var"], 2.5)
    same(got["a"]["count"], first["a"]["count"])
    got = jaxnorm.models.merge([first, other], where="b".__eq__)
    same(got["a"], first["a"])


LOST = {"mean": jnp.full(2, jnp.nan), "var": jnp.full(2, jnp.inf)}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_has_no_weight_may_be_lost(wrap):
    kept = {"mean": jnp.array([1.0, -2.0]), "var": jnp.array([3.0, 4.0])}
    merge, blend = wrap(jaxnorm.models.merge), wrap(jaxnorm.models.blend)
    for trees, weights in (([kept, LOST], [2, 0]), ([LOST, kept], [0.0, 1e-3])):
        same(merge(trees, weights), kept)
    same(blend(kept, LOST, 0.0), kept)
    same(blend(LOST, kept, 1.0), kept)
    ema = wrap(functools.partial(jaxnorm.models.ema, batch_stats="average"))
    before = {"params": {"k": LOST["mean"]}, "batch_stats": LOST}
    after = {"params": {"k": kept["mean"]}, "batch_stats": kept}
    same(ema(before, after, 0.0), after)
    same(ema(after, before, 1.0), after)


def test_shares_are_those_of_weights_of_any_size():
    a, b = jaxnorm.init_stats(2), {"mean": jnp.full(2, 4.0), "var": jnp.ones(2)}
    expected = jaxnorm.models.merge([a, b], [3, 1])
    for scale in (1e-60, 1e60):
        same(jaxnorm.models.merge([a, b], [3 * scale, scale]), expected)


def test_merged_complex_statistics():
    a = {"mean": jnp.array([1j]), "var": jnp.array([1.0])}
    b = {"mean": jnp.array([-1j]), "var": jnp.array([1.0])}
    got = jaxnorm.models.merge([a, b])
    np.testing.assert_allclose(got["mean"], 0)
    np.testing.assert_allclose(got["var"], 2)
    assert got["mean"].dtype == jnp.complex64 and got["var"].dtype == jnp.float32


def test_blended_statistics():
    a = {"x": jaxnorm.init_stats(2), "y": jaxnorm.init_stats(2)}
    b = jax.tree.map(lambda v: v + 4, a)
    blend = jax.jit(functools.partial(jaxnorm.models.blend, where="x".__eq__))
    got = blend(a, b, 0.25)
    np.testing.assert_array_equal(got["x"]["mean"], 1)
    np.testing.assert_array_equal(got["x"]["var"], 2)
    same(got["y"], a["y"])
    same(jaxnorm.models.blend(a, b, 1.0), b)
    same(jaxnorm.models.blend(a, b, 0.0), a)


def test_swapped_statistics():
    a = {"x": jaxnorm.init_stats(2), "y": jaxnorm.init_stats(2)}
    b = jax.tree.map(lambda v: v + 4, a)
    got = jaxnorm.models.swap(a, b, where="x".__eq__)
    same(got, {"x": b["x"], "y": a["y"]})


def test_reset_statistics_are_those_at_first():
    norm = jaxnorm.BatchRenorm(rmax=lambda step: 1.0 + step, momentum=None)
    stats = norm.init_stats((3,))
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    _, moved = norm(
        x, {}, jaxnorm.models.accumulate(jaxnorm.models.freeze(stats, update=True))
    )
    _, moved = norm(x, {}, jaxnorm.models.discard(moved))
    assert moved["step"] == 1
    got = jaxnorm.models.reset({"a": moved})["a"]
    assert jaxnorm.models.frozen(got)[""]["use_running_average"]
    same(jaxnorm.models.unfreeze(got), stats)
    with pytest.raises(ValueError, match="'a' keeps.*whitening.*swap"):
        jaxnorm.models.reset({"a": jaxnorm.IterNorm().init_stats((2,))})


def test_trees_must_fit():
    a, b = {"x": jaxnorm.init_stats(2)}, {"y": jaxnorm.init_stats(2)}
    wide = {"x": jaxnorm.init_stats(3)}
    calls = [
        lambda a, b: jaxnorm.models.merge([a, b]),
        lambda a, b: jaxnorm.models.blend(a, b, 0.5),
        jaxnorm.models.swap,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"only the first has \['x'\].*\['y'\]"):
            call(a, b)
        with pytest.raises(ValueError, match=r"'x' must be of the same shapes"):
            call(a, wide)
    whitened = {"w": jaxnorm.IterNorm().init_stats((2,))}
    with pytest.raises(ValueError, match="'w' keeps.*no variance.*where"):
        jaxnorm.models.merge([whitened, whitened])
    with pytest.raises(ValueError, match="1 trees and 2 weights"):
        jaxnorm.models.merge([a], [1, 2])
    with pytest.raises(ValueError, match="0 trees"):
        jaxnorm.models.merge([])


class Net(nn.Module):
    norm: jaxnorm.Norm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(jl.Norm(self.norm)(nn.Dense(8)(x), not train))
        return jl.Norm(self.norm, name="last")(nn.Dense(8)(x), not train)


X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def trained(norm):
    """Variables of a Net after a step, and its output by running statistics."""
    net = Net(norm)
    variables = net.init(jax.random.key(0), X)
    params = jax.tree.map(lambda v: v + 0.1, variables["params"])
    new = net.apply({**variables, "params": params}, X, mutable=["batch_stats"])[1]
    return {"params": params, **new}


def test_norms_split_and_join():
    variables = trained(jaxnorm.BatchNorm())
    norms, others = jaxnorm.models.split(variables)
    assert {*norms["params"]} == {*norms["batch_stats"]} == {"Norm_0", "last"}
    assert {*others["params"]} == {"Dense_0", "Dense_1"} and not others["batch_stats"]
    same(jaxnorm.models.join(norms, others), variables)
    norms, others = jaxnorm.models.split(variables, "last".__eq__)
    assert {*norms["params"]} == {"last"} == {*norms["batch_stats"]}
    same(jaxnorm.models.join(others, norms), variables)
    nested = {"params": {"a": {"b": variables["params"]}}, "other": {}}
    norms, others = jaxnorm.models.split(nested)
    assert {*norms["params"]["a"]["b"]} == {"Norm_0", "last"} and norms["other"] == {}
    assert jaxnorm.models.join(norms, others).keys() == nested.keys()
    with pytest.raises(ValueError, match="both trees hold 'params/Dense_0/bias'"):
        jaxnorm.models.join(variables, variables | {"batch_stats": {}})
    with pytest.raises(ValueError, match=r"none of the norms.*\['Norm_0', 'last'\]"):
        jaxnorm.models.split(variables, lambda path: False)


# ---- Conversion -------------------------------------------------------------------

SAME = {
    "ghost": jaxnorm.GhostBatchNorm(size=4),
    "renorm": jaxnorm.BatchRenorm(),
    "synchronized": jaxnorm.BatchNorm(axis_name="data"),
    "unbiased": jaxnorm.BatchNorm(unbiased=True, momentum=0.5),
}


def evaluated(norm, variables) -> Any:
    return Net(norm).apply(variables, X, train=False)


@pytest.mark.parametrize("name", SAME)
def test_batch_norms_become_each_other_and_back(name):
    variables = trained(jaxnorm.BatchNorm())
    new = jaxnorm.models.convert(variables, SAME[name])
    same(new, variables)
    np.testing.assert_allclose(
        evaluated(SAME[name], new), evaluated(jaxnorm.BatchNorm(), variables), 1e-6
    )
    same(jaxnorm.models.convert(new, jaxnorm.BatchNorm()), variables)


@pytest.mark.parametrize(
    "norm",
    [
        jaxnorm.GroupNorm(num_groups=2),
        jaxnorm.BatchNorm(momentum=None),
        jaxnorm.PowerNorm(),
        jaxnorm.SwitchableNorm(),
        jaxnorm.LayerNorm(),
        jaxnorm.BatchRenorm(rmax=lambda step: 1.0 + step),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_the_variables_are_those_of_a_model_with_the_new_norm(norm):
    variables = trained(jaxnorm.BatchNorm())
    images = X.reshape(8, 1, 4)
    fresh = jax.eval_shape(lambda: Net(norm).init(jax.random.key(0), images))
    new = jaxnorm.models.convert(variables, norm)
    expected = {"batch_stats": {}} | fresh
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), (new, expected))
    assert shapes[0] == shapes[1]
    same(new["params"]["last"]["scale"], variables["params"]["last"]["scale"])
    back = jaxnorm.models.convert(new, jaxnorm.BatchNorm())
    same(back["params"], variables["params"])
    for k, v in back["batch_stats"]["last"].items():
        old = variables["batch_stats"]["last"][k]
        start = jaxnorm.init_stats(8)[k]
        same(v, old if k in new["batch_stats"].get("last", {}) else start)


def test_every_domain_starts_with_a_copy():
    variables = trained(jaxnorm.BatchNorm())
    norm = jaxnorm.DomainBatchNorm(num_domains=3, share_affine=False)
    new = jaxnorm.models.convert(variables, norm)
    old_params, old_stats = (variables[k]["last"] for k in ("params", "batch_stats"))
    params, stats = norm.from_single(old_params, old_stats)
    same((new["params"]["last"], new["batch_stats"]["last"]), (params, stats))
    with pytest.raises(ValueError, match="mean of the norm at '(Norm_0|last)'.*(3, 8)"):
        norm = jaxnorm.DomainBatchNorm(num_domains=3)
        jaxnorm.models.convert(
            jaxnorm.models.convert(variables, norm), jaxnorm.BatchNorm()
        )


def test_some_norms_without_scale_or_bias():
    variables = jaxnorm.models.freeze(trained(jaxnorm.BatchNorm())["batch_stats"])
    variables = {**trained(jaxnorm.BatchNorm()), "batch_stats": variables}
    new = jaxnorm.models.convert(
        variables, jaxnorm.BatchRenorm(), "last".__eq__, use_bias=False
    )
    same(new["params"]["Norm_0"], variables["params"]["Norm_0"])
    assert {*new["params"]["last"]} == {"scale"}
    assert jaxnorm.models.frozen(new["batch_stats"]) == jaxnorm.models.frozen(
        variables["batch_stats"]
    )
    bare = jaxnorm.models.convert(
        new, jaxnorm.BatchNorm(), "last".__eq__, use_bias=False, use_scale=False
    )
    assert "last" not in bare["params"]
    again = jaxnorm.models.convert(bare, jaxnorm.BatchNorm(), "last".__eq__)
    np.testing.assert_array_equal(again["params"]["last"]["scale"], np.ones(8))


def test_what_is_no_norm_stays():
    norm = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    own = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    variables = {
        "params": {"t": {"dense": {"kernel": jnp.ones(3)}, "bn": norm}, "head": norm},
        "batch_stats": {"t": own | {"bn": jaxnorm.init_stats(8)}},
    }
    variables["params"]["head"] = {"bias": jnp.zeros(4)}
    assert list(jaxnorm.models.layers(variables["batch_stats"])) == ["t/bn"]
    same(jaxnorm.models.convert(variables, jaxnorm.GhostBatchNorm(size=2)), variables)
    norms, others = jaxnorm.models.split(variables)
    assert {*norms["params"]} == {"t"} and {*others["params"]} == {"t", "head"}
    flat = {"params": {"t": {"kernel": {"w": jnp.ones(3)}}}, "batch_stats": {"t": own}}
    new = jaxnorm.models.convert(flat, jaxnorm.BatchNorm())
    assert {*new["params"]["t"]} == {"kernel", "scale", "bias"}


def test_a_norm_alone_splits_into_itself():
    alone = {"params": {"scale": jnp.ones(2)}, "batch_stats": jaxnorm.init_stats(2)}
    norms, others = jaxnorm.models.split(alone)
    same(norms, alone)
    assert others == {"params": {}, "batch_stats": {}}


def test_marks_are_as_large_as_the_new_statistics():
    variables = {"batch_stats": jaxnorm.models.freeze({"n": jaxnorm.init_stats(8)})}
    new = jaxnorm.models.convert(variables, jaxnorm.DomainBatchNorm(num_domains=3))
    assert {v.shape for v in new["batch_stats"]["n"].values()} == {(3, 8)}


def buffers(*trees):
    """Where the arrays are in memory."""
    return [v.unsafe_buffer_pointer() for v in jax.tree.leaves(trees)]


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_is_converted_into_buffers_of_its_own(name):
    norm = NORMS[name].norm
    ones = jnp.ones(8)
    stats = jaxnorm.models.freeze({"n": {"mean": ones, "var": ones}})
    params = {"n": {"scale": ones, "bias": ones}, "dense": {"kernel": ones}}
    variables = {"params": params, "batch_stats": stats}
    try:
        new = jaxnorm.models.convert(variables, norm)
    except ValueError as error:
        scale = norm.init_params((8,)).get("scale", ones)
        centered = getattr(norm, "zero_centered_scale", False)
        assert centered or (scale.ndim == 0 and "'n'" in str(error))
        return
    own = buffers(new)
    assert len({*own}) == len(own) and not {*own} & {*buffers(variables)}
    expected = {"params": norm.init_params((8,)), "batch_stats": norm.init_stats((8,))}
    if expected["batch_stats"]:
        expected["batch_stats"] |= marks.marks(expected["batch_stats"], *marks.SWITCHES)
    for tree, node in expected.items():
        held = new[tree].get("n", {})
        assert {k: v.shape for k, v in held.items()} == {
            k: v.shape for k, v in node.items()
        }


def test_boxes_stay_around_what_they_held():
    ones = nn.Partitioned(jnp.ones(8), ("model",))
    variables = {
        "params": {"n": {"scale": ones}, "d": {"kernel": ones}},
        "batch_stats": {"n": jaxnorm.init_stats(8)},
    }
    new = jaxnorm.models.convert(variables, jaxnorm.GroupNorm())["params"]
    assert new["n"]["scale"].names == new["d"]["kernel"].names == ("model",)
    norm = jaxnorm.DomainBatchNorm(num_domains=3, share_affine=False)
    new = jaxnorm.models.convert(variables, norm)["params"]["n"]
    assert new["scale"].names == (None, "model") and new["scale"].value.shape == (3, 8)
    assert new["bias"].shape == (3, 8)


def test_conversions_that_cannot_be():
    variables = trained(jaxnorm.BatchNorm())
    convert: Any = jaxnorm.models.convert
    for norm, words in (
        (jaxnorm.GroupNorm, r"settings value, .* GroupNorm: call it, GroupNorm\(\)"),
        ("GroupNorm", "settings value such as .*'GroupNorm'"),
        (jaxnorm.group_norm, "settings value such as .*function"),
        (None, "settings value such as .*None"),
    ):
        with pytest.raises(TypeError, match=f"norm must be a {words}"):
            convert(variables, norm)
        with pytest.raises(TypeError, match=f"norm must be a {words}"):
            convert_model(nnx_model(nnx.BatchNorm), norm)
    norm = jaxnorm.BatchRenorm()
    with pytest.raises(TypeError, match="jaxnorm.nnx.variables"):
        convert(nnx_model(nnx.BatchNorm), norm)
    with pytest.raises(TypeError, match="variables must be nested mappings.*'trained'"):
        convert("trained", norm)
    with pytest.raises(TypeError, match="use_bias must be True or False, got None"):
        convert(variables, norm, use_bias=None)
    with pytest.raises(TypeError, match="scale of the norm at 'n' must be .*None"):
        convert({"params": {"n": {"scale": None, "bias": jnp.ones(2)}}}, norm)
    with pytest.raises(ValueError, match="'l/0' is within a list"):
        convert({"params": {"l": [{"scale": jnp.ones(2)}]}}, norm)
    gathering = jaxnorm.models.accumulate(variables["batch_stats"])
    with pytest.raises(ValueError, match="'(Norm_0|last)' gathers batches.*commit"):
        convert({**variables, "batch_stats": gathering}, norm)
    ones = {"params": {"n": {"scale": jnp.ones(1)}}}
    ones["batch_stats"] = {"n": jaxnorm.init_stats(8)}
    with pytest.raises(ValueError, match=r"mean of the norm at 'n' has shape \(8,\)"):
        convert(ones, norm)
    with pytest.raises(ValueError, match=r"none of the norms.*'Norm_0', 'last'"):
        jaxnorm.models.convert(variables, jaxnorm.GroupNorm(), lambda path: False)
    with pytest.raises(ValueError, match="subtract 1"):
        jaxnorm.models.convert(variables, jaxnorm.LayerNorm(zero_centered_scale=True))
    tanh = {"params": {"tanh": {"alpha": jnp.ones(())}}}
    with pytest.raises(ValueError, match="'tanh' has none of scale.*\\['alpha'\\]"):
        jaxnorm.models.convert(tanh, jaxnorm.BatchNorm())


convert_model: Any = jx.convert


def nnx_model(norm):
    rngs = nnx.Rngs(0)
    shared = norm(8, rngs=rngs)
    model: Any = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs),
        shared,
        nnx.Dict(inner=nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), norm(8, rngs=rngs))),
    )
    model.again = shared
    return model


def forward(model, x):
    linear, norm, block = model.layers
    return block["inner"](model.again(norm(linear(x))))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jx.BatchNorm])
def test_nnx_modules_are_replaced_wherever_they_are(norm):
    model = nnx_model(norm)
    forward(model, X)
    model.eval()
    before = forward(model, X)
    given, model = model, jx.convert(model, jaxnorm.BatchRenorm())
    assert type(given.again) is norm and given.again is given.layers[1]
    names = [type(m) for _, m in nnx.iter_modules(model)]
    assert names.count(jx.Norm) == 2 and norm not in names
    assert model.again is model.layers[1]
    np.testing.assert_allclose(forward(model, X), before, 1e-5, 1e-6)
    model.train()
    forward(model, X)
    model = jx.convert(model, jaxnorm.GroupNorm(num_groups=2), "again".__ne__)
    inner = model.layers[2]["inner"].layers[1]
    assert isinstance(inner.norm, jaxnorm.GroupNorm) and not hasattr(inner, "mean")
    assert isinstance(model.again.norm, jaxnorm.BatchRenorm)
    forward(model, X)


class Holds(nnx.Module):
    def __init__(self, held):
        self.held = nnx.data(held)
        self.again = held[0] if isinstance(held, tuple) else nnx.data(None)


class Named(NamedTuple):
    norm: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    norm: Any


CONTAINERS = {
    "tuple": lambda norm: (norm,),
    "list": lambda norm: [norm],
    "dict": lambda norm: {3: norm},
    "deep": lambda norm: [({"a": norm},)],
    "named tuple": Named,
    "dataclass": Registered,
    "nnx.List": lambda norm: nnx.List([norm]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_nnx_norms_in_containers_are_replaced(kind):
    norm = jx.BatchNorm(8, rngs=nnx.Rngs(0))
    held = CONTAINERS[kind](norm)
    model: Any = jx.convert(Holds(held), jaxnorm.GroupNorm(num_groups=2))
    kinds = [type(m) for _, m in nnx.iter_modules(model)]
    assert jx.Norm in kinds and jx.BatchNorm not in kinds
    assert type(model.held) is type(held)
    if isinstance(held, tuple):
        assert model.again is model.held[0]


class Own(jx.GroupNorm):
    def __call__(self, x, *args, **kwargs):
        return -super().__call__(x, *args, **kwargs)


def test_what_an_nnx_norm_does_stays_or_is_named():
    rngs = nnx.Rngs(0)
    held = {"eager_sharding": False, "out_sharding": ("model",), "rate": 2}
    model: Any = nnx.Sequential(
        nnx.relu,
        jx.BatchNorm(8, activation="relu", scale_metadata=held, rngs=rngs),
        nnx.LayerNorm(8, use_scale=False, use_bias=False, rngs=rngs),
    )
    new = jx.convert(model, jaxnorm.GroupNorm(num_groups=2))
    assert [new.layers[i].norm.activation for i in (1, 2)] == ["relu", None]
    assert new.layers[2].scale.shape == (8,)  # of which the norm had none
    metadata = new.layers[1].scale.get_metadata()
    assert metadata == model.layers[1].scale.get_metadata() and metadata["rate"] == 2
    tables = jaxnorm.DomainBatchNorm(num_domains=3, share_affine=False)
    with pytest.raises(ValueError, match="'layers/1' applies activation='relu', and"):
        jx.convert(model, tables)
    model.layers[1].activation = None
    scale = jx.convert(model, tables).layers[1].scale
    assert scale.shape == (3, 8) and scale.out_sharding == (None, "model")
    assert jx.convert(model, jaxnorm.GroupNorm(num_groups=2, activation="silu"))
    model.layers[2] = Own(8, num_groups=2, rngs=rngs)
    with pytest.raises(ValueError, match="'layers/2' is .*Own, which computes some"):
        jx.convert(model, jaxnorm.LayerNorm())
    model.layers[2] = jx.Norm(jaxnorm.PositionalNorm(), 8)
    with pytest.raises(ValueError, match="'layers/2' has none of scale, bias"):
        jx.convert(model, jaxnorm.LayerNorm())
    assert isinstance(model.layers[1], jx.BatchNorm)
    with pytest.raises(TypeError, match="model must be a flax.nnx.Module, got.*dict"):
        convert_model(jx.variables(model), jaxnorm.LayerNorm())


def test_variables_that_nnx_norms_share_stay_shared():
    rngs = nnx.Rngs(0)
    model: Any = nnx.Sequential(*(nnx.BatchNorm(8, rngs=rngs) for _ in range(2)))
    model.layers[1].scale = model.layers[0].scale
    first, second = jx.convert(model, jaxnorm.BatchRenorm()).layers
    assert first.scale is second.scale and first.bias is not second.bias


def test_an_nnx_update_that_cannot_be_leaves_the_model():
    model: Any = jx.BatchNorm(2, rngs=nnx.Rngs(0))
    before = jx.variables(model)
    stats = {"mean": jnp.ones(2), "var": jnp.ones(2)}
    for wrong in (None, "var", jnp.ones(2) * 1j):
        with pytest.raises(TypeError, match="batch_stats at 'var'|must hold arrays"):
            jx.update(model, {"batch_stats": {**stats, "var": wrong}})
        same(jx.variables(model), before)
    with pytest.raises(TypeError, match="jaxnorm.nnx.variables"):
        jx.update(model, model)


def test_an_nnx_norm_by_itself_and_errors():
    norm = jx.BatchNorm(
        3, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0)
    )
    jx.update(
        norm, {"batch_stats": jaxnorm.models.freeze(jx.variables(norm)["batch_stats"])}
    )
    new = jx.convert(norm, jaxnorm.GhostBatchNorm(size=2))
    assert isinstance(new, jx.Norm) and new.dtype == jnp.bfloat16
    assert new.use_running_average and hasattr(new, "held")
    model = nnx_model(jx.BatchNorm)
    model.layers[1].mean = nnx.BatchStat(jnp.zeros(5))
    before = nnx.state(model)
    with pytest.raises(ValueError, match="mean of the norm at 'again'"):
        jx.convert(model, jaxnorm.BatchRenorm())
    same(nnx.state(model), before)
    with pytest.raises(ValueError, match="none of the norms.*'again'"):
        jx.convert(model, jaxnorm.BatchRenorm(), lambda path: False)
