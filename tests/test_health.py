"""The health of running statistics: each finding where it belongs, and only there."""

import dataclasses
import io
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from flax import linen as nn
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _running as running
from jaxnorm.models import health
from jaxnorm.models._health.rules import RULES


def stats(features=20, **changes):
    """Those of a layer in good health, but for the `changes` of its first features."""
    rng = np.random.default_rng(0)
    tree = {"mean": rng.normal(size=features), "var": rng.random(features) + 0.5}
    for name, values in changes.items():
        tree[name][: np.size(values)] = values
    return tree


def batch(tree, size: Any = 400, shift: Any = 0.0, ratio: Any = 1.0):
    """Moments that differ by so many deviations, and have so many times its own."""
    mean = tree["mean"] + shift * np.sqrt(tree["var"] + 1e-5)
    var = (tree["var"] + 1e-5) * np.square(ratio) - 1e-5
    return {"mean": mean, "var": np.maximum(var, 0), "size": size}


def only(report) -> jaxnorm.models.LayerHealth:
    (row,) = report.rows
    return row


def found(report):
    return {f.rule: f.detail for f in only(report).findings}


def first(count, value, features=20):
    return np.where(np.arange(features) < count, value, np.ones_like(value))


def test_in_good_health():
    tree = stats()
    report = health(tree, {"scale": np.ones(20)}, fresh=batch(tree))
    row = only(report)
    assert report.healthy and not row.findings
    assert (row.path, row.features, row.size, row.drifted) == ("", 20, 400, 0)
    for k in ("mean", "var"):
        values = abs(tree[k])
        expected = values.min(), np.median(values), values.max()
        got = (getattr(row, f"{k}_{of}") for of in ("min", "median", "max"))
        np.testing.assert_allclose(list(got), expected)


def test_never_updated():
    assert found(health(jaxnorm.init_stats(3))) == {"never updated": "all 3 features"}
    assert found(health(stats(mean=[0, 0], var=[1]))) == {
        "never updated": "1 of 20 features"
    }


def test_never_updated_by_a_count():
    tree = jaxnorm.init_stats(3, momentum=None)
    assert "never updated" in found(health(tree))
    tree["count"] = jnp.array([1, 0, 1])
    assert found(health(tree)) == {"never updated": "1 of 3 features"}


@pytest.mark.parametrize(
    "norm", [jaxnorm.PowerNorm(), jaxnorm.IterNorm(group_size=2), jaxnorm.BatchRenorm()]
)
def test_never_updated_by_what_a_method_keeps(norm):
    tree = norm.init_stats((4,))
    assert found(health(tree)) == {"never updated": "all 4 features"}
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    x[:, 0] = 0  # its mean stays 0
    _, tree = norm(x, norm.init_params((4,)), tree)
    assert "never updated" not in found(health(tree))


def test_whitening_of_stacked_layers():
    tree = jaxnorm.IterNorm(group_size=2).init_stats((4,))
    tree = jax.tree.map(lambda v: np.stack([v, v, v]), tree)
    tree["whitening"][1, 1, 0, 1] = 0.5  # a row of the third feature of the second
    report = health(tree)
    assert found(report) == {"never updated": "11 of 12 features"}
    assert only(report).var_min is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1])
def test_not_finite(value):
    report = health(stats(var=[value, 1]), epsilon=1e-5)
    assert found(report) == {"not finite": "1 values"}
    assert 0 < (only(report).var_min or 0) < np.inf
    assert only(report).findings[0].severe


def test_not_finite_in_what_else_a_layer_keeps():
    tree = jaxnorm.MovingAverageBatchNorm(window=2).init_stats((3,))
    tree |= {"count": jnp.ones(3, jnp.int32)}
    assert health(tree).healthy
    tree["buffer"] = tree["buffer"].at[1, 2].set(jnp.nan)
    assert found(health(tree)) == {"not finite": "1 values"}


def test_small_variance():
    tree = stats(var=[0.9e-5, 1.1e-5])
    assert found(health(tree)) == {"small variance": "1 of 20 features"}
    assert health(tree, epsilon=0.8e-5).healthy
    assert only(health(tree)).small == 1


def test_dead_by_statistics():
    # Deviations of the output of 0.9e-3 and 1.1e-3.
    tree = stats(var=np.square([0.9e-3, 1.1e-3]) * 1e-5)
    assert found(health(tree))["dead"] == "1 of 20 features"
    assert "dead" not in found(health(tree, dead=0.8e-3))


def test_dead_by_scale():
    scale = first(2, -0.9e-3)
    params = {"scale": scale, "bias": np.ones(20)}
    assert found(health(stats(), params)) == {"dead": "2 of 20 features"}
    assert health(stats(), {"scale": scale * 1.2}).healthy
    # A scale undoes a small variance.
    tree = stats(var=[0.81e-6 * 1e-5])
    assert "dead" not in found(health(tree, {"scale": first(1, 2.0)}))


@pytest.mark.parametrize(
    "params",
    [{}, {"a": {"bias": np.ones(20)}}, {"dense": {"kernel": np.ones((3, 20))}}],
)
def test_norms_without_scale(params):
    assert health({"a": stats()}, params).healthy
    tree = {"a": stats(var=[0.0])}
    assert only(health(tree, params)) == only(health(tree))


def test_a_norm_that_is_used_twice():
    x = np.random.default_rng(0).normal(size=(16, 20)).astype(np.float32)
    norm, gathering = jaxnorm.BatchNorm(), jaxnorm.models.accumulate(stats())
    for batch in (x[:8], x[8:]):
        _, gathering = norm(batch, {}, gathering)
    report = health(
        {"a": stats(), "b": stats()}, fresh={"a": gathering, "b": gathering}
    )
    assert [row.size for row in report.rows] == [16, 16]


def test_dead_by_a_batch_that_is_large_enough():
    tree = stats()
    fresh = batch(tree, size=np.where(np.arange(20) < 19, 16, 15), ratio=0.0)
    assert only(health(tree, fresh=fresh)).dead == 19
    assert only(health(tree, fresh={"var": np.zeros(20)})).dead == 20
    # Of a deviation of 1, divided by 1e4.
    tree = stats(var=[1e8])
    assert only(health(tree, fresh=batch(tree) | {"var": np.ones(20)})).dead == 1
    # Alive, though the running variance vanished.
    tree = stats(var=[0.0])
    assert only(health(tree)).dead == 1
    assert only(health(tree, fresh=batch(tree) | {"var": np.ones(20)})).dead == 0


@pytest.mark.parametrize("change", [{"shift": 0.6}, {"ratio": np.exp(0.6)}])
@pytest.mark.parametrize("sign", [1, -1])
def test_drift(change, sign):
    tree = stats()
    change = {k: sign * v if k == "shift" else v**sign for k, v in change.items()}
    neutral = {"shift": 0.0, "ratio": 1.0}
    part = {k: np.where(np.arange(20) < 2, v, neutral[k]) for k, v in change.items()}
    fresh = batch(tree, **part)
    report = health(tree, fresh=fresh)
    assert found(report) == {"drift": "2 of 20 features"}
    row = only(report)
    drifts = {"shift": "mean_drift", "ratio": "deviation_drift"}
    for k, name in drifts.items():
        assert getattr(row, f"{name}_max") == pytest.approx(0.6 * (k in change))
        assert getattr(row, f"{name}_median") == pytest.approx(0, abs=1e-12)
    assert health(tree, fresh=fresh, drift=0.7).healthy
    # Chance makes as much of 40 elements, and no one knows of how many these are.
    assert health(tree, fresh=fresh | {"size": 40}).healthy
    assert not health(tree, fresh=fresh | {"size": 50}).healthy
    del fresh["size"]
    assert found(health(tree, fresh=fresh)) == {"drift": "2 of 20 features"}
    assert only(health(tree, fresh=fresh)).size is None


def test_few_features_may_drift():
    tree = stats()
    report = health(tree, fresh=batch(tree, shift=first(1, 2.0) - 1))
    assert report.healthy and only(report).drifted == 1
    tree = stats(19)
    report = health(tree, fresh=batch(tree, shift=first(1, 2.0, 19) - 1))
    assert found(report) == {"drift": "1 of 19 features"}


def test_small_batch():
    tree = stats()
    assert health(tree, fresh=batch(tree, size=16)).healthy
    report = health(tree, fresh=batch(tree, size=first(2, 9) + 14, shift=9))
    assert found(report)["drift"] == "2 of 20 features"  # where it is large enough
    report = health(tree, fresh=batch(tree, size=first(3, 9) + 100))
    assert report.healthy and only(report).size == 101
    report = health(tree, fresh=batch(tree, size=first(3, 9)))
    assert found(report) == {"small batch": "1 element, which has no variance"}
    report = health(tree, fresh=batch(tree, size=9, shift=5))
    assert found(report) == {"small batch": "9 elements, variances are off by 50%"}
    assert health(tree, fresh=batch(tree, size=9), least=9).healthy


def test_features_that_the_batch_has_none_of_do_not_count():
    tree = stats()
    size = np.where(np.arange(20) < 3, 0, 400)
    fresh = batch(tree, size=size, shift=np.where(size, 0.0, 50.0))
    report = health(tree, fresh=fresh)
    assert report.healthy and only(report).size == 400
    assert only(report).mean_drift_max == pytest.approx(0)


def test_not_reached():
    trees = {"a": stats(), "b": stats()}
    fresh = {"a": batch(trees["a"]), "b": batch(trees["b"], size=0, shift=9)}
    rows = {row.path: row for row in health(trees, fresh=fresh).rows}
    assert [f.rule for f in rows["b"].findings] == ["not reached"]
    assert rows["b"].mean_drift_max is None
    assert not rows["a"].findings


def test_batch_not_finite():
    tree = stats()
    fresh = batch(tree)
    fresh["mean"][0] = np.inf
    fresh["var"][:2] = np.nan, -1
    report = health(tree, fresh=fresh)
    assert found(report) == {"batch not finite": "3 values"}
    assert only(report).mean_drift_max == pytest.approx(0)


def test_a_batch_that_is_not_finite_is_no_fault_of_the_statistics():
    tree = running.start_accumulation(stats())
    tree["batch_size"] += 400
    tree["batch_mean"] = tree["batch_mean"].at[0].set(jnp.nan)
    assert found(health(tree))["batch not finite"] == "1 values"
    assert "not finite" not in found(health(tree))


def test_complex_means():
    mean = np.full(3, 3 + 4j, np.complex64)
    tree = {"mean": mean, "var": np.ones(3, np.float32)}
    fresh = {"mean": mean + 2j, "var": np.ones(3), "size": 100}
    row = only(health(tree, fresh=fresh))
    assert row.mean_median == 5
    assert row.mean_drift_median == pytest.approx(2, rel=1e-4)
    tree["mean"] = np.where([True, False, False], complex(0, np.nan), mean)
    assert found(health(tree)) == {"not finite": "1 values"}


def test_half_precision_is_read_as_it_is():
    tree = {"mean": jnp.ones(2, jnp.bfloat16), "var": jnp.full(2, 1e-4, jnp.bfloat16)}
    assert only(health(tree)).var_min == float(jnp.bfloat16(1e-4))


def test_by_domain():
    norm = jaxnorm.DomainBatchNorm(num_domains=3, momentum=0.0)
    x = jax.random.normal(jax.random.key(0), (60, 4))
    start = norm.init_stats((4,))
    domain = jnp.repeat(jnp.arange(2), 30)
    _, tree = norm(x, {}, start, domain=domain)
    assert found(health(tree, {"scale": jnp.ones(4)})) == {
        "never updated": "4 of 12 features"
    }
    _, fresh = norm(x, {}, running.start_accumulation(tree), domain=domain)
    row = only(health(fresh))
    assert (row.size, row.drifted) == (30, 0)
    assert row.mean_drift_max == pytest.approx(0, abs=1e-6)  # of means that are rounded


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        alive = jnp.array([[1.0, 1.0, 1.0, 0.0]])
        x = nn.Dense(4)(x) * alive + 1
        norm = jaxnorm.linen.BatchNorm(use_running_average=not train, momentum=0.5)
        return norm(x), None


class Net(nn.Module):
    """Three stacked blocks, of whose features the last is constant, and a norm."""

    @nn.compact
    def __call__(self, x, train=True):
        options: dict[str, Any] = {
            "variable_axes": {"params": 0, "batch_stats": 0},
            "split_rngs": {"params": True},
            "in_axes": nn.broadcast,
            "length": 3,
        }
        stack = nn.scan(Block, **options)
        x, _ = stack(name="block_10")(x, train)
        return jaxnorm.linen.BatchNorm(
            use_running_average=not train, momentum=0.5, name="block_9"
        )(x)


def test_a_linen_model():
    net, key = Net(), jax.random.key(0)
    x = jax.random.normal(key, (64, 4))
    variables = net.init(key, x)
    rules = [f.rule for row in health(**variables).rows for f in row.findings]
    assert rules == ["never updated"] * 2

    @jax.jit
    def step(stats, x):
        model = {"params": variables["params"], "batch_stats": stats}
        return net.apply(model, x, mutable=["batch_stats"])[1]["batch_stats"]

    tree = variables["batch_stats"]
    for _ in range(40):
        tree = step(tree, x)
    pooling = jaxnorm.models.accumulate(tree)
    assert health(pooling).rows == health(tree).rows  # there is no batch in it yet

    report = health(tree, variables["params"], fresh=step(pooling, x))
    last, stack = report.rows
    assert (last.path, stack.path) == ("block_9", "block_10/BatchNorm_0")
    assert (stack.features, stack.size, stack.dead, stack.drifted) == (12, 64, 3, 0)
    assert (last.size, last.dead) == (64, 1)

    # The tree that comes out of the pass is enough, and only its batches are compared.
    other = step(pooling, 3 * x + 2)
    assert health(other, variables["params"]) == health(
        tree, variables["params"], fresh=other
    )
    assert "drift" in [f.rule for f in health(other).rows[1].findings]
    part = jaxnorm.models.accumulate(tree, where=lambda path: path == "block_9")
    sizes = [row.size for row in health(tree, fresh=step(part, x)).rows]
    assert sizes == [64, None]
    where = lambda path: path == "block_9"  # noqa: E731
    assert only(health(tree, fresh=other, where=where)).path == "block_9"


def test_an_nnx_model():
    norm = jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), norm)
    assert "never updated" in found(health(**jaxnorm.nnx.variables(model)))
    x = jax.random.normal(jax.random.key(0), (8, 4))
    model(x)
    variables = jaxnorm.nnx.variables(model)
    pooling = jaxnorm.models.accumulate(variables["batch_stats"])
    jaxnorm.nnx.update(model, {"batch_stats": pooling})
    model(x)
    report = health(**jaxnorm.nnx.variables(model))
    assert only(report).path == "layers/1"
    assert list(found(report)) == ["small batch"]
    variables = jaxnorm.nnx.variables(model)
    variables["params"]["layers"][1]["scale"] = jnp.zeros(6)
    assert found(health(**variables))["dead"] == "all 6 features"


@pytest.mark.parametrize(
    "message, call",
    [
        ("none of the layers", lambda: health(stats(), where=lambda path: False)),
        ("epsilon must be positive, got 0", lambda: health(stats(), epsilon=0)),
        (
            r"no scale for any of the layers \['a'\]: .*variables\[\"params\"\]",
            lambda: health({"a": stats()}, {"params": {"a": {"scale": np.ones(20)}}}),
        ),
        (
            r"the scale of 'a' has shape \(3,\), .* \(20,\): take both from one model",
            lambda: health({"a": stats()}, {"a": {"scale": np.ones(3)}}),
        ),
        (
            r"fresh lacks the layers \['b'\], it holds \['a'\]: .* `where`",
            lambda: health({"a": stats(), "b": stats()}, fresh={"a": stats()}),
        ),
        (
            r"the mean of 'a' in the fresh batch has shape \(3,\), .* \(20,\)",
            lambda: health({"a": stats()}, fresh={"a": stats(3)}),
        ),
        (
            r"the size of 'a' in the fresh batch has shape \(3,\), .* \(20,\)",
            lambda: health({"a": stats()}, fresh={"a": {**stats(), "size": [1] * 3}}),
        ),
        (
            r"fresh holds no batch in any of \['a'\]: pass .* a training pass",
            lambda: health(
                {"a": stats()}, fresh={"a": running.start_accumulation(stats())}
            ),
        ),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def report():
    """Of 12 layers: the third never updated, the others in good health."""
    trees: dict[str, Any] = {
        f"Block_{i}": stats(var=[0.01 * (i + 1)]) for i in range(12)
    }
    trees["Block_2"] = jaxnorm.init_stats(20)
    fresh = {path: batch(tree, shift=0.25, ratio=1.1) for path, tree in trees.items()}
    return health(trees, fresh=fresh)


def test_layers_are_in_order(report):
    assert [row.path for row in report.rows] == [f"Block_{i}" for i in range(12)]


def test_as_data(report):
    rows = json.loads(json.dumps(report.as_dicts()))
    assert rows[2]["never_updated"] == 20 and rows[1]["var_min"] == 0.02
    assert rows[2]["findings"][0]["rule"] == "never updated"
    assert rows[1]["findings"] == []
    assert not report.healthy and hash(report.rows[0])


def test_as_text(report):
    lines = str(report).splitlines()
    words = " ".join(lines[:2]).split()
    header = "layer features least var median var mean drift deviation drift batch"
    assert sorted(words) == sorted(header.split()) and not lines[2].strip("─ ")
    figures = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert figures["Block_1"][:2] == ["20", "0.02"]
    assert figures["Block_2"] == ["20", "1", "1", "0.25", "0.095", "400"]
    assert "  never updated: all 20 features" in lines
    assert lines[-1].startswith("* never updated: train with")
    assert lines[-1].endswith(".") and len(lines) == 17
    lone = str(health(stats())).splitlines()
    assert lone[-1].startswith("(one layer)") and lone[-1].split()[-1] == "-"


def test_in_a_notebook(report):
    shown = report._repr_mimebundle_()
    assert "<pre" in shown["text/html"] and "Block_2" in shown["text/html"]
    assert "* never updated: train with" in shown["text/plain"]


def test_as_scalars(report):
    scalars = report.scalars()
    assert scalars["Block_1/var_min"] == 0.02 and scalars["Block_2/findings"] == 1
    assert scalars["Block_2/size"] == 400 and scalars["Block_1/findings"] == 0
    assert all(type(value) is float for value in scalars.values())
    names = {field.name for field in dataclasses.fields(report.rows[0])} - {"path"}
    assert {k.removeprefix("Block_2/") for k in scalars if "Block_2/" in k} == names
    lone = health(stats()).scalars()
    assert "var_min" in lone and "size" not in lone  # which only a fresh batch tells


def test_as_a_table(report):
    out = io.StringIO()
    console = rich.console.Console(file=out, width=80, force_terminal=True)
    console.print(report)
    lines = out.getvalue().splitlines()
    colors = {"Block_1 ": "\x1b[32m", "Block_2 ": "\x1b[31m", "never": "\x1b[31m"}
    for text, color in colors.items():
        line = next(line for line in lines if text in line)
        assert color in line.partition(text)[0], text
    assert any("* never updated: train with" in line for line in lines)
    out.truncate(0)
    console.print(health({"[bold]": stats(var=[1e-6])}))
    line = next(line for line in out.getvalue().splitlines() if "[bold]" in line)
    assert "\x1b[33m" in line


def test_as_a_figure(report, tmp_path):
    figure = report.figure()
    labels = ["running variance", "|running mean|", "drift (deviations)"]
    assert [ax.get_xlabel() for ax in figure.axes] == labels
    ticks = figure.axes[0].get_yticklabels()
    assert [t.get_text() for t in ticks] == [row.path for row in report.rows]
    assert ["red" if i == 2 else "black" for i in range(12)] == [
        t.get_color() for t in ticks
    ]
    ((bars,), _, (drifts, deviations)) = (ax.collections for ax in figure.axes)
    ends = np.array([path.vertices for path in bars.get_paths()])
    row = report.rows[1]
    np.testing.assert_allclose(ends[1], [[row.var_min, 1], [row.var_max, 1]])
    for lines, name in ((drifts, "mean_drift"), (deviations, "deviation_drift")):
        ends = lines.get_paths()[1].vertices[:, 0]
        expected = [getattr(row, f"{name}_{k}") for k in ("median", "max")]
        np.testing.assert_allclose(ends, expected)
    figure.savefig(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_without_a_batch_or_variances(tmp_path):
    whitened = jaxnorm.IterNorm().init_stats((4,))
    figure = health({"a": stats(), "long" * 20: whitened}).figure()
    assert [ax.get_xlabel() for ax in figure.axes] == [
        "running variance",
        "|running mean|",
    ]
    assert len(figure.axes[0].get_yticklabels()[1].get_text()) == 40
    figure.savefig(tmp_path / "health.png")


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"jaxnorm\[examples\]"):
        report.figure()


def test_importing_it_imports_neither_rich_nor_matplotlib():
    code = (
        "import jaxnorm, sys; jaxnorm.models.health(jaxnorm.init_stats(1)); "
        "sys.exit(bool({'rich', 'matplotlib', 'flax'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_rule_is_documented():
    for rule in RULES:
        assert f"| {rule.name} |" in (health.__doc__ or "")
