"""Each finding about running statistics, where there is one and where there is none."""

import io
import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm
from jaxnorm import linen as jl
from jaxnorm import nnx as jx

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEATURES = 40


def good(**others):
    """The statistics of a layer in which there is nothing to find."""
    rng = np.random.default_rng(0)
    stats = {"mean": rng.normal(size=FEATURES), "var": rng.uniform(0.5, 2, FEATURES)}
    return {k: v.astype(np.float32) for k, v in stats.items()} | others


def with_values(stats, name, count, value):
    array = np.array(stats[name])
    array[:count] = value
    return stats | {name: array}


def found(stats, params=None, fresh=None, **settings):
    """The rules that find something in one layer, and how much."""
    whole = {"layer": stats}
    fresh = None if fresh is None else {"layer": fresh}
    params = None if params is None else {"layer": params}
    report = jaxnorm.health(whole, params, fresh=fresh, **settings)
    (row,) = report.rows
    assert report.healthy == (not row.findings)
    return {finding.rule: finding.detail for finding in row.findings}


def test_a_good_layer_has_no_findings_and_true_figures():
    stats = good()
    (row,) = jaxnorm.health({"layer": stats}, {"layer": {"scale": np.ones(40)}}).rows
    assert row.findings == () and row.path == "layer" and row.features == FEATURES
    for name, array in {"mean": abs(stats["mean"]), "var": stats["var"]}.items():
        for word, f in {"min": np.min, "median": np.median, "max": np.max}.items():
            assert getattr(row, f"{name}_{word}") == float(f(array.astype(np.float64)))
    assert row.size is None and row.drifted is None


def test_never_updated():
    fresh = jaxnorm.init_stats(FEATURES)
    assert found(fresh) == {"never updated": "all 40 features"}
    half = with_values(with_values(good(), "mean", 20, 0), "var", 20, 1)
    assert found(half) == {"never updated": "20 of 40 features"}
    assert found(with_values(good(), "mean", 20, 0)) == {}
    counted = good(count=np.maximum(np.arange(FEATURES) - 2, 0))
    assert found(counted) == {"never updated": "3 of 40 features"}
    whitening = jaxnorm.IterNorm(group_size=2).init_stats((4,))
    assert "never updated" in found(whitening)
    moved = with_values(dict(whitening), "mean", 4, 1.0)
    assert "never updated" not in found(moved)


def test_not_finite():
    for name, value in (("mean", np.nan), ("var", np.inf), ("var", -1)):
        bad = with_values(good(), name, 3, value)
        assert found(bad) == {"not finite": "3 values"}
        row: Any = jaxnorm.health({"a": bad}).rows[0]
        assert 0.5 <= row.var_min <= row.var_max <= 2  # of those that are variances


def test_small_variance_and_dead_features():
    small = with_values(good(), "var", 2, 1e-6)
    assert found(small) == {"small variance": "2 of 40 features"}
    assert found(small, epsilon=1e-7) == {}
    constant = with_values(good(), "var", 2, 0)
    rules = {"small variance": "2 of 40 features", "dead": "2 of 40 features"}
    assert found(constant) == rules
    scale = np.ones(FEATURES)
    scale[:5] = 1e-5
    assert found(good(), {"scale": scale}) == {"dead": "5 of 40 features"}
    assert found(good(), {"scale": scale}, dead=1e-6) == {}
    # Alive in training once, and constant now.
    batch = {"mean": good()["mean"], "var": good()["var"] * (np.arange(40) > 3)}
    assert "dead" in found(good(), fresh=batch)
    assert found(good(), fresh=batch)["dead"] == "4 of 40 features"


def test_drift():
    stats = good()
    apart = 0.6 * np.sqrt(stats["var"] + 1e-5)
    for count, drifts in ((2, False), (3, True)):  # of 40: one in 20, and more
        for name, new in {
            "mean": stats["mean"] + apart,
            "var": stats["var"] * np.exp(1.3),
        }.items():
            fresh = dict(stats)
            fresh[name] = np.where(np.arange(FEATURES) < count, new, stats[name])
            rules = found(stats, fresh=fresh)
            assert rules == ({"drift": f"{count} of 40 features"} if drifts else {})
            assert found(stats, fresh=fresh, drift=0.7) == {}
    (row,) = jaxnorm.health(
        {"a": stats}, fresh={"a": stats | {"var": 4 * stats["var"]}}
    ).rows
    assert row.deviation_drift_median == pytest.approx(np.log(2), rel=1e-3)
    assert row.mean_drift_max == 0 and row.drifted == FEATURES


def test_chance_is_no_drift():
    stats = good()
    fresh = stats | {"mean": stats["mean"] + 0.6 * np.sqrt(stats["var"])}
    assert (
        found(stats, fresh=fresh | {"size": np.array(36)}) == {}
    )  # 4 / sqrt(36) > 0.6
    assert "drift" in found(stats, fresh=fresh | {"size": np.array(64)})


def test_the_batch_itself():
    stats = good()
    detail = "9 elements, variances are off by 50%"
    assert found(stats, fresh=stats | {"size": np.array(9)}) == {"small batch": detail}
    assert found(stats, fresh=stats | {"size": np.array(9)}, least=8) == {}
    one = found(stats, fresh=stats | {"size": np.array(1)})
    assert one == {"small batch": "1 element, which has no variance"}
    bad = with_values(stats, "mean", 2, np.nan) | {"size": np.array(99)}
    assert found(stats, fresh=bad) == {"batch not finite": "2 values"}
    two = {"a": stats, "b": stats}
    sizes = {"a": stats | {"size": np.array(0)}, "b": stats | {"size": np.array(99)}}
    a, b = jaxnorm.health(two, fresh=sizes).rows
    assert [f.rule for f in a.findings] == ["not reached"] and not b.findings


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for _ in range(11):
            x = jl.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return jl.LayerNorm()(x)


def test_a_linen_model_and_its_fresh_batch():
    x = np.random.default_rng(0).normal(3, 2, (64, 8)).astype(np.float32)
    net = Net()
    variables: Any = net.init(jax.random.key(0), x)
    train = jax.jit(lambda v, x: net.apply(v, x, mutable=["batch_stats"])[1])
    report = jaxnorm.health(variables["batch_stats"], variables["params"])
    assert len(report.rows) == 11 and not report.healthy
    assert [row.path for row in report.rows][-2:] == ["BatchNorm_9", "BatchNorm_10"]
    assert all(row.findings[0].rule == "never updated" for row in report.rows)
    for _ in range(9):
        variables = variables | train(variables, x)
    stats = variables["batch_stats"]
    gathering = variables | {"batch_stats": jaxnorm.accumulate(stats)}
    fresh = train(gathering, x)["batch_stats"]
    report = jaxnorm.health(stats, variables["params"], fresh=fresh)
    assert report.healthy and {row.size for row in report.rows} == {64}
    same = jaxnorm.health(fresh, variables["params"])
    assert (
        [r.drifted for r in same.rows] == [r.drifted for r in report.rows] == [0] * 11
    )
    other = train(gathering, 5 * x)["batch_stats"]
    assert jaxnorm.health(stats, fresh=other).rows[0].findings[0].rule == "drift"
    few = train(gathering, x[:9])["batch_stats"]
    report = jaxnorm.health(stats, fresh=few, where="BatchNorm_3".__eq__)
    assert [f.rule for f in report.rows[0].findings] == ["small batch"]


def test_an_nnx_model_and_other_methods():
    model = nnx.Sequential(
        jx.Norm(jaxnorm.PowerNorm(momentum=0.5), 8), jx.BatchNorm(8, rngs=nnx.Rngs(0))
    )
    assert not jaxnorm.health(**jx.variables(model)).healthy
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    for _ in range(3):
        model(x)
    power, batch = jaxnorm.health(**jx.variables(model)).rows
    assert power.mean_max is None and not power.findings and not batch.findings
    table = jaxnorm.DomainBatchNorm(num_domains=3).init_stats((4,))
    assert found(table) == {"never updated": "all 12 features"}
    complex_stats = {"mean": np.full(3, 3 + 4j), "var": np.full(3, 2.0)}
    assert jaxnorm.health({"c": complex_stats}).rows[0].mean_max == 5
    marked = jaxnorm.freeze({"layer": good()})["layer"]
    assert found(marked) == {}
    gathering = with_values(jaxnorm.accumulate(good()), "batch_var", 1, np.nan)
    assert found(gathering) == {}  # as it is not of the running statistics


def report():
    tree = {
        "a": good(),
        "b": jaxnorm.init_stats(4),
        "c": with_values(good(), "var", 1, 0),
    }
    fresh = jax.tree.map(lambda v: v + 1, tree)
    return jaxnorm.health(tree, fresh=fresh)


def test_the_report_as_text_as_a_table_and_as_data():
    made = report()
    lines = str(made).splitlines()
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert starts[:4] == ["layer", "a", "b", "c"]
    assert "  never updated: all 4 features" in lines
    assert any(line.startswith("* never updated: train with") for line in lines)
    from rich.console import Console

    console: Any = Console(width=100, file=io.StringIO())
    console.print(made)
    shown = console.file.getvalue()
    assert "never updated: all 4 features" in shown and "median" in shown
    data = json.loads(json.dumps(made.as_dicts()))
    assert [row["path"] for row in data] == ["a", "b", "c"]
    assert data[1]["findings"][0]["rule"] == "never updated"


def test_the_report_as_a_figure(tmp_path):
    figure: Any = report().figure()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["running variance", "|running mean|", "drift (deviations)"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["a", "b", "c"]
    colors = [label.get_color() for label in figure.axes[0].get_yticklabels()]
    assert colors[1] == "red" and colors[2] == "darkorange"
    figure.savefig(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes()[:4] == b"\x89PNG"
    assert len(jaxnorm.health({"a": good()}).figure().axes) == 2


def test_a_figure_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxnorm\[examples\]'"):
        report().figure()


def test_importing_it_imports_no_tables_or_figures():
    code = (
        "import jaxnorm, sys; sys.exit(bool({'rich', 'matplotlib'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_name_the_layer():
    stats, params = {"a": good()}, {"a": {"scale": np.ones(3)}}
    gathering, narrow = jaxnorm.accumulate(stats), jaxnorm.init_stats(3)
    cases: list[Any] = [
        ("`where` means none", {"where": lambda path: False}),
        ("epsilon must be positive", {"epsilon": 0.0}),
        (r"the scale of 'a' has shape \(3,\)", {"params": params}),
        (r"no scale for any of the layers \['a'\]", {"params": {"b": params}}),
        (r"fresh lacks the layers \['a'\]", {"fresh": {"b": good()}}),
        (r"fresh holds no batch in any of \['a'\]", {"fresh": gathering}),
        (
            r"the mean of 'a' in the fresh batch",
            {"fresh": {"a": narrow}},
        ),
    ]
    for match, settings in cases:
        with pytest.raises(ValueError, match=match):
            jaxnorm.health(stats, **settings)
    assert jaxnorm.health(gathering).healthy  # which holds no batch yet
