"""What is written of an experiment, and how is it read again?"""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from matplotlib.figure import Figure

from experiments.runs import Options, Run
from experiments.verdict import Comparison, Judged, combined, judge

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxnorm", "jax", "jaxlib", "optax", "numpy", "scipy", "scikit-learn")


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Claim(Protocol):
    """What the file of a claim holds. Its docstring is the text of its page."""

    __doc__: str | None
    DATA: Sequence[str]  # data sets it runs on, the usual one first
    RULE: Mapping[str, Comparison]  # the claim is held if all of these are
    BESIDE: Mapping[str, Comparison]  # shown, and deciding nothing
    SENTENCE: str  # with fields such as {name.left:.1f} of the comparisons

    def measure(self, options: Options) -> list[Run]: ...
    def tables(self, runs: Sequence[Run]) -> list[Table]: ...
    def draw(self, runs: Sequence[Run]) -> Figure: ...


def concluded(claim: Claim, runs: Sequence[Run]) -> dict[str, Any]:
    """All that follows from the runs."""
    title = (claim.__doc__ or "").splitlines()[0]
    shown = [table._asdict() for table in claim.tables(runs)]
    return {"claim": title, **verdict_of(claim, runs), "tables": shown}


def concluded_again(claim: Claim, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was read, with all that follows from its runs anew."""
    runs = [asdict(run) for run in found["runs"]]
    return plain({**found, **concluded(claim, found["runs"]), "runs": runs})


def verdict_of(claim: Claim, runs: Sequence[Run]) -> dict[str, Any]:
    """The verdict, the sentence and the comparisons, from the runs alone."""
    rule = {name: judge(c, runs) for name, c in claim.RULE.items()}
    beside = {name: judge(c, runs) for name, c in claim.BESIDE.items()}
    verdict = combined([judged.verdict for judged in rule.values()])
    sentence = claim.SENTENCE.format(**rule, **beside)
    return {
        "verdict": verdict,
        "sentence": " ".join(sentence.split()),
        "rule": as_dicts(rule),
        "beside": as_dicts(beside),
    }


def as_dicts(judged: Mapping[str, Judged]) -> dict[str, Any]:
    return {name: value.as_dict() for name, value in judged.items()}


def record(name: str, claim: Claim, options: Options, runs, seconds) -> dict[str, Any]:
    """All that is written to NAME.json."""
    found = {
        "name": name,
        "data": options.data,
        "quick": options.quick,
        **concluded(claim, runs),
        "seconds": round(seconds),
        "machine": machine(),
        "versions": versions(),
        "runs": [asdict(run) for run in runs],
    }
    return plain(found)


def machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores = cores or os.cpu_count() or 1
    return f"{cores} CPU core{'s' * (cores > 1)}, {cpu()}, {platform.system()}"


def cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found


def plain(value: Any) -> Any:
    """For JSON: numbers of five digits, and None for what is not finite."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def write(found: Mapping[str, Any], path: Path) -> None:
    """As JSON, each run and each table on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [f'"{k}": {lines(v)}' for k, v in found.items()]
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, allow_nan=False)
    return "[\n " + ",\n ".join(json.dumps(v, allow_nan=False) for v in value) + "\n]"


def read(path: Path) -> dict[str, Any]:
    """What was written, with its runs as such."""
    found = json.loads(path.read_text())
    return found | {"runs": [as_run(**entry) for entry in found["runs"]]}


def as_run(metrics: Mapping[str, float | None], **entry: Any) -> Run:
    known = {k: math.nan if v is None else v for k, v in metrics.items()}
    return Run(metrics=known, **entry)


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and half the distance of the highest from the lowest."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
