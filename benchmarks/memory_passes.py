"""Counts the passes over memory that norms take on an H100 or a TPU v5e.

    pip install -e '.[passes-h100]' && python benchmarks/memory_passes.py
    pip install -e '.[passes-v5e]' && python benchmarks/memory_passes.py --target v5e

Neither device is needed: XLA compiles the programs for a description of it, and the
optimized HLO says what each kernel reads and writes (`benchmarks/compiled.py`). Nothing
runs, so no times are measured. Norms are bound by memory: on large arrays the time is
about the bytes over the bandwidth, on small ones it is that of the launches.

Prints the table and, if it is of all cases, writes it to `benchmarks/results`; with
`--kernels`, prints what each kernel moves. `--check` compares jaxnorm with the numbers
in `tests/memory_passes.json`, and `--record` writes these.
"""

import argparse
import collections
import importlib
import importlib.metadata
import json
import re
import sys
import warnings
from pathlib import Path

import jax
from compiled import TARGETS, Kernel, compile_for, kernels
from norm_programs import Library
from passes_cases import Case, cases
from passes_table import DEVICES, Count, Table, legend, markdown, versions
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD = ROOT / "tests" / "memory_passes.json"
KERNELS = {"h100": ("mosaic", "triton"), "v5e": ()}
MORE_PASSES, MORE_BYTES = 0.3, 1.02


def libraries(target: str) -> list[Library]:
    """Flax, jaxnorm, and jaxnorm asked for each sort of kernels that it has."""
    ours = importlib.import_module("jaxnorm.linen")
    found = [
        Library("Flax", importlib.import_module("flax.linen")),
        Library("jaxnorm", ours),
    ]
    kinds = {case.kind for case in cases(target)}
    for implementation in KERNELS[target]:
        library = Library(f"jaxnorm {implementation}", ours, implementation)
        found += [library] if any(library.offers(kind) for kind in kinds) else []
    return found


def moved(target: str, case: Case, library: Library) -> list[Kernel]:
    """The kernels of the case's programs that count.

    On a GPU products are kernels of their own and left out. On a TPU they are fused
    with what is around them, so that all kernels count.
    """
    found = []
    for program in case.programs(library):
        with warnings.catch_warnings():
            # What is donated and not handed over is no loss.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            compiled = compile_for(
                target, program.f, *program.args, donate=program.donate
            )
        found += kernels(compiled)
    return [k for k in found if target == "v5e" or not k.product]


def count(target: str, case: Case, library: Library) -> Count:
    """The quantity of the case."""
    if case.quantity == "passes":
        ks = moved(target, case, library)
        total = sum(k.bytes for k in ks) / case.unit
        uncertain = any(k.uncertain for k in ks)
        return Count(total, sum(k.times for k in ks), uncertain)
    program = case.programs(library)[0]
    if case.quantity == "kept":
        pull = jax.eval_shape(program.f, *program.args)[0]
        kept = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(pull))
        return Count(kept / case.unit)
    memory = compile_for(target, program.f, *program.args).memory_analysis()
    if memory is None:
        raise RuntimeError(f"XLA gives no memory analysis for {DEVICES[target]}")
    return Count(memory.temp_size_in_bytes / case.unit)


def measure(target: str, chosen: list[Case], columns: list[Library]) -> Table:
    """A row for each case; kernels that refuse a case say so in their cell."""
    table: Table = {case.key: {} for case in chosen}
    work = [(c, lib) for c in chosen for lib in columns if lib.offers(c.kind)]
    for case, library in tqdm(work, desc=target, unit="program", file=sys.stderr):
        try:
            cell = count(target, case, library)
        except (NotImplementedError, ValueError) as e:
            if library.implementation is None:
                raise
            cell = "no kernel"
            tqdm.write(f"{case.key}, {library.name}: {e}", file=sys.stderr)
        table[case.key][library.name] = cell
    return table


def report(target: str, chosen: list[Case]) -> Table:
    """Prints the table, and writes it where it has all cases."""
    columns = libraries(target)
    table = measure(target, chosen, columns)
    text = markdown(target, chosen, table, [library.name for library in columns])
    print(legend(target) + "\n" + text)
    if len(chosen) == len(list(cases(target))):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"memory_passes_{target}.md"
        path.write_text(f"# Memory passes\n\n{legend(target)}\n{text}")
        print(f"written to {path.relative_to(ROOT)}")
    return table


def recorded() -> dict:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def numbers(table: Table) -> dict[str, dict[str, float]]:
    """What is recorded of a table: jaxnorm's numbers."""
    return {
        case: {
            name: round(cell.value, 3)
            for name, cell in cells.items()
            if isinstance(cell, Count) and name != "Flax"
        }
        for case, cells in table.items()
    }


def record(target: str, table: Table) -> None:
    """Replaces the recorded numbers of the cases in `table`, and of those no more."""
    known = recorded()
    old = known.get(target, {}).get("numbers", {})
    new = old | numbers(table)
    order = [case.key for case in cases(target)]
    known[target] = {
        "versions": versions(),
        "numbers": {key: new[key] for key in order if key in new},
    }
    RECORD.write_text(json.dumps(known, indent=2) + "\n")
    print(f"recorded in {RECORD.relative_to(ROOT)}")


def grown(target: str, found: dict, known: dict) -> list[str]:
    """What is above its recorded number, or has none, or is counted no more."""
    problems = []
    for key in sorted(found.keys() | known.keys()):
        now, then = found.get(key, {}), known.get(key, {})
        for name in sorted(now.keys() | then.keys()):
            if name not in now or name not in then:
                state = "is not recorded" if name in now else "is counted no more"
                problems.append(f"{key}, {name}: {state}")
                continue
            limit = then[name] + MORE_PASSES
            if target == "v5e":
                limit = then[name] * MORE_BYTES
            if now[name] > limit:
                problems.append(
                    f"{key}, {name}: {now[name]:.3f} times x, recorded {then[name]:.3f}"
                )
    return problems


def check(target: str, chosen: list[Case]) -> int:
    """The exit status: 1 if anything has grown."""
    columns = [library for library in libraries(target) if library.name != "Flax"]
    found = numbers(measure(target, chosen, columns))
    entry = recorded().get(target, {"versions": "none", "numbers": {}})
    keys = {case.key for case in chosen}
    if len(chosen) == len(list(cases(target))):
        keys |= entry["numbers"].keys()
    known = {k: v for k, v in entry["numbers"].items() if k in keys}
    problems = grown(target, found, known)
    print("\n".join(problems) or f"{len(found)} cases: none has grown")
    if problems:
        print(f"recorded with {entry['versions']}, compiled with {versions()};")
        command = f"python benchmarks/memory_passes.py --target {target} --record"
        print(f"`{command}` records what is intended")
    return bool(problems)


def list_kernels(target: str, chosen: list[Case]) -> None:
    """Prints the kernels of each case that move a hundredth of a pass or more."""
    for case in chosen:
        for library in libraries(target):
            if case.quantity != "passes" or not library.offers(case.kind):
                continue
            try:
                ks = moved(target, case, library)
            except ValueError as e:
                print(f"\n{case.key}, {library.name}: {e}")
                continue
            small = [k for k in ks if k.bytes < 0.01 * case.unit]
            total = sum(k.bytes for k in ks) / case.unit
            print(f"\n{case.key}, {library.name}: {total:.2f} passes")
            for k in ks:
                if k not in small:
                    read, written = k.read / case.unit, k.written / case.unit
                    mark = ", product" if k.product else ""
                    print(
                        f"  {k.times}x {read:6.2f} read {written:6.2f} written  "
                        f"{k.name} ({k.op}{mark}) {k.origin}"
                    )
            ops = collections.Counter(k.op for k in small)
            print(f"  and {len(small)} small ones: {dict(ops)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="h100")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases by name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--record", action="store_true", help="and record the numbers")
    what.add_argument("--check", action="store_true", help="against recorded numbers")
    what.add_argument("--kernels", action="store_true", help="what each one moves")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    jax.config.update("jax_platforms", "cpu")  # a plugin would look for its device
    known = list(cases(args.target))
    chosen = [case for case in known if re.search(args.only, case.key)]
    if not chosen:
        print(f"no case matches {args.only!r}: {[case.key for case in known]}")
        return 2
    if args.check:
        return check(args.target, chosen)
    if args.kernels:
        list_kernels(args.target, chosen)
        return 0
    table = report(args.target, chosen)
    if args.record:
        record(args.target, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
