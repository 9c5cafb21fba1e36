"""Checks and times the kernels for GPUs on the GPU at hand, beside other libraries.

    python benchmarks/on_gpu.py --seconds 540 --out FOLDER
    python benchmarks/on_gpu.py --report FOLDER/on_gpu.json

Each phase is a process of its own, which ends at its deadline, and what it has found is
in `on_gpu.json` and `on_gpu.md` of the folder before the next one starts; what all of
them have printed is in `on_gpu.log`. A backend whose kernels fail a check is not timed.
`--report` needs no GPU: it writes the table to `benchmarks/results`, and where kernels
are the default, by the rule in `gpu/decide.py`, to `jaxnorm/_kernels/defaults.json`.
`--dry-run` walks through all of it on a CPU, with tiny arrays and Triton's kernels
interpreted; its times mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu import decide, summary, work
from gpu.plan import Settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULTS = ROOT / "jaxnorm" / "_kernels" / "defaults.json"
BACKENDS = ("triton", "mosaic")
GRACE = 20  # seconds, for what cannot be interrupted
# What share of the time has passed when each phase has to end.
PHASES = {
    "ceilings": 0.04,
    "checks": 0.32,
    "times": 0.64,
    "torch_times": 0.7,
    "steps": 0.94,
    "sweep": 1.0,
}
# As the passes over memory are counted: so that a kernel's time is that of its program
# alone, whatever products beside it are tuned to. Training steps run as users' do.
UNTUNED = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    "--xla_gpu_enable_command_buffer="
)
TABLES = {"torch_times": "times"}  # which of the results a phase adds to

Results = dict[str, Any]


def run(out: Path, seconds: float, settings: Settings) -> Results:
    """All phases, and what they have found."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    results: Results = {"device": "unknown", "capability": "none", "versions": {}}
    results |= {"dry_run": settings.dry_run, "seconds": {}, "ceilings": {}}
    results |= {k: [] for k in ("checks", "times", "steps", "sweep", "cards")}
    results |= {k: [] for k in ("not_run", "problems")}
    begin = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for phase, share in PHASES.items():
            # Kernels are checked one backend at a time: none takes the other along.
            several = settings.backends if phase == "checks" else (None,)
            for k, backend in enumerate(several):
                began = time.time()
                own = settings._replace(backends=(backend,)) if backend else settings
                lines = Path(folder) / f"{phase}{k}.jsonl"
                end = begin + (share - begin) * (k + 1) / len(several)
                _child(phase, own, lines, start + end * seconds)
                _gather(results, phase, lines, backend or "")
                label = f"{phase} {backend}" if backend else phase
                results["seconds"][label] = time.time() - began
                _write(out, results)
                with (out / "on_gpu.log").open("a") as log:
                    log.write(f"==== {label}\n{lines.with_suffix('.log').read_text()}")
            begin = share
            if phase == "checks":
                settings = settings._replace(
                    backends=_right(results, settings.backends)
                )
    return results


def _child(phase: str, settings: Settings, lines: Path, deadline: float) -> None:
    """A phase in a process of its own, killed if it does not end."""
    command = [sys.executable, __file__, "--phase", phase, "--out", str(lines)]
    command += ["--seconds", str(deadline), "--backends", *settings.backends]
    command += ["--dry-run"] if settings.dry_run else []
    environment = dict(os.environ)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    # PyTorch, in a phase of its own, finds the memory free; and so does each child.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if settings.dry_run:
        environment["JAX_PLATFORMS"] = "cpu"
    elif phase in ("times", "sweep"):
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {UNTUNED}"
    with lines.with_suffix(".log").open("w") as log:
        try:
            subprocess.run(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                timeout=max(1, deadline - time.time()) + GRACE,
            )
        except subprocess.TimeoutExpired:
            log.write("killed after its deadline\n")


def _gather(results: Results, phase: str, lines: Path, backend: str = "") -> None:
    """Adds the lines of a phase to the results, and what it has not come to."""
    planned, done = [], set()
    text = lines.read_text() if lines.exists() else ""
    for line in filter(None, text.splitlines()):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off where the process was killed
        if "planned" in found:
            planned = found["planned"]
        elif "done" in found:
            done.add(found["done"])
        elif "problem" in found:
            results["problems"].append(found)
        else:
            _add(results, phase, found["row"])
    if not planned and not done and "planned" not in text:
        log = lines.with_suffix(".log").read_text().splitlines()
        problem = " ".join(log[-3:]) or "it did not start"
        results["problems"].append({"item": f"{backend} {phase}", "problem": problem})
        results["not_run"].append(f"{phase}: {backend or 'all'}")
    results["not_run"] += [f"{phase}: {name}" for name in planned if name not in done]


def _add(results: Results, phase: str, row: dict[str, Any]) -> None:
    if phase != "ceilings":
        results[TABLES.get(phase, phase)].append(row)
    elif "ceiling" in row:
        results["ceilings"][row["ceiling"]] = row["value"]
    elif "card_after" in row:
        results["cards"].append(row["card_after"])
    else:
        results["cards"].append(row.pop("card"))
        results |= row


def _right(results: Results, backends: tuple[str, ...]) -> tuple[str, ...]:
    """Those of which no check has failed, and some has run."""
    ran = {c["backend"] for c in results["checks"]}
    complete = results | {"not_run": []}  # enough to be timed
    return tuple(b for b in backends if b in ran and not decide.wrong(complete, b))


def _write(out: Path, results: Results) -> None:
    (out / "on_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        text = summary.markdown(results)
    except Exception as error:  # the run goes on: what it has found is kept
        text = f"No page: {type(error).__name__}: {error}\n"
    (out / "on_gpu.md").write_text(text)


def report(results: Results, table_folder: Path, defaults: Path) -> None:
    """The table of a run, and the defaults for its device; a dry run has none."""
    table_folder.mkdir(parents=True, exist_ok=True)
    device = results["device"].replace(" ", "_").lower()
    (table_folder / f"on_gpu_{device}.md").write_text(summary.markdown(results))
    if results["dry_run"]:
        return
    known = json.loads(defaults.read_text())
    boxes = decide.defaults(results)
    known = {k: v for k, v in known.items() if k != results["device"]}
    known |= {results["device"]: boxes} if boxes else {}
    defaults.write_text(json.dumps(known, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="for all phases")
    parser.add_argument("--out", type=Path, default=Path("on_gpu"), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny arrays")
    parser.add_argument("--backends", nargs="*", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--report", type=Path, metavar="FILE", help="of an earlier run")
    parser.add_argument("--tables", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--defaults", type=Path, default=DEFAULTS, metavar="FILE")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    backends = ("triton",) if args.dry_run else tuple(args.backends)
    settings = Settings(args.dry_run, backends)
    if args.phase:
        work.main(args.phase, settings, args.out, args.seconds)
    elif args.report:
        results = json.loads(args.report.read_text())
        report(results, args.tables, args.defaults)
        print(summary.markdown(results), end="")
    else:
        run(args.out, args.seconds, settings)
        print((args.out / "on_gpu.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
