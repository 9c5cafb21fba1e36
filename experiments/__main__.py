"""Runs an experiment, and writes its numbers, its verdict and its figure.

From the root of the repository:

    python -m experiments --list
    python -m experiments depth
    python -m experiments all --quick
"""

import argparse
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from experiments import NAMES, figures, results
from experiments.data import MissingData
from experiments.results import ROOT, Claim
from experiments.runs import Options, timed


def load(name: str) -> Claim:
    module = importlib.import_module(f"experiments.claims.{name}")
    return cast(Claim, module)


def places(out: Path | None, quick: bool) -> tuple[Path, Path]:
    """Folders for numbers and figures; quick runs do not touch what is committed."""
    if quick and not out:
        out = ROOT / "runs" / "experiments"
    if out:
        return out, out
    return ROOT / "experiments" / "results", ROOT / "docs" / "evidence"


def run(name: str, options: Options, numbers: Path, figure: Path) -> None:
    claim = load(name)
    with timed() as seconds:
        runs = claim.measure(options)
        found = results.record(name, claim, options, runs, seconds())
    show(name, found, numbers, figure)


def redraw(name: str, numbers: Path, figure: Path) -> None:
    """The verdict, the tables and the figure anew, from the runs that are there."""
    found = results.read(numbers / f"{name}.json")
    again = results.concluded_again(load(name), found)
    show(name, again, numbers, figure)


def show(name: str, found: Mapping[str, Any], numbers: Path, figure: Path) -> None:
    """Writes what was found, and draws what was written."""
    numbers, figure = numbers / f"{name}.json", figure / f"{name}.svg"
    results.write(found, numbers)
    runs = results.read(numbers)["runs"]
    figures.write(lambda: load(name).draw(runs), figure)
    print(f"{name}: {found['verdict']}. {found['sentence']}")
    print(f"{numbers}, {figure}")


def list_all() -> None:
    for name in NAMES:
        claim = load(name)
        title = (claim.__doc__ or "").splitlines()[0]
        print(f"{name:16} {title} [{', '.join(claim.DATA)}]")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def parser() -> Parser:
    made = Parser(
        prog="experiments", description="Puts claims about norms to the test."
    )
    made.add_argument("name", nargs="?", choices=[*NAMES, "all"])
    made.add_argument("--list", action="store_true", help="names, claims and data")
    made.add_argument("--seeds", type=int, help="runs of each arm at its best rate")
    made.add_argument("--quick", action="store_true", help="one seed, few steps")
    made.add_argument("--data", help="a data set other than the usual one")
    made.add_argument("--data-dir", type=Path, help="where the data sets are")
    made.add_argument("--redraw", action="store_true", help="from the runs of before")
    made.add_argument("--out", type=Path, help="folder for the numbers and the figure")
    return made


def read_options(made: Parser, given, name: str) -> Options:
    known = load(name).DATA
    # With "all", an experiment that knows no such data keeps its own.
    data = known[0] if given.name == "all" and given.data not in known else given.data
    data = data or known[0]
    if data not in known:
        made.error(f"{name} runs on {' or '.join(known)}, got --data {data}")
    return Options(data, given.data_dir, given.seeds, given.quick)


def main(argv: list[str] | None = None) -> int:
    made = parser()
    given = made.parse_args(argv)
    if given.list:
        list_all()
        return 0
    if given.name is None:
        made.error("which one? See --list")
    if given.seeds is not None and given.seeds < 2:
        made.error("--seeds must be at least 2, for an interval")
    try:
        for name in NAMES if given.name == "all" else [given.name]:
            options, where = (
                read_options(made, given, name),
                places(given.out, given.quick),
            )
            redraw(name, *where) if given.redraw else run(name, options, *where)
    except MissingData as error:
        made.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
