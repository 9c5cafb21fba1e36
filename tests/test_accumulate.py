"""Several batches, one update: that of one batch of all their examples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from norms import STATEFUL, changed, moved, problem

import jaxnorm
from jaxnorm import RunningNorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx

GATHERING: dict[str, Any] = {
    name: row for name, row in STATEFUL.items() if isinstance(row.norm, RunningNorm)
}
AVERAGED = {k: v for k, v in GATHERING.items() if not v.norm.keeps_moments}
# Those of a history depend on how it is split.
HISTORY = {k for k, v in GATHERING.items() if "past_mean" in problem(v).stats}
POOLABLE = {k: v for k, v in GATHERING.items() if k not in {*AVERAGED, *HISTORY}}
SIZES = 2, 4, 2  # of the micro-batches


def parts(x):
    return np.split(x, np.cumsum(SIZES)[:-1])


def assert_same(actual, desired, rtol=2e-6):
    assert {*actual} == {*desired}
    for k in desired:
        np.testing.assert_allclose(actual[k], desired[k], rtol, rtol, err_msg=k)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", [n for n in POOLABLE if "domain" not in n])
def test_micro_batches_make_the_update_of_the_whole(name, unbiased):
    row = POOLABLE[name]
    p = problem(row, offset=100)
    momentum = None if unbiased and row.norm.counts_batches else 0.9
    norm = changed(row.norm, momentum=momentum, unbiased=unbiased)
    start = moved(row._replace(norm=norm))

    @jax.jit
    def train(x, stats, mask):
        inputs = row.inputs(x)
        return norm(x, p.params, stats, mask=mask, **inputs)

    _, whole = train(p.x, start, p.mask)
    stats = jaxnorm.models.accumulate(start)
    for x, mask in zip(parts(p.x), parts(p.mask), strict=True):
        y, stats = train(x, stats, mask)
        np.testing.assert_allclose(y, train(x, start, mask)[0], 1e-5, 1e-5)
        for k, v in start.items():
            np.testing.assert_array_equal(stats[k], v)
    got = jaxnorm.models.commit(stats, momentum=momentum, unbiased=unbiased)
    assert_same(got, whole)
    for k, v in start.items():
        np.testing.assert_array_equal(jaxnorm.models.discard(stats)[k], v)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", sorted(AVERAGED))
def test_averages_weigh_batches_by_their_elements(name, unbiased):
    """And lack how far the means of the batches are apart."""
    row = AVERAGED[name]
    instances = isinstance(row.norm, jaxnorm.RunningInstanceNorm)
    norm = changed(row.norm, momentum=0.0, unbiased=unbiased and instances)
    p = problem(row._replace(norm=norm), offset=100)
    shift = 10 * np.arange(len(p.x)).reshape(-1, *[1] * (p.x.ndim - 1))
    x, mask = p.x + shift.astype(np.float32), np.array(p.mask)
    mask = np.broadcast_to(mask, x.shape).copy()
    mask[-1] = False
    start = jax.tree.map(jnp.zeros_like, norm.init_stats(p.stats["var"].shape))

    @jax.jit
    def train(x, stats, mask):
        return norm(x, p.params, stats, mask=mask)[1]

    stats, alone = jaxnorm.models.accumulate(start), []
    for x_part, mask_part in zip(parts(x), parts(mask), strict=True):
        stats = train(x_part, stats, mask_part)
        alone.append(train(x_part, start, mask_part))
    got = jaxnorm.models.commit(stats, momentum=0.0)
    reduced = norm.axes(x.shape).reduce
    sizes = np.stack([part.sum(reduced) for part in parts(mask)])
    for k in ("mean", "var"):
        each = np.stack([np.asarray(v[k], np.float64) for v in alone])
        np.testing.assert_allclose(got[k], (each * sizes).sum(0) / sizes.sum(0), 2e-6)
    if instances and not unbiased:  # which weighs variances by n - 1
        assert_same(got, train(x, start, mask), 5e-6)


@pytest.mark.parametrize("sizes", [(8,), (2, 4, 2)])
def test_instances_are_recalibrated_however_they_are_split(sizes):
    norm = jaxnorm.RunningInstanceNorm(momentum=0.0, unbiased=True)
    x = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
    x += 10 * np.arange(8, dtype=np.float32)[:, None, None]

    def apply(variables, batch):
        return {"norm": norm(batch, {}, variables["batch_stats"]["norm"])[1]}

    tree = {"batch_stats": {"norm": norm.init_stats((3,))}}
    batches = np.split(x, np.cumsum(sizes)[:-1])
    got = jaxnorm.models.recalibrate(apply, tree, batches)["norm"]
    exact = x.astype(np.float64)
    np.testing.assert_allclose(got["mean"], exact.mean((0, 1)), 1e-6)
    np.testing.assert_allclose(got["var"], exact.var(1, ddof=1).mean(0), 1e-6)


def test_a_history_is_recalibrated_by_each_batch_itself():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3)).astype(np.float32)
    norm = jaxnorm.CrossIterationBatchNorm(kernel_shape=kernel.shape, momentum=0.5)
    data = rng.normal(2, 3, (20, 4)).astype(np.float32)

    def apply(variables, batch):
        stats = variables["batch_stats"]["norm"]
        call = {"kernel": kernel, "layer": lambda kernel: batch @ kernel}
        return {"norm": norm(batch @ kernel, {}, stats, **call)[1]}

    start = {"batch_stats": {"norm": norm.init_stats((3,))}}
    past = apply(start, 5 + data[:4])
    got = jaxnorm.models.recalibrate(
        apply, {"batch_stats": past}, [data[:4], data[4:]]
    )["norm"]
    exact = data.astype(np.float64) @ kernel.astype(np.float64)
    np.testing.assert_allclose(got["mean"], exact.mean(0), 1e-5)
    np.testing.assert_allclose(got["var"], exact.var(0), 1e-5)
    for k in {*past["norm"]} - {"mean", "var"}:
        np.testing.assert_array_equal(got[k], past["norm"][k])


def test_domains_are_gathered_one_by_one():
    norm = jaxnorm.DomainBatchNorm(momentum=0.5)
    x = np.random.default_rng(0).normal(100, 1, (8, 3, 2)).astype(np.float32)
    domain = np.array([0, 1, 1, 0, 1, 0, 0, 0])
    train = jax.jit(lambda x, stats, domain: norm(x, {}, stats, domain=domain)[1])
    start = norm.init_stats((2,))
    stats = jaxnorm.models.accumulate(start)
    for batch in zip(parts(x), parts(domain), strict=True):
        stats = train(batch[0], stats, batch[1])
    assert_same(jaxnorm.models.commit(stats, momentum=0.5), train(x, start, domain))


def test_a_schedule_counts_one_step():
    norm = jaxnorm.BatchRenorm(rmax=lambda step: 1 + step / 10, momentum=0.9)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    stats = jaxnorm.models.accumulate(norm.init_stats((3,)))
    for batch in np.split(x, 2):
        _, stats = norm(batch, {}, stats)
        assert stats["step"] == 0
    assert jaxnorm.models.commit(stats, momentum=0.9)["step"] == 1


def test_in_a_scan_and_over_devices():
    norm = jaxnorm.BatchNorm(axis_name="d", momentum=0.9)
    x = np.random.default_rng(0).normal(1e4, 1, (3, 8, 5)).astype(np.float32)
    start = norm.init_stats((5,))

    def steps(batches, stats):
        stats = jaxnorm.models.accumulate(stats)
        stats, _ = jax.lax.scan(lambda s, x: (norm(x, {}, s)[1], None), stats, batches)
        return jaxnorm.models.commit(stats, momentum=0.9)

    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    spread = jax.shard_map(
        steps, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P()
    )
    got = jax.jit(spread)(x, start)
    exact = x.astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(got["mean"], 0.1 * exact.mean(0), 1e-6)
    np.testing.assert_allclose(got["var"], 0.9 + 0.1 * exact.var(0), 1e-5)


def test_one_bad_micro_batch_voids_the_update():
    norm, x = jaxnorm.BatchNorm(), np.ones((4, 3), np.float32)
    start = norm.init_stats((3,))
    for first, second in ((x, x * np.nan), (x * np.inf, x)):
        stats = jaxnorm.models.accumulate(start)
        for batch in (first, second):
            _, stats = norm(batch, {}, stats)
        after = jaxnorm.models.commit(stats, momentum=0.5)
        jax.tree.map(np.testing.assert_array_equal, after, start)


def test_no_gradient_passes_through_what_is_gathered():
    norm = jaxnorm.BatchNorm()
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    stats = jaxnorm.models.accumulate(norm.init_stats((3,)))

    def loss(x):
        _, new = norm(x, {}, stats)
        return new["batch_mean"].sum() + new["batch_var"].sum()

    assert not jax.grad(loss)(x).any()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jl.BatchNorm(use_running_average=False, momentum=0.9)(x)
        return jl.Norm(jaxnorm.GhostBatchNorm(size=2))(nn.Dense(3)(x), False)


def test_in_linen_some_layers_gather_and_others_move():
    x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    net = Net()
    variables = net.init(jax.random.key(0), x)
    step = jax.jit(functools.partial(net.apply, mutable=["batch_stats"]))
    stats = jaxnorm.models.accumulate(variables["batch_stats"], "BatchNorm_0".__eq__)
    for batch in np.split(x, 2):
        _, new = step({**variables, "batch_stats": stats}, batch)
        stats = new["batch_stats"]
    whole = step(variables, x)[1]["batch_stats"]
    got = jaxnorm.models.commit(stats, momentum=0.9)
    assert_same(got["BatchNorm_0"], whole["BatchNorm_0"])
    assert (got["Norm_0"]["mean"] != variables["batch_stats"]["Norm_0"]["mean"]).all()


def test_in_nnx():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    models: list[Any] = [
        nnx.Sequential(jx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0)), nnx.relu)
        for _ in range(2)
    ]
    for model in models:
        model.train()
    gathering, whole = models
    whole(x)
    stats = jaxnorm.models.accumulate(jx.variables(gathering)["batch_stats"])
    jx.update(gathering, {"batch_stats": stats})
    call = nnx.jit(lambda model, x: model(x))
    for batch in np.split(x, 2):
        call(gathering, batch)
    stats = jaxnorm.models.commit(jx.variables(gathering)["batch_stats"], momentum=0.9)
    jx.update(gathering, {"batch_stats": stats})
    norm, other = gathering.layers[0], whole.layers[0]
    assert not hasattr(norm, "batch_mean")
    np.testing.assert_allclose(norm.mean[...], other.mean[...], 1e-6, 1e-7)
    np.testing.assert_allclose(norm.var[...], other.var[...], 1e-6)


@pytest.mark.parametrize("name", [n for n in STATEFUL if n not in GATHERING])
def test_methods_of_a_rule_of_their_own_refuse(name):
    row, p = STATEFUL[name], problem(STATEFUL[name])
    stats = jaxnorm.models.accumulate(p.stats)
    with pytest.raises(ValueError, match="by a rule of its own at each step"):
        jax.eval_shape(
            lambda: row.norm(p.x, p.params, stats, mask=p.mask, **row.inputs(p.x))
        )


def test_errors_name_the_layer():
    stats = {"stem": {"norm": jaxnorm.init_stats(3)}}
    for call in (
        functools.partial(jaxnorm.models.commit, momentum=0.9),
        jaxnorm.models.discard,
    ):
        with pytest.raises(ValueError, match=r"no layer.*\['stem/norm'\]"):
            call(stats)
    with pytest.raises(ValueError, match="'stem/norm' keeps.*momentum=None"):
        jaxnorm.models.commit(jaxnorm.models.accumulate(stats), momentum=None)
    counting = {"stem": jaxnorm.init_stats(3, momentum=None)}
    with pytest.raises(ValueError, match="'stem' keeps.*momentum=0.9"):
        jaxnorm.models.commit(jaxnorm.models.accumulate(counting), momentum=0.9)
    with pytest.raises(ValueError, match=r"none of the layers.*\['stem/norm'\]"):
        jaxnorm.models.accumulate(stats, lambda path: False)
    with pytest.raises(ValueError, match="shape"):
        norm = jaxnorm.BatchNorm()
        norm(jnp.ones((4, 2)), {}, jaxnorm.models.accumulate(jaxnorm.init_stats(3)))
