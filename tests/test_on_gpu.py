"""The measurement on a GPU: all of it that can be tried without one."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))  # as where Python runs one of them

decide = importlib.import_module("gpu.decide")
on_gpu = importlib.import_module("on_gpu")
plan = importlib.import_module("gpu.plan")
summary = importlib.import_module("gpu.summary")
work = importlib.import_module("gpu.work")
defaults = importlib.import_module("jaxnorm._kernels.defaults")

DEVICE = "NVIDIA H200"


def run(*options):
    command = [sys.executable, str(FOLDER / "on_gpu.py"), *map(str, options)]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | quick
    )


def test_a_dry_run_walks_through_every_phase(tmp_path):
    done = run("--dry-run", "--out", tmp_path, "--seconds", 900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "on_gpu.json").read_text())
    assert found["dry_run"] and not found["not_run"]
    missing = ("No module named 'liger_kernel'", "No module named 'torch'")
    problems = [p["problem"] for p in found["problems"]]
    assert not [p for p in problems if not p.endswith(missing)]
    assert {"copy", "read", "write", "launch_us"} < found["ceilings"].keys()
    assert all(check["ok"] for check in found["checks"])
    kinds = {(c["pattern"], c["by_kernel"]) for c in found["checks"]}
    assert {("rows", True), ("columns", True)} <= kinds
    ours = [t for t in found["times"] if t["impl"] in ("flax", "xla", "triton")]
    assert {(t["mode"], t["impl"]) for t in ours} >= {
        (mode, impl)
        for mode in ("both", "both, skip", "backward", "inference")
        for impl in ("flax", "xla", "triton")
    }
    assert not [t for t in ours if "us" not in t]
    assert {s["impl"] for s in found["steps"]} == {"flax", "xla", "triton"}
    assert all(step["agrees"] for step in found["steps"])
    assert {s["pattern"] for s in found["sweep"]} == {"rows", "columns"}
    assert done.stdout == (tmp_path / "on_gpu.md").read_text()
    assert len(done.stdout.splitlines()) <= summary.LINES

    known = tmp_path / "defaults.json"
    known.write_text("{}\n")
    to = ["--tables", tmp_path / "tables", "--defaults", known]
    reported = run("--report", tmp_path / "on_gpu.json", *to)
    assert reported.stdout == done.stdout
    assert (tmp_path / "tables" / "on_gpu_cpu.md").read_text() == done.stdout
    assert known.read_text() == "{}\n"  # of a dry run nothing follows


# ---- What a deadline or a fault leaves ---------------------------------------------


def row_item(name, *builds):
    return work.Item(name, lambda *built: [{"name": name, "built": built}], builds)


def test_items_after_the_deadline_are_left_out():
    assert list(work.results([row_item("late")], time.time() - 1)) == []


def test_what_an_item_raises_is_said_and_the_next_one_runs():
    def fails():
        raise ValueError("no such shape\nand more")

    items = [row_item("first", fails), row_item("second", lambda: 1, lambda: 2)]
    first, _, second, _ = work.results(items, math.inf)
    assert first == {"item": "first", "problem": "ValueError: no such shape"}
    assert second == {"row": {"name": "second", "built": (1, 2)}}


def test_nothing_follows_a_lost_gpu():
    def fails():
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    items = [row_item("first", fails), row_item("second")]
    assert [line.get("done") for line in work.results(items, math.inf)] == [
        None,
        "first",
    ]


def test_what_a_phase_did_not_come_to_is_listed(tmp_path):
    lines = tmp_path / "times.jsonl"
    found = [{"planned": ["a", "b"]}, {"row": {"norm": "LN"}}, {"done": "a"}]
    cut_off = '{"row": {"norm": "cut o'
    lines.write_text("\n".join([*map(json.dumps, found), cut_off]))
    results = {"times": [], "problems": [], "not_run": []}
    on_gpu._gather(results, "times", lines)
    assert results == {
        "times": [{"norm": "LN"}],
        "problems": [],
        "not_run": ["times: b"],
    }


def test_a_phase_that_does_not_start_is_a_problem(tmp_path):
    lines = tmp_path / "times.jsonl"
    lines.with_suffix(".log").write_text("ImportError: no such thing")
    results = {"times": [], "problems": [], "not_run": []}
    on_gpu._gather(results, "times", lines)
    assert results["not_run"] == ["times: all"]
    assert "ImportError" in results["problems"][0]["problem"]


def test_a_backend_that_fails_a_check_is_not_timed():
    both = ("triton", "mosaic")
    found = results(backends=both)
    assert on_gpu._right(found, both) == both
    found["not_run"] = ["checks: mosaic rows, the last ones"]
    assert on_gpu._right(found, both) == both
    found["problems"] = [{"item": "mosaic rows, first", "problem": "RuntimeError: no"}]
    assert on_gpu._right(found, both) == ("triton",)
    found["checks"] = [c for c in found["checks"] if c["backend"] == "mosaic"]
    assert on_gpu._right(found, both) == ()


@pytest.mark.parametrize("kept", ["ceilings", "versions", "times", "checks", "steps"])
def test_a_page_is_made_of_whatever_there_is(kept, tmp_path):
    found = results()
    empty = {k: type(v)() for k, v in found.items() if isinstance(v, list | dict)}
    on_gpu._write(tmp_path, found | empty | {kept: found[kept]})
    assert (tmp_path / "on_gpu.md").read_text().startswith("# Norms on NVIDIA H200")


def test_numbers_that_json_does_not_have_are_null():
    found = work.finite({"error": math.inf, "us": [1.0, math.nan], "n": (2, "inf")})
    assert found == {"error": None, "us": [1.0, None], "n": [2, "inf"]}


# ---- From results to defaults ------------------------------------------------------


ROWS, MAPS = plan.FULL.main_rows + plan.FULL.more_rows, plan.FULL.maps


def timed(norm, shape, dtype, **us):
    return [
        {
            "norm": norm,
            "mode": "both",
            "shape": list(shape),
            "dtype": dtype,
            "impl": impl,
            "us": [value, value * 1.004],
            "wall_us": value,
            "by_kernel": impl in ("triton", "mosaic"),
        }
        for impl, value in us.items()
    ]


def results(ratio=lambda shape: 0.75, backends=("triton",), dtypes=("bfloat16",)):
    """Of a run in which kernels take `ratio` of XLA's time."""
    cases = [("LN", v) for v in ROWS] + [("GN + SiLU", v) for v in MAPS]
    times, checks, steps = [], [], []
    for norm, shape in cases:
        for dtype in dtypes:
            us = {"xla": 100.0} | {b: 100 * ratio(shape) for b in backends}
            times += timed(norm, shape, dtype, **us)
    for backend in backends:
        for pattern in ("rows", "columns"):
            check = {"pattern": pattern, "backend": backend, "ok": True}
            check |= {"by_kernel": True, "fits": True, "case": "any", "shape": [1, 1]}
            checks.append(check | {"dtype": "float32", "quantity": "dx"})
            checks[-1] |= {"error": 1e-7, "limit": 1e-6, "repeatable": True}
    for step in ("4 blocks, RMSNorm, scan", "U-Net level (16, 64, 64, 320)"):
        for impl in ("flax", "xla", *backends):
            row = {"step": step, "impl": impl, "agrees": True, "ms": 10.0}
            steps.append(row | {"peak_bytes": 1000})
    ceilings = {"copy": 4300, "read": 4000, "write": 3000, "launch_us": 2}
    return {
        "device": DEVICE,
        "dry_run": False,
        "versions": {"jax": "0.11.2"},
        "ceilings": ceilings | {"by_cupti": True},
        "seconds": {"times": 150.0},
        "checks": checks,
        "times": times,
        "steps": steps,
        "sweep": [],
        "not_run": [],
        "problems": [],
    }


def boxes(found):
    return {box["pattern"]: box for box in decide.defaults(found)}


def test_kernels_that_are_faster_everywhere_are_the_default_everywhere():
    found = boxes(results())
    widths, sizes = [s[-1] for s in ROWS], [2 * math.prod(s) for s in ROWS]
    rows = {"backend": "triton", "dtypes": ["bfloat16"], "pattern": "rows"}
    rows |= {"features": [min(widths), max(widths)], "least_bytes": min(sizes)}
    assert found["rows"] == rows
    assert found["columns"]["features"] == [128, 1280]


def test_a_shape_at_which_they_are_slower_is_in_no_box():
    slow = (262144, 128)
    found = boxes(results(lambda shape: 1.05 if shape == slow else 0.75))["rows"]
    assert found["features"] == [768, 8192]


def test_small_arrays_at_which_they_are_slower_are_in_no_box():
    slow = (512, 4096)
    found = boxes(results(lambda shape: 1.05 if shape == slow else 0.75))["rows"]
    assert found["features"] == [128, 8192]
    assert found["least_bytes"] > 2 * math.prod(slow)


def test_three_of_four_main_shapes_decide():
    main = plan.FULL.main_rows

    def faster_at(count):
        chosen = main[:count]
        return results(lambda shape: 0.75 if shape in chosen else 1.0)

    assert "rows" in boxes(faster_at(3))
    assert "rows" not in boxes(faster_at(2))


def test_what_is_faster_by_less_than_the_noise_is_no_default():
    found = results(lambda shape: 0.93)
    assert "rows" in boxes(found)
    for row in found["times"]:
        row["us"] = [row["us"][0] * 0.98, row["us"][0] * 1.02]
    assert boxes(found) == {}


def test_a_failed_check_is_no_default():
    found = results()
    found["checks"] += [found["checks"][0] | {"ok": False}]
    assert boxes(found).keys() == {"columns"}


def test_a_check_that_raises_is_no_default():
    found = results()
    found["problems"] = [{"item": "triton rows, first", "problem": "RuntimeError: no"}]
    assert boxes(found).keys() == {"columns"}


def test_checks_and_times_without_a_kernel_decide_nothing():
    found = results()
    found["checks"][0]["by_kernel"] = False
    assert boxes(found).keys() == {"columns"}
    found = results()
    for row in found["times"]:
        if row["shape"][-1] == 8192:
            row["by_kernel"] = False
    assert boxes(found)["rows"]["features"] == [128, 5120]


def test_checks_that_were_not_run_are_no_checks():
    found = results()
    found["not_run"] = ["checks: triton rows, layer_norm, jit"]
    assert boxes(found).keys() == {"columns"}


def test_steps_that_were_not_run_are_no_steps():
    found = results()
    found["not_run"] = ["steps: step of 4 blocks, LayerNorm, unrolled"]
    assert boxes(found).keys() == {"columns"}


@pytest.mark.parametrize(
    "change", [{"ms": 10.06}, {"peak_bytes": 1011}, {"agrees": False}]
)
def test_training_steps_must_not_suffer(change):
    found = results()
    for step in found["steps"]:
        if step["impl"] == "triton" and "blocks" in step["step"]:
            step |= change
    assert boxes(found).keys() == {"columns"}


def test_the_smallest_array_must_not_be_slower_by_the_clock():
    found = results()
    for row in found["times"]:
        if row["shape"] == [512, 4096] and row["impl"] == "triton":
            row["wall_us"] = 103.0
    assert boxes(found)["rows"]["least_bytes"] > 2 * 512 * 4096


def test_another_dtype_has_a_box_where_it_was_timed_and_is_faster():
    found = results()
    shape = ROWS[0]
    found["times"] += timed("LN", shape, "float32", xla=100.0, triton=75.0)
    usual, other, _ = decide.defaults(found)
    assert usual["dtypes"] == ["bfloat16"] and usual["features"] == [128, 8192]
    assert other == usual | {
        "dtypes": ["float32"],
        "features": [shape[-1]] * 2,
        "least_bytes": 4 * math.prod(shape),
    }
    found["times"][-1]["us"] = [98.0, 98.0]
    assert len(decide.defaults(found)) == 2


@pytest.mark.parametrize(
    ("jax", "mosaic", "chosen"),
    [
        ("0.11.2", 75.0, "triton"),
        ("0.13.0", 75.0, "mosaic"),
        ("0.11.2", 70.0, "mosaic"),
        ("0.13.0", 80.0, "triton"),
    ],
)
def test_one_of_two_backends_is_the_default(jax, mosaic, chosen):
    found = results(backends=("triton", "mosaic"))
    found["versions"]["jax"] = jax
    for row in found["times"]:
        if row["impl"] == "mosaic":
            row["us"] = [mosaic, mosaic]
    assert {box["backend"] for box in boxes(found).values()} == {chosen}


def test_the_report_replaces_the_boxes_of_its_device_alone(tmp_path):
    known = tmp_path / "defaults.json"
    known.write_text(json.dumps({"NVIDIA H100": [], DEVICE: ["old"]}))
    on_gpu.report(results(), tmp_path, known)
    found = json.loads(known.read_text())
    assert found["NVIDIA H100"] == []
    parsed = defaults.parsed(found)[DEVICE]
    assert {box.pattern for box in parsed} == {"rows", "columns"}
    on_gpu.report(results(lambda shape: 1.0), tmp_path, known)
    assert json.loads(known.read_text()).keys() == {"NVIDIA H100"}


# ---- The page ----------------------------------------------------------------------


def test_predictions_that_are_missed_are_said():
    found = results()
    found["times"] = timed("LN", (8192, 4096), "bfloat16", triton=0.69 * 131, xla=200.0)
    text = summary.markdown(found)
    assert "- predicted 122 us, measured 200: LN 8192x4096, xla" in text
    assert text.count("predicted") == 1


def test_the_page_is_short_and_says_what_it_leaves_out():
    lines = summary.markdown(results()).splitlines()
    assert len(lines) <= summary.LINES
    found = results()
    for k in range(80):
        found["times"] += timed("LN", (k + 1, 128), "bfloat16", xla=1.0)
    lines = summary.markdown(found).splitlines()
    assert len(lines) == summary.LINES
    assert "lines more: all is in the JSON file" in lines[-1]
