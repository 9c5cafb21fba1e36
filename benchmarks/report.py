"""Writes what was measured: the data, a Markdown table and figures.

`python benchmarks/report.py FOLDER` writes table and figures anew from the data there.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import figures
import numpy as np
from comparison import OURS, Comparison, describe

NAME = "against_peers"
HEAD = """# jaxnorm beside its peers

Written by `{command}` on {date}: {cpu}, {cores} cores, {system}; {versions}.

Numbers are ratios of times, peer / jaxnorm, from one run in which all took turns in
random order: **above 1, jaxnorm is faster**. Each time is the lower quartile of the
rounds, and each timed call follows an untimed one of the same program, so that caches
and threads are as its own library leaves them. "Floor" is jaxnorm's own time by the
least that the passes over memory take at the speed of a copy on all cores, which was
{speed:.1f} GB/s here (read and written; median of the cases): 1 is perfect, and below 1
the array was still in a cache.

The work is the same. Before it is timed, what each library computes (outputs, gradients
of input, scale and bias, running statistics) is compared with jaxnorm's, and may differ
by 1e-4 in float32 and 3e-2 in bfloat16 (the length of the difference by that of the
array); what is not timed is "-", with the reason below the table. Only gradients of
parameters in bfloat16 may be rougher, which is said there, too. Epsilon and momentum
are equal, parameters are float32, and gradients are those for a given gradient of the
result, which is computed and kept in the same program. JAX programs are jitted; PyTorch
is eager. jaxnorm is its pure functions, and its Linen classes in the models; a training
step is that of each library's own model, with SGD.
"""
SECTIONS = {
    "Norms": lambda case: not case["sweep"] and "train step" not in case["works"],
    "Models": lambda case: "train step" in case["works"],
    "Scaling": lambda case: case["sweep"],
}
FACTS = {
    "residual_bytes": "Kept for the backward pass, by the size of the input",
    "temp_bytes": "Temporary memory of forward and gradient, by the size of the input",
    "compile_seconds": "Time to compile forward and gradient, by jaxnorm's",
}


def write(found: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(short(row)) for row in found["rows"])
    rest = json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=1)
    (out / f"{NAME}.json").write_text(f'{rest[:-2]},\n "rows": [\n{lines}\n]}}\n')
    render(out)


def short(value):
    """Four digits of every number that has more."""
    if isinstance(value, dict):
        return {k: short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def render(out: Path) -> None:
    found = json.loads((out / f"{NAME}.json").read_text())
    comparison = Comparison(found["rows"])
    drawn = figures.draw(comparison, out)
    text = [head(found), *summary(comparison), *tables(comparison), *facts(comparison)]
    text += imports(found["import_seconds"])
    text += ["## Figures"] if drawn else []
    text += [f"![{title}]({file})" for file, title in drawn.items()]
    (out / f"{NAME}.md").write_text("\n\n".join(text) + "\n")


def head(found: dict) -> str:
    known = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    speeds = [row["copy_bytes_per_second"] for row in found["rows"]] or [np.nan]
    speed = float(np.median(speeds)) / 1e9
    text = HEAD.format(**known | {"versions": versions, "speed": speed})
    for library, reason in found["missing"].items():
        text += f"\n{library} is left out: {reason}.\n"
    return text.strip()


def summary(comparison: Comparison) -> list[str]:
    """The geometric mean over the cases of each norm, and its extremes."""
    by_op = defaultdict(lambda: defaultdict(list))
    for name, case in comparison.cases.items():
        for work in case["works"] if not case["sweep"] else ():
            for peer in comparison.peers:
                ratio = comparison.ratio(name, work, peer)
                by_op[case["op"], work][peer] += [] if ratio is None else [ratio]
    if not by_op:
        return []
    lines = [
        [op, work, *(_mean_and_range(found[peer]) for peer in comparison.peers)]
        for (op, work), found in by_op.items()
    ]
    what = "The geometric mean over all cases, and the least and the largest."
    header = ["Norm", "Work", *comparison.peers]
    return ["## Summary", what, table(header, lines)]


def _mean_and_range(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    mean = np.exp(np.mean(np.log(ratios)))
    return f"**{mean:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def tables(comparison: Comparison) -> list[str]:
    text = []
    for section, belongs in SECTIONS.items():
        ops = defaultdict(list)
        for name, case in comparison.cases.items():
            if belongs(case):
                ops[case["op"], case["sweep"]].append(name)
        text += [f"## {section}"] if ops else []
        for (op, sweep), names in ops.items():
            title = f"{op}, by {sweep}" if sweep else op
            text.append(f"### {title[0].upper()}{title[1:]}")
            text += ratio_table(comparison, names)
    return text


def ratio_table(comparison: Comparison, names: list[str]) -> list[str]:
    notes: dict[str, int] = {}
    lines = []
    for name in names:
        for work in comparison.cases[name]["works"]:
            line = [describe(comparison.cases[name]), work]
            for peer in comparison.peers:
                cell = _number(comparison.ratio(name, work, peer))
                if note := comparison.notes[name].get(peer):
                    said = f"{peer}: {note}"
                    cell += f" [{notes.setdefault(said, len(notes) + 1)}]"
                line.append(cell)
            lines.append([*line, _number(comparison.over_floor(name, work))])
    text = [table(["Array", "Work", *comparison.peers, "Floor"], lines)]
    if notes:
        text.append("\n".join(f"{i}. {note}." for note, i in notes.items()))
    return text


def facts(comparison: Comparison) -> list[str]:
    """Memory and compile time: the median over the shapes of each norm and type."""
    text = []
    header = ["Norm", "Type", *comparison.libraries]
    for fact, title in FACTS.items():
        lines = [
            [*key, *(_median(found[library]) for library in comparison.libraries)]
            for key, found in of_norms(comparison, fact).items()
        ]
        if lines:
            text += [f"{title}: the median over shapes.", table(header, lines)]
    return ["## Memory and compilation", *text] if text else []


def of_norms(comparison: Comparison, fact: str) -> dict:
    """Values of a fact by norm and type, then library, by what FACTS says."""
    groups = defaultdict(lambda: defaultdict(list))
    for name, by_library in comparison.facts.items():
        case = comparison.cases[name]
        if case["sweep"] or "train step" in case["works"]:
            continue
        time = fact == "compile_seconds"
        unit = by_library[OURS][fact] if time else case["input_bytes"]
        for library, row in by_library.items():
            if fact in row:
                groups[case["op"], case["dtype"]][library].append(row[fact] / unit)
    return groups


def imports(seconds: dict[str, float]) -> list[str]:
    if not seconds:
        return []
    lines = [[k, f"{v:.2f}", f"{v / seconds[OURS]:.2f}"] for k, v in seconds.items()]
    title = "## Import\n\nThe median of fresh processes; JAX itself is part of most."
    return [title, table(["Library", "Seconds", "By jaxnorm's"], lines)]


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _median(values: list[float]) -> str:
    return f"{np.median(values):.2f}" if values else "-"


if __name__ == "__main__":
    render(Path(sys.argv[1]))
