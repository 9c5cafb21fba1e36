"""The experiments run, their rules decide rightly, and committed results agree."""

import gzip
import importlib.util
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import NAMES, __main__, data, fit, results
from experiments.results import ROOT
from experiments.runs import SWEEP, SWEEP_SEED, Options, Run, thinned, tuned
from experiments.verdict import Comparison, combined, interval, judge

COMMITTED = ROOT / "experiments" / "results"
FIGURES = ROOT / "docs" / "evidence"
DIGITS = [name for name in NAMES if "digits" in __main__.load(name).DATA]


def load_pages():
    path = ROOT / "docs" / "ext" / "evidence.py"
    spec = importlib.util.spec_from_file_location("evidence", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load_pages()


def settings(runs) -> set[str]:
    """The arms of final runs, without the rates that their sweeps chose."""
    return {
        json.dumps({k: v for k, v in run.arm.items() if k not in ("rate", "best")})
        for run in runs
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_numbers_and_a_figure(name, tmp_path, capsys):
    choice = ["--data", "digits"] if name in DIGITS else []
    assert __main__.main([name, "--quick", "--out", str(tmp_path), *choice]) == 0
    found = results.read(tmp_path / f"{name}.json")
    claim = __main__.load(name)
    assert found["rule"].keys() == claim.RULE.keys()
    assert found["verdict"] in ("held", "did not hold", "open")
    *_, verdict, files = capsys.readouterr().out.strip().splitlines()
    assert verdict == f"{name}: {found['verdict']}. {found['sentence']}"
    assert str(tmp_path / f"{name}.svg") in files
    full = results.read(COMMITTED / f"{name}.json")
    assert settings(found["runs"]) <= settings(full["runs"])
    assert norms(found["runs"]) == norms(full["runs"])
    assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def norms(runs) -> set[str]:
    """The norms, placements and scalings that are compared."""
    kinds = ("norm", "place", "scale", "gradient", "by", "way", "sizes")
    return {f"{k} {run.arm[k]}" for run in runs for k in kinds if k in run.arm}


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_verdict_follows_from_the_committed_runs(name):
    found = results.read(COMMITTED / f"{name}.json")
    again = results.verdict_of(__main__.load(name), found["runs"])
    assert not found["quick"]
    assert found["verdict"] == again["verdict"]
    for kind in ("rule", "beside"):
        assert found[kind].keys() == again[kind].keys()
        for key, judged in again[kind].items():
            kept = found[kind][key]
            assert kept["comparison"] == results.plain(judged["comparison"])
            assert kept["verdict"] == judged["verdict"]
            # Runs are kept to five digits, and differences of them to fewer.
            scale = 1e-4 * max(abs(kept["left"]), abs(kept["right"]))
            assert kept["difference"] == pytest.approx(judged["difference"], abs=scale)


@pytest.mark.parametrize("name", NAMES)
def test_each_experiment_has_small_files_and_a_page(name):
    numbers, figure = COMMITTED / f"{name}.json", FIGURES / f"{name}.svg"
    assert numbers.stat().st_size < 200_000
    assert figure.stat().st_size < 150_000
    text, found = pages.page(name), results.read(numbers)
    assert f"**{found['verdict'].capitalize()}.** {found['sentence']}" in text
    assert f"({name}.svg)" in text
    for judged in found["rule"].values():
        assert judged["comparison"]["says"] in text


def test_the_index_has_every_claim_and_its_page(tmp_path):
    pages.write(tmp_path)
    index = (tmp_path / "index.md").read_text()
    for name in NAMES:
        verdict = results.read(COMMITTED / f"{name}.json")["verdict"]
        assert f"]({name}.md) | {verdict} |" in index
        assert f"\n{name}\n" in index.split("toctree")[1]
        assert (tmp_path / f"{name}.md").exists()


def test_a_page_that_stays_is_not_written_again(tmp_path):
    pages.write(tmp_path)
    before = (tmp_path / "index.md").stat().st_mtime_ns
    pages.write(tmp_path)
    assert (tmp_path / "index.md").stat().st_mtime_ns == before


def test_errors_are_the_share_of_wrong_answers():
    labels = np.arange(12_000) % 4  # more than one test takes at once
    given = np.where(np.arange(12_000) < 9_000, labels, 9)
    inputs = np.eye(10, dtype=np.float32)[given]

    def net(params, stats, x, train):
        return 100 * x, stats

    fitted = fit.Fitted({}, {}, [])
    error, loss = fit.tested(net, fitted, data.split(inputs, labels))
    assert error == pytest.approx(25) and loss == pytest.approx(25, rel=1e-4)


def runs(left, right) -> list[Run]:
    """Final runs of two arms, one for each value."""
    arms = (("a", left), ("b", right))
    return [
        Run({"norm": arm, "width": 8}, seed, {"error": value})
        for arm, values in arms
        for seed, value in enumerate(values)
    ]


def compare(**limit) -> Comparison:
    return Comparison("a - b", "error", {"norm": "a"}, {"norm": "b"}, **limit)


@pytest.mark.parametrize(
    ("limit", "shift", "spread", "verdict"),
    [
        ({"more_than": 1.0}, 2.0, 0.1, "held"),
        ({"more_than": 1.0}, 0.5, 0.1, "did not hold"),
        ({"more_than": 1.0}, -2.0, 0.1, "did not hold"),
        ({"more_than": 1.0}, 1.5, 2.0, "open"),
        ({"less_than": 1.0}, 0.5, 0.1, "held"),
        ({"less_than": 1.0}, 2.0, 0.1, "did not hold"),
        ({"less_than": 1.0}, 1.5, 2.0, "open"),
    ],
)
def test_a_comparison_decides_by_the_whole_interval(limit, shift, spread, verdict):
    noise = spread * np.array([-1.0, 0.0, 1.0])
    # What both arms have in common does not count.
    common = np.array([10.0, 50.0, 30.0])
    judged = judge(compare(**limit), runs(common + shift + noise, common))
    assert judged.verdict == verdict
    assert judged.difference == pytest.approx(shift)
    assert judged.left - judged.right == pytest.approx(shift)


def test_the_interval_is_that_of_student():
    values = np.random.default_rng(0).normal(size=7)
    mean, low, high = interval([*values])
    t = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((t.low, t.high))
    assert mean == pytest.approx(values.mean())


def test_one_run_has_no_interval_and_equal_ones_have_no_width():
    assert interval([3.0]) == (3.0, -math.inf, math.inf)
    assert interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)
    assert judge(compare(more_than=0.0), runs([3.0], [1.0])).verdict == "open"


def test_a_diverged_run_leaves_a_comparison_open():
    assert (
        judge(compare(more_than=0.0), runs([math.nan, 3.0], [1, 1])).verdict == "open"
    )


def test_seeds_must_match():
    with pytest.raises(ValueError, match="seeds of both sides differ"):
        judge(compare(more_than=0.0), runs([1.0, 2.0], [1.0]))
    with pytest.raises(ValueError, match="0 runs of 0 seeds have"):
        judge(compare(more_than=0.0), runs([1.0], []))
    doubled = runs([1.0, 2.0], [1.0, 2.0]) * 2
    with pytest.raises(ValueError, match="4 runs of 2 seeds have"):
        judge(compare(more_than=0.0), doubled)


def test_a_comparison_has_one_limit():
    with pytest.raises(ValueError, match="more_than or less_than"):
        compare()


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["held", "held"], "held"),
        (["held", "open"], "open"),
        (["open", "did not hold"], "did not hold"),
    ],
)
def test_a_claim_is_held_if_all_comparisons_are(verdicts, expected):
    assert combined(verdicts) == expected


def test_an_arm_runs_at_its_best_rate():
    def train(rate, seed):
        return {"validation": abs(rate - 0.3), "error": seed}, []

    found = tuned({"norm": "a"}, train, (0.1, 0.3, 1.0), range(2))
    assert [run.arm["rate"] for run in found] == [0.1, 0.3, 1.0, 0.3, 0.3]
    assert [run.seed for run in found] == [SWEEP_SEED] * 3 + [0, 1]
    assert [run.is_of({"norm": "a"}) for run in found] == [False] * 3 + [True] * 2
    assert found[0].stage == SWEEP


def test_a_curve_is_thinned_to_means():
    assert thinned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert thinned([1.0], 20) == [1.0]


def test_numbers_that_are_not_finite_are_read_back(tmp_path):
    run = Run({"norm": "a"}, 0, {"loss": math.nan, "error": 12.3456789})
    found = results.plain({"runs": [vars(run)], "verdict": "open"})
    results.write(found, tmp_path / "a.json")
    read = results.read(tmp_path / "a.json")["runs"][0]
    assert math.isnan(read.metrics["loss"])
    assert read.metrics["error"] == 12.346


def test_orders_see_all_data_once_before_any_again():
    rows = list(fit.orders(seed=0, size=10, batch=3, steps=6))
    assert len(set(np.concatenate(rows[:3]))) == 9
    assert not np.array_equal(rows[0], rows[3])
    again = list(fit.orders(seed=0, size=10, batch=3, steps=6))
    assert np.array_equal(rows, again)


def test_a_net_that_diverged_answers_by_chance():
    net = Linear()
    fitted = fit.Fitted({"weight": np.full((1, 2), np.nan, np.float32)}, {}, [])
    split = data.split(np.ones((4, 1)), np.zeros(4))
    error, loss = fit.tested(net, fitted, split)
    assert (error, math.isnan(loss)) == (90.0, True)


class Linear:
    def __call__(self, params, stats, x, train):
        return x @ params["weight"], stats


def test_an_idx_file_is_read_by_its_own_shape(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    head = bytes([0, 0, 8, 3]) + np.array(values.shape, ">i4").tobytes()
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(head + values.tobytes()))
    assert np.array_equal(data.read_idx(path), values)


@pytest.mark.parametrize(
    ("name", "words"), [("depth", "dataset-fashion-mnist"), ("padding", "aeon")]
)
def test_missing_data_are_one_line_that_says_what_brings_them(
    name, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(data, "aeon_folders", lambda: iter(()))
    with pytest.raises(SystemExit) as stopped:
        __main__.main([name, "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert words in line and str(tmp_path) in line and "--data-dir" in line


def test_utterances_are_read_with_their_lengths(monkeypatch):
    text = "@problemName x\n@data\n" + ":".join(["1,2,3"] * 12) + ":4\n"
    monkeypatch.setattr(data, "vowels_text", lambda *_: text)
    sequences = data.read_vowels(None, "TRAIN")
    assert sequences.inputs.shape == (1, 29, 12)
    assert sequences.lengths.tolist() == [3] and sequences.labels.tolist() == [3]
    assert sequences.inputs[0, :4, 5].tolist() == [1, 2, 3, 0]
    assert sequences.padded(40).inputs.shape == (1, 40, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "which one"),
        (["no_such"], "invalid choice"),
        (["depth", "--data", "wine"], "runs on fashion or digits"),
        (["depth", "--seeds", "1"], "at least 2"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(options)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_the_list_names_every_experiment(capsys):
    assert __main__.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*NAMES]


def test_quick_runs_leave_the_committed_results_alone():
    assert not {*__main__.places(None, quick=True)} & {COMMITTED, FIGURES}
    assert __main__.places(None, quick=False) == (COMMITTED, FIGURES)
    assert __main__.places(Path("x"), quick=False) == (Path("x"), Path("x"))


def test_a_quick_run_is_a_twentieth():
    quick = Options("digits", quick=True)
    assert (quick.steps(400), quick.steps(10)) == (20, 2)
    assert (quick.seed_range(5), quick.rates((1, 2, 3))) == (range(1), (2,))
    assert Options("digits").seed_range(5) == range(5)
    assert Options("digits", seeds=7).seed_range(5) == range(7)
