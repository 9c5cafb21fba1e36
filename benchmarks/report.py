"""Writes what was measured: the data, a Markdown table and figures.

`python benchmarks/report.py FOLDER` writes table and figures anew from the data there.
"""

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path

import figures
import numpy as np
import pandas as pd
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
    cases = pd.DataFrame(comparison.cases.values()).set_index("case")
    ratios = comparison.ratios[comparison.peers].join(cases[["op", "sweep"]])
    ratios = ratios[ratios.pop("sweep") == ""]
    if ratios.empty:
        return []
    means = ratios.groupby(["op", "work"], sort=False).agg(_mean_and_range)
    what = "The geometric mean over all cases, and the least and the largest."
    return ["## Summary", what, table(means.rename_axis(["Norm", "Work"]))]


def _mean_and_range(ratios: pd.Series) -> str:
    if ratios.isna().all():
        return "-"
    mean = np.exp(np.log(ratios).mean())
    return f"**{mean:.2f}** ({ratios.min():.2f} to {ratios.max():.2f})"


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
    ratios = comparison.ratios.loc[names, comparison.peers].map(_number)
    notes: dict[str, int] = {}
    for (name, work), peer in itertools.product(ratios.index, comparison.peers):
        if note := comparison.notes.get((name, peer)):
            number = notes.setdefault(f"{peer}: {note}", len(notes) + 1)
            ratios.loc[(name, work), peer] += f" [{number}]"
    ratios["Floor"] = comparison.over_floor.loc[names, OURS].map(_number)
    ratios = ratios.rename(lambda name: describe(comparison.cases[name]), level="case")
    text = [table(ratios.rename_axis(["Array", "Work"]))]
    if notes:
        text.append("\n".join(f"{i}. {note}." for note, i in notes.items()))
    return text


def facts(comparison: Comparison) -> list[str]:
    """Memory and compile time: the median over the shapes of each norm and type."""
    text = []
    rows = comparison.facts
    rows = rows[(rows["sweep"] == "") & (rows["work"] != "train step")]
    ours = rows[rows["library"] == OURS].set_index("case")
    for fact, title in FACTS.items():
        if fact not in rows or rows.empty:
            continue
        time = fact == "compile_seconds"
        unit = rows["case"].map(ours[fact]) if time else rows["input_bytes"]
        medians = rows.assign(value=rows[fact] / unit).pivot_table(
            "value", ["op", "dtype"], "library", "median", sort=False
        )
        medians = medians.reindex(columns=comparison.libraries).map(_number)
        text += [f"{title}: the median over shapes."]
        text += [table(medians.rename_axis(["Norm", "Type"]))]
    return ["## Memory and compilation", *text] if text else []


def imports(seconds: dict[str, float]) -> list[str]:
    if not seconds:
        return []
    found = pd.Series(seconds, name="Seconds").rename_axis("Library").to_frame()
    found["By jaxnorm's"] = found["Seconds"] / seconds[OURS]
    title = "## Import\n\nThe median of fresh processes; JAX itself is part of most."
    return [title, table(found.map(_number))]


def table(cells: pd.DataFrame) -> str:
    return cells.reset_index().to_markdown(index=False, disable_numparse=True)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    render(Path(sys.argv[1]))
