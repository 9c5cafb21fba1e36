"""The results of a run as a page of at most sixty lines."""

import statistics
from collections.abc import Iterator
from typing import Any

from gpu.decide import decisions
from gpu.predicted import MISSED, PREDICTED, factor

LINES = 60
COLUMNS = ("flax", "xla", "triton", "mosaic", "jax.pallas", "torch")
COLUMNS += ("torch.compile", "liger")
MODES = ("both", "both, skip", "both, add", "backward", "inference")

Row = Results = dict[str, Any]


def markdown(results: Results) -> str:
    """Parts in order of weight; what does not fit is counted in the last line."""
    lines = [*_head(results), *_checks(results), *_missed(results)]
    lines += [*_decisions(results), *_sweep(results), "", *_steps(results), ""]
    lines += _times(results)
    if len(lines) > LINES:
        left = len(lines) - LINES + 1
        lines = [*lines[: LINES - 1], f"({left} lines more: all is in the JSON file)"]
    return "\n".join(lines) + "\n"


def _head(results: Results) -> Iterator[str]:
    versions = results["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items() if v != "not installed")
    yield f"# Norms on {results['device']}"
    yield ""
    if results["dry_run"]:
        yield "A dry run, of interpreted kernels on a CPU: its times mean nothing."
    yield f"{named}."
    found = results["ceilings"]
    if {"copy", "read", "write", "launch_us", "by_cupti"} <= found.keys():
        bandwidth = [f"{k} {found[k]:.0f} GB/s" for k in ("copy", "read", "write")]
        clock = "CUPTI" if found["by_cupti"] else "the clock, of queued calls"
        yield f"{', '.join(bandwidth)}; launch {found['launch_us']:.1f} us; by {clock}."
    seconds = (f"{k} {v:.0f}" for k, v in results["seconds"].items())
    yield f"Seconds: {', '.join(seconds)}. Not run: {len(results['not_run'])} items."


def _checks(results: Results) -> Iterator[str]:
    for backend in dict.fromkeys(c["backend"] for c in results["checks"]):
        own = [c for c in results["checks"] if c["backend"] == backend]
        wrong = [c for c in own if not c["ok"]]
        passed, kernels = len(own) - len(wrong), sum(c["by_kernel"] for c in own)
        yield f"{backend}: {passed} of {len(own)} checks pass, {kernels} by kernels."
        for c in wrong[:3]:
            same = "" if c["repeatable"] else ", repeats differ"
            yield (
                f"- {c['case']}, {c['dtype']} {c['shape']}, {c['quantity']}: "
                f"{_error(c)} (limit {c['limit']:.1e}){same}"
            )
    for problem in results["problems"][:3]:
        yield f"- {problem['item']}: {problem['problem'][:120]}"


def _error(check: Row) -> str:
    if check["by_kernel"] != check["fits"]:
        return "a kernel fits and did not run" if check["fits"] else "no kernel fits"
    return "not finite" if check["error"] is None else f"{check['error']:.1e}"


def _missed(results: Results) -> Iterator[str]:
    """Times that are not as predicted."""
    scale = factor(results["device"])
    for t in results["times"]:
        key = t["norm"], t["mode"], tuple(t["shape"]), t["impl"]
        if scale is None or key not in PREDICTED or "us" not in t:
            continue
        expected, found = PREDICTED[key] * scale, statistics.mean(t["us"])
        if t["dtype"] == "bfloat16" and abs(found / expected - 1) > MISSED:
            name = f"{t['norm']} {_shape(t)}, {t['impl']}"
            yield f"- predicted {expected:.0f} us, measured {found:.0f}: {name}"


def _decisions(results: Results) -> Iterator[str]:
    for d in decisions(results):
        yield f"{d.pattern}, {d.backend}: {list(d.boxes) or 'no default'} ({d.why})"


def _sweep(results: Results) -> Iterator[str]:
    """The best sizes at each shape, beside those that the kernel has."""
    shapes: dict[str, list[Row]] = {}
    for row in results["sweep"]:
        shapes.setdefault(f"{row['pattern']} {_shape(row)}", []).append(row)
    for name, rows in shapes.items():
        usual = [r["us"] for r in rows if r["setting"] is None]
        best = min(rows, key=lambda r: r["us"])
        if usual and best["setting"] is not None:
            faster = f"{best['us']:.0f} us at {best['setting']}"
            yield f"- sizes of {name}: {faster}, {usual[0]:.0f} as they are"


def _steps(results: Results) -> Iterator[str]:
    yield from _table(results["steps"], lambda s: s["step"], lambda s: s["ms"], "ms")


def _times(results: Results) -> Iterator[str]:
    order = {mode: k for k, mode in enumerate(MODES)}
    timed = sorted(results["times"], key=lambda t: order[t["mode"]])

    def name(t: Row) -> str:
        dtype = "" if t["dtype"] == "bfloat16" else f" {t['dtype']}"
        return f"{t['norm']}, {t['mode']}, {_shape(t)}{dtype}"

    yield from _table(timed, name, lambda t: statistics.mean(t["us"]), "us")


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def _table(rows: list[Row], name: Any, value: Any, unit: str) -> Iterator[str]:
    """A line for each name, a column for each library, in its unit."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = "-" if "problem" in row else f"{value(row):.4g}"
        found.setdefault(name(row), {})[row["impl"]] = cell
    used = [c for c in COLUMNS if any(c in cells for cells in found.values())]
    if not found:
        return
    yield f"| {unit} | {' | '.join(used)} |"
    yield "|---" * (len(used) + 1) + "|"
    for key, cells in found.items():
        yield f"| {key} | {' | '.join(cells.get(c, '-') for c in used)} |"
