"""Times jaxnorm beside flax.linen, flax.nnx, Haiku, Equinox, Keras and PyTorch.

From the root of the repository, in about ten minutes on two CPU cores:

    pip install -e '.[bench]' && python benchmarks/against_peers.py

All do the same work in one run, checked before it is timed, in an order drawn anew each
round, so that what else the machine does hits all alike; each uses all cores, and freed
memory stays with the allocator. A library
that is not installed is left out. Writes what it ran to benchmarks/results: a table
(against_peers.md), the data (against_peers.json) and figures.

    --only REGEX      only cases whose name it finds, such as '^batch norm.*bfloat16',
                      'by channels', 'ResNet' or 'import'
    --libraries ...   only these beside jaxnorm, by their files in benchmarks/peers
    --quick           small shapes and few rounds, to see that it works
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import environment
import imports
import measure
import peers
import report
from tqdm import tqdm

HERE = Path(__file__).parent


def options() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--only", default="", metavar="REGEX")
    others = [file for file in peers.FILES if file != "jaxnorm"]
    parser.add_argument("--libraries", nargs="*", choices=others, default=others)
    parser.add_argument("--rounds", type=int, help="20, or 2 with --quick")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true")
    found = parser.parse_args()
    if found.rounds is None:
        found.rounds = 2 if found.quick else 20
    if found.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        found.cases = cases.select(found.quick, found.only)
        found.imports = bool(re.search(found.only, "import"))
    except re.error as error:
        parser.error(f"--only is no regular expression: {error}")
    if not (found.cases or found.imports):
        parser.error(f"--only {found.only} finds no case")
    return found


def rows(chosen, libraries, files, rounds) -> Iterator[list[dict]]:
    """Case by case; those of several devices in a process of their own."""
    synchronized = [case for case in chosen if case.op == cases.SYNCED]
    for case in chosen:
        if case not in synchronized:
            yield measure.rows(case, libraries, rounds)
    if synchronized:
        wanted = {"cases": synchronized, "libraries": files, "rounds": rounds}
        command = [sys.executable, str(HERE / "synchronized.py"), json.dumps(wanted)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
        if process.returncode:
            raise SystemExit(f"synchronized.py failed: {process.returncode}")


def main() -> None:
    chosen = options()
    files = ["jaxnorm", *chosen.libraries]
    libraries, missing = peers.load(files)
    found = {
        "environment": environment.describe([peer.package for peer in libraries]),
        "missing": missing,
        "import_seconds": {},
        "rows": [],
    }
    if chosen.imports:
        statements = {"jax": "import jax"} | {p.name: p.statement for p in libraries}
        found["import_seconds"] = imports.seconds(statements, min(5, chosen.rounds))
    cases_done = rows(chosen.cases, libraries, files, chosen.rounds)
    for some in tqdm(cases_done, total=len(chosen.cases), unit="case"):
        found["rows"] += some
    report.write(found, chosen.out)
    print(f"Wrote {chosen.out}")


if __name__ == "__main__":
    environment.keep_freed_memory()
    main()
