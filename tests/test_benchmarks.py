"""The comparison with other libraries: it runs, checks what it times, and reports."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # as where Python runs one of them

cases = importlib.import_module("cases")
comparison = importlib.import_module("comparison")
measure = importlib.import_module("measure")
peers = importlib.import_module("peers")
report = importlib.import_module("report")
running_statistics = importlib.import_module("running_statistics")
timing = importlib.import_module("timing")

BATCH = cases.Case(cases.BATCH, (8, 4))


def run(out, *options):
    command = [sys.executable, str(FOLDER / "against_peers.py"), "--out", str(out)]
    command += ["--quick", "--rounds", "1", *options]
    return subprocess.run(command, capture_output=True, text=True)


def text_of(out):
    """The table, without what aligns its cells."""
    return re.sub(" +", " ", (out / "against_peers.md").read_text())


def test_a_quick_run_beside_flax_writes_the_table_the_data_and_the_figures(tmp_path):
    only = "^(batch norm, 16|layer norm, 16.*float32|synchronized.* 8 devices)"
    done = run(tmp_path, "--only", only, "--libraries", "flax_linen")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "against_peers.json").read_text())["rows"]
    assert {row["library"] for row in rows} == {"jaxnorm", "flax.linen"}
    assert {row["op"] for row in rows} == {cases.BATCH, cases.LAYER, cases.SYNCED}
    assert {row["devices"] for row in rows if row["op"] == cases.SYNCED} == {8}
    assert not [row["note"] for row in rows if "note" in row]
    assert all(row["milliseconds"][0] > 0 for row in rows)
    assert all(row["residual_bytes"] > 0 for row in rows)
    table = text_of(tmp_path)
    assert "| layer norm | forward and gradient | **" in table
    assert (tmp_path / "ratios.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "no such case"], "finds no case"),
        (["--only", "("], "is no regular expression"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--libraries", "numpy"], "invalid choice"),
    ],
)
def test_options_that_cannot_be_used_are_refused(tmp_path, options, words):
    done = run(tmp_path, *options)
    assert done.returncode == 2
    assert words in done.stderr


# ---- What is timed is the same work ------------------------------------------------


def peer(name, results):
    """A library that computes `results`, or raises them."""

    def model(case):
        if isinstance(results, Exception):
            raise results
        calls = {work: lambda: None for work in ("forward", measure.GRADIENT)}
        return peers.Program(calls, lambda: results, {"compile_seconds": 1.0})

    return peers.Peer(name, name, "", {}, model, {cases.BATCH: model})


def found(*others, case=BATCH):
    ours = peer("jaxnorm", {"y": np.ones(4), "gradient of bias": np.ones(4)})
    rows = measure.rows(case, [ours, *others], rounds=1)
    return {row["library"]: row for row in rows}


def test_equal_results_are_timed():
    row = found(peer("same", {"y": np.ones(4) + 1e-6}))["same"]
    assert "note" not in row
    assert row["milliseconds"][0] >= 0


@pytest.mark.parametrize("wrong", [1.001, np.nan])
def test_other_results_are_not_timed(wrong):
    row = found(peer("other", {"y": np.full(4, wrong)}))["other"]
    assert "y differs by" in row["note"]
    assert "milliseconds" not in row


def test_only_gradients_of_parameters_may_be_rough_in_bfloat16():
    case = BATCH._replace(dtype="bfloat16")
    rough = found(peer("rough", {"gradient of bias": np.full(4, 1.2)}), case=case)
    assert rough["rough"]["note"].startswith("rough: gradient of bias differs by 2e-01")
    assert "milliseconds" in rough["rough"]
    other = found(peer("rough", {"y": np.full(4, 1.2)}), case=case)
    assert "milliseconds" not in other["rough"]


def test_what_a_library_lacks_or_fails_at_is_said():
    rows = found(
        peer("lacks", peers.Unsupported("has no such norm")),
        peer("fails", TypeError("no such argument\nand more")),
    )
    assert rows["lacks"]["note"] == "has no such norm"
    assert rows["fails"]["note"] == "fails: TypeError: no such argument"


def test_libraries_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "haiku", None)  # what makes its import fail
    monkeypatch.delitem(sys.modules, "peers.haiku", raising=False)
    libraries, missing = peers.load(["jaxnorm", "haiku"])
    assert [library.name for library in libraries] == ["jaxnorm"]
    assert missing == {"haiku": "haiku is not installed"}


def test_every_library_has_every_norm_or_says_why_not():
    libraries, _ = peers.load()
    for library in libraries:
        assert library.norms.keys() == set(cases.NORMS), library.name


# ---- The report --------------------------------------------------------------------


def row(library, work="forward", milliseconds=None, **more):
    common = {"library": library, "case": BATCH.name, **BATCH._asdict()}
    common |= {"input_bytes": 128, "copy_bytes_per_second": 1e9} | more
    if milliseconds is not None:
        common |= {"work": work, "milliseconds": 3 * [milliseconds]}
    return common


def test_the_report_gives_ratios_the_floor_and_notes(tmp_path):
    rows = [
        row("jaxnorm", milliseconds=2.0, floor_milliseconds=1.6, compile_seconds=0.5),
        row("faster", milliseconds=1.0, compile_seconds=0.25),
        row("lacking", note="has no such norm"),
    ]
    known = {"date": "2000-01-01", "command": "python", "cpu": "CPU", "cores": 2}
    known |= {"system": "Linux", "versions": {"jax": "1"}}
    whole = {"environment": known, "missing": {"torch": "torch is not installed"}}
    whole |= {"import_seconds": {"jax": 1.0, "jaxnorm": 2.0}, "rows": rows}
    report.write(whole, tmp_path)
    text = text_of(tmp_path)
    assert "torch is left out: torch is not installed." in text
    assert "| 8x4 float32 | forward | 0.50 | - [1] | 1.25 |" in text
    assert "1. lacking: has no such norm." in text
    assert "| batch norm | forward | **0.50** (0.50 to 0.50) | - |" in text
    assert "| jax | 1.00 | 0.50 |" in text
    before = text
    report.render(tmp_path)  # from the data alone
    assert text_of(tmp_path) == before


def test_ratios_have_a_geometric_mean():
    rows = [
        row("jaxnorm", milliseconds=2.0, case=case) | {"sweep": ""} for case in "abc"
    ]
    rows += [row("peer", milliseconds=v, case=c) for c, v in (("a", 1.0), ("b", 8.0))]
    text = "\n".join(report.summary(comparison.Comparison(rows)))
    assert "**1.41** (0.50 to 4.00)" in text


def test_scaling_is_drawn_from_where_jaxnorm_begins(tmp_path):
    rows = [
        row("jaxnorm", milliseconds=2.0 * n, sweep="batch", shape=(n, 4), case=str(n))
        for n in (1, 2, 4)
    ]
    figure = importlib.import_module("figures").scaling(comparison.Comparison(rows))
    [line] = figure.axes[0].get_lines()
    assert line.get_xdata() == pytest.approx([1, 2, 4])
    assert line.get_ydata() == pytest.approx([1, 2, 4])


# ---- The parts ---------------------------------------------------------------------


def test_calls_take_turns_and_the_first_rounds_do_not_count():
    count = {"a": 0, "b": 0}

    def call(name):
        count[name] += 1

    calls = {name: lambda name=name: call(name) for name in count}
    times = timing.samples(calls, rounds=3)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert count == {"a": 10, "b": 10}  # 5 rounds, each call once without timing


def test_short_calls_get_up_to_ten_times_the_rounds():
    times = timing.samples({"a": lambda: None}, rounds=2, seconds=10.0)
    assert len(times["a"]) == 20


def test_the_floor_counts_the_arrays_that_must_move():
    floor = importlib.import_module("floor")
    assert floor.bytes_moved(BATCH, "forward") == 3 * BATCH.input_bytes
    assert floor.bytes_moved(BATCH, measure.GRADIENT) == 8 * BATCH.input_bytes
    layer = cases.Case(cases.LAYER, (8, 4), "bfloat16")
    assert floor.bytes_moved(layer, measure.GRADIENT) == 5 * 8 * 4 * 2


def test_names_of_cases_are_distinct():
    for small in (False, True):
        names = [case.name for case in cases.select(small, "")]
        assert len(names) == len(set(names))


def test_running_statistics_are_compared_with_the_exact_ones(tmp_path, monkeypatch):
    out = tmp_path / "table.md"
    options = ["--libraries", "jaxnorm", "--scale", "1000", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["running_statistics.py", *options])
    running_statistics.main()
    head, _, *body = [line for line in out.read_text().splitlines() if "|" in line]
    assert head == "| Stream | jaxnorm |"
    assert len(body) == 9
    for line in body:
        found = line.split("|")[2].split(",")
        assert len(found) == 2 and all(float(v) < 1e-5 for v in found), line
