"""One case in all libraries: checked to be the same work, then timed side by side."""

import numpy as np
from cases import Case
from floor import PASSES, Copy, bytes_moved
from peers import Peer, Program, Unsupported
from timing import samples

# Of the difference's length to the array's. What must not pass: another convention of
# momentum, statistics in half precision, a missing gradient.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# Some sum the gradients of parameters in bfloat16. It is timed, and said.
ROUGH = 0.3
QUARTILES = (0.25, 0.5, 0.75)
GRADIENT = "forward and gradient"
SHORT = 0.3  # seconds to spend on a case of few milliseconds


def rows(case: Case, peers: list[Peer], rounds: int) -> list[dict]:
    """A row for each library and work; a note is what a library lacks or does else."""
    programs, notes = checked(case, peers)
    calls = {
        (name, work): call
        for name, program in programs.items()
        for work, call in program.calls.items()
        if not case.sweep or work == GRADIENT
    }
    copy = Copy()
    times = samples(calls | {"copy": copy}, rounds, SHORT)
    bytes_per_second = copy.bytes_moved / float(np.quantile(times.pop("copy"), 0.25))
    common = {"case": case.name, **case._asdict(), "input_bytes": case.input_bytes}
    common |= {"copy_bytes_per_second": bytes_per_second}
    found = [
        common | {"library": name, "note": note}
        for name, note in notes.items()
        if name not in programs
    ]
    for (name, work), taken in times.items():
        row = common | {"library": name, "work": work, "rounds": len(taken)}
        row |= {"note": notes[name]} if name in notes else {}
        row["milliseconds"] = [1e3 * float(np.quantile(taken, q)) for q in QUARTILES]
        if case.op in PASSES:
            least = bytes_moved(case, work) / bytes_per_second
            row["floor_milliseconds"] = 1e3 * least
        found.append(row | dict(programs[name].facts))
    return found


def checked(case, peers) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs that do the work of jaxnorm's, and what is to be said of any.

    Any error of a library is such a thing: it says what that library cannot do here,
    and the others can be compared all the same.
    """
    ours, *others = peers
    programs, notes = {ours.name: ours.build(case)}, {}
    expected = programs[ours.name].results()
    for peer in others:
        try:
            program = peer.build(case)
            note = same_work(case, program.results(), expected)
        except Unsupported as reason:
            notes[peer.name] = str(reason)
        except Exception as error:
            first = str(error).partition("\n")[0]
            notes[peer.name] = f"fails: {type(error).__name__}: {first}"
        else:
            programs[peer.name] = program
            notes |= {peer.name: note} if note else {}
    return programs, notes


def same_work(case, found, expected) -> str:
    """What is to be said of the results; raises Unsupported where they are others."""
    apart = {k: _distance(v, expected[k]) for k, v in found.items()}
    allowed = TOLERANCE[case.dtype]
    excess = {k: v for k, v in apart.items() if not v <= allowed}
    if not excess:
        return ""
    worst = max(excess, key=lambda k: excess[k])
    said = f"{worst} differs by {excess[worst]:.0e} (tolerance {allowed:.0e})"
    sums = {f"gradient of {name}" for name in case.features}
    if case.dtype != "bfloat16" or excess.keys() - sums or excess[worst] > ROUGH:
        raise Unsupported(f"other results: {said}")
    return f"rough: {said}"


def _distance(value, expected) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
