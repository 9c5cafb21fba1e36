"""What a layer's statistics say about their use, in every method and both Flax APIs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from norms import NORMS, STATEFUL, moved, problem

import jaxnorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx
from jaxnorm.models._paths import PARAM_NAMES, norm_params

WAYS: dict[str, Any] = {
    "frozen": {"use_running_average": True, "update": False},
    "held": {"use_running_average": False, "update": False},
    "running": {"use_running_average": True, "update": True},
}


@functools.partial(jax.jit, static_argnums=(0, 5))
def called(name, x, params, stats, mask, flag=False):
    row = STATEFUL[name]
    inputs = row.inputs(x)
    return row.norm(x, params, stats, mask=mask, use_running_average=flag, **inputs)


@functools.partial(jax.jit, static_argnums=0)
def called_traced(name, x, params, stats, mask, flag):
    row = STATEFUL[name]
    inputs = row.inputs(x)
    return row.norm(x, params, stats, mask=mask, use_running_average=flag, **inputs)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), a, b)


@pytest.mark.parametrize("name", STATEFUL)
def test_every_switch_in_every_method(name):
    p = problem(STATEFUL[name])
    stats = moved(STATEFUL[name])
    trained, new = called(name, p.x, p.params, stats, p.mask)
    evaluated, _ = called(name, p.x, p.params, stats, p.mask, True)
    if name != "power":  # which normalizes by the past in training, too
        assert abs(trained - evaluated).max() > 1e-3
    for way, switches in WAYS.items():
        marked = jaxnorm.models.freeze(stats, **switches)
        got, after = called(name, p.x, p.params, marked, p.mask)
        close(got, trained if way == "held" else evaluated)
        marks = {k: v for k, v in after.items() if k not in stats}
        assert {*marks} == {*marked} - {*stats}
        close(jaxnorm.models.unfreeze(after), new if way == "running" else stats)
        if way != "running":
            same(jaxnorm.models.unfreeze(after), stats)
        same(called(name, p.x, p.params, marked, p.mask, True), (evaluated, marked))


@pytest.mark.parametrize("name", ["batch", "renorm", "power", "online"])
@pytest.mark.parametrize("way", WAYS)
def test_a_traced_flag_agrees_with_the_marks(name, way):
    p = problem(STATEFUL[name])
    marked = jaxnorm.models.freeze(moved(STATEFUL[name]), **WAYS[way])
    for flag in (False, True):
        args = name, p.x, p.params, marked, p.mask
        close(called_traced(*args, flag), called(*args, flag))


def test_held_statistics_of_the_backward_pass_stay_too():
    norm, p = jaxnorm.PowerNorm(), problem(STATEFUL["power"])

    def loss(params, stats):
        return (norm(p.x, params, stats)[0] * p.cotangent).sum()

    stats = moved(STATEFUL["power"])
    grads = jax.jit(jax.grad(loss))
    assert abs(grads(p.params, stats)["control"]).max() > 0
    held = grads(p.params, jaxnorm.models.freeze(stats, use_running_average=False))
    assert not held["control"].any() and abs(held["scale"]).max() > 0


def test_a_frozen_layer_takes_a_single_example():
    x, stats = jnp.ones((1, 3)), jaxnorm.init_stats(3)
    norm = jaxnorm.BatchNorm()
    with pytest.raises(ValueError, match="one single value"):
        norm(x, {}, stats)
    y, _ = norm(x, {}, jaxnorm.models.freeze(stats))
    np.testing.assert_allclose(y, x, rtol=1e-5)
    with pytest.raises(ValueError, match="one single value"):
        norm(x, {}, jaxnorm.models.freeze(stats, use_running_average=False))


def test_a_new_freeze_takes_the_place_of_the_old():
    stats = jaxnorm.models.freeze(jaxnorm.init_stats(3))
    stats = jaxnorm.models.freeze(stats, use_running_average=False)
    assert jaxnorm.models.frozen(stats) == {"": WAYS["held"]}
    stats = jaxnorm.models.freeze(stats, use_running_average=False, update=True)
    assert sorted(stats) == ["mean", "var"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(5)(x)
        x = nn.relu(jl.BatchNorm(use_running_average=not train)(x))
        x = nn.Dense(4)(x)
        x = jl.Norm(jaxnorm.BatchNorm(momentum=0.9))(x, not train)
        return jl.LayerNorm()(x)


FIRST = "BatchNorm_0"


@pytest.fixture
def trained():
    """Variables of a Net, and its optimizer's step."""
    x = np.random.default_rng(0).normal(3, 2, (16, 5)).astype(np.float32)
    net = Net()
    variables = jax.jit(net.init)(jax.random.key(0), x)

    @functools.partial(jax.jit, static_argnums=2)
    def step(variables, opt_state, optimizer):
        def loss(params):
            y, new = net.apply(variables | {"params": params}, x, mutable=True)
            return (y[:, 0] ** 2).sum() + y[:, 1].sum(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": new["batch_stats"]}, opt_state

    return variables, step


def test_frozen_layers_stay_bit_for_bit(trained):
    variables, step = trained
    variables, _ = step(
        variables, optax.sgd(0.1).init(variables["params"]), optax.sgd(0.1)
    )
    first = FIRST.__eq__
    before = variables["batch_stats"]
    variables = variables | {"batch_stats": jaxnorm.models.freeze(before, first)}
    optimizer = optax.multi_transform(
        {"frozen": optax.set_to_zero(), "trainable": optax.sgd(0.1)},
        lambda params: jaxnorm.models.frozen_labels(params, first),
    )
    state, now = optimizer.init(variables["params"]), variables
    for _ in range(4):
        now, state = step(now, state, optimizer)
    same(now["params"][FIRST], variables["params"][FIRST])
    same(now["batch_stats"][FIRST], variables["batch_stats"][FIRST])
    for kind, name in [("params", "Dense_0"), ("batch_stats", "Norm_0")]:
        pairs = zip(
            *map(jax.tree.leaves, (now[kind][name], variables[kind][name])), strict=True
        )
        assert all((a != b).any() for a, b in pairs)
    thawed = jaxnorm.models.unfreeze(now["batch_stats"], first)
    assert thawed[FIRST].keys() == before[FIRST].keys()


def test_frozen_linen_models_need_no_mutable_statistics(trained):
    variables, _ = trained
    x = np.random.default_rng(1).normal(size=(8, 5)).astype(np.float32)
    for way in ("frozen", "held"):
        stats = jaxnorm.models.freeze(variables["batch_stats"], **WAYS[way])
        y: Any = Net().apply(variables | {"batch_stats": stats}, x)
        evaluated: Any = Net().apply(variables, x, train=False)
        assert np.array_equal(y, evaluated) == (way == "frozen")
    with pytest.raises(Exception, match="immutable"):
        Net().apply(variables, x)


def test_nothing_thaws_an_nnx_model():
    rngs = nnx.Rngs(0)
    model: Any = nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs),
        jx.BatchNorm(4, rngs=rngs),
        jx.Norm(jaxnorm.BatchNorm(), 4),
    )
    x = np.random.default_rng(0).normal(3, 2, (16, 3)).astype(np.float32)
    stats = jx.variables(model)["batch_stats"]
    jx.update(model, {"batch_stats": jaxnorm.models.freeze(stats, "layers/1".__eq__)})
    model.train()

    @nnx.jit
    def step(model):
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        return nnx.state(grads)

    grads = step(model)
    step(model)
    after = jx.variables(model)["batch_stats"]
    same(jaxnorm.models.unfreeze(after)["layers"][1], stats["layers"][1])
    assert (after["layers"][2]["mean"] != stats["layers"][2]["mean"]).all()
    assert abs(jax.tree.leaves(grads)[0]).max() > 0
    # Nothing is written, so that it can be a constant of a traced function.
    jx.update(model, {"batch_stats": jaxnorm.models.freeze(after)})
    assert jax.grad(lambda x: (model(x) ** 2).sum())(x).any()
    jx.update(model, {"batch_stats": after})
    # As in evaluation, in which the layer is one and the same function.
    y = model.layers[1](x @ np.ones((3, 4), np.float32))
    model.eval()
    same(y, model.layers[1](x @ np.ones((3, 4), np.float32)))
    model.train()
    jx.update(model, {"batch_stats": jaxnorm.models.unfreeze(after)})
    assert not hasattr(model.layers[1], "held")
    step(model)
    assert (model.layers[1].mean[...] != stats["layers"][1]["mean"]).all()


def test_an_nnx_model_is_written_whole_or_not_at_all():
    model: Any = nnx.Sequential(jx.BatchNorm(4, rngs=nnx.Rngs(0)))
    before = jx.variables(model)
    layer = before["batch_stats"]["layers"][0]
    mean = np.ones(4, np.float32)
    bad = [
        ({"mean": mean, "var": np.ones(3)}, r"'layers/0/var' are of shape \(3,\)"),
        ({"mean": mean}, "lacks 'layers/0/var'"),
        ({"mean": mean, "var": mean, "other": mean}, "no batch_stats at 'layers/0/oth"),
    ]
    for stats, match in bad:
        with pytest.raises(ValueError, match=match):
            jx.update(model, {"batch_stats": {"layers": {0: stats}}})
    wrong = {"batch_mean": np.ones(3), **jaxnorm.models.freeze(layer)}
    with pytest.raises(ValueError, match=r"'layers/0/batch_mean' are of shape \(3,\)"):
        jx.update(model, {"batch_stats": {"layers": {0: wrong}}})
    with pytest.raises(ValueError, match="got 'others'"):
        jx.update(model, {"others": {}})
    same(jx.variables(model), before)
    # Checkpoints have strings for numbers.
    jx.update(model, {"batch_stats": {"layers": {"0": layer | {"mean": mean}}}})
    same(model.layers[0].mean[...], mean)


def test_flax_s_own_norms_do_not_seem_frozen():
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    stats = jaxnorm.models.freeze(jx.variables(model)["batch_stats"])
    with pytest.raises(ValueError, match=r"'layers/0' is flax.*BatchNorm.*nnx.convert"):
        jx.update(model, {"batch_stats": stats})
    assert not hasattr(model.layers[0], "held")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(3)(x)
        return jl.BatchNorm(use_running_average=False, momentum=0.9)(x), None


def test_layers_in_a_scan_are_layers_like_any():
    axes: Any = {"params": 0, "batch_stats": 0}
    stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    x = np.random.default_rng(0).normal(3, 2, (16, 3)).astype(np.float32)
    variables = stack.init(jax.random.key(0), x, None)

    @jax.jit
    def train(stats, x=x):
        new = stack.apply({**variables, "batch_stats": stats}, x, None, mutable=True)
        return new[1]["batch_stats"]

    stats = variables["batch_stats"]
    same(train(jaxnorm.models.freeze(stats)), jaxnorm.models.freeze(stats))
    once = train(stats)["BatchNorm_0"]
    assert once["mean"].shape == (2, 3)
    gathered = jaxnorm.models.commit(
        train(jaxnorm.models.accumulate(stats)), momentum=0.9
    )
    close(gathered["BatchNorm_0"], once)
    whole = jaxnorm.models.recalibrate(
        lambda variables, x: train(variables["batch_stats"], x), variables, [x]
    )
    close(0.1 * whole["BatchNorm_0"]["mean"], once["mean"])


def test_labels_and_masks_know_the_norms(trained):
    params = trained[0]["params"]
    assert {*norm_params(params)} == {"BatchNorm_0", "Norm_0", "LayerNorm_0"}
    mask = jaxnorm.models.decay_mask(params)
    labels = jaxnorm.models.frozen_labels(params, lambda path: path != "Norm_0")
    for name, layer in params.items():
        for k in layer:
            assert mask[name][k] == name.startswith("Dense")
            frozen = name in ("BatchNorm_0", "LayerNorm_0")
            assert labels[name][k] == ("frozen" if frozen else "trainable")


@pytest.mark.parametrize("name", NORMS)
def test_the_parameters_of_every_method_are_known(name):
    params = problem(NORMS[name]).params
    tree = {"block": {"norm": params, "dense": {"kernel": 0.0, "bias": 0.0}}}
    expected = {"block/norm"} if params else set()
    assert {*norm_params(tree)} == expected


def test_the_names_are_those_of_the_methods():
    kinds = [v for v in vars(jaxnorm).values() if isinstance(v, type)]
    methods = [v for v in kinds if issubclass(v, jaxnorm.Norm)]
    assert PARAM_NAMES == {name for v in methods for name in v.param_names}


def test_a_norm_of_ones_own_changes_no_other_layer(trained):
    params = trained[0]["params"]
    mask, labels = jaxnorm.models.decay_mask(params), {*norm_params(params)}

    class Kernelled(jaxnorm.LayerNorm):
        param_names = ("kernel", "scale", "bias")

    assert jaxnorm.models.decay_mask(params) == mask
    assert {*norm_params(params)} == labels
    tree = {"Norm_0": Kernelled().init_params((2,)), "Dense_0": {"kernel": 0.0}}
    assert {*norm_params(tree)} <= {"Norm_0"}
    assert jaxnorm.models.decay_mask(tree)["Dense_0"] == {"kernel": True}


def test_nothing_chosen_is_an_error(trained):
    variables, _ = trained
    for call in (jaxnorm.models.freeze, jaxnorm.models.unfreeze):
        with pytest.raises(ValueError, match="none of the layers.*BatchNorm_0.*Norm_0"):
            call(variables["batch_stats"], lambda path: "none" in path)
    with pytest.raises(ValueError, match="none of the norms.*LayerNorm_0"):
        jaxnorm.models.frozen_labels(variables["params"], lambda path: False)
