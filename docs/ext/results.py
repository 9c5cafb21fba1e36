"""What was measured of a method: times, passes over memory, accuracy, experiments."""

import re
from pathlib import Path

from markdown_files import rows, table
from method_text import Method

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PASSES = {"BN": "batch_norm", "LN": "layer_norm", "RMS": "rms_norm", "GN": "group_norm"}
PEERS = ("flax.linen", "torch")


def times(method: Method) -> str:
    """Mean ratios of times from the summary of the benchmark."""
    head, *summary = rows(RESULTS / "against_peers.md")
    wanted = [head.index(peer) for peer in PEERS]
    body = [
        [cells[0], cells[1], *(cells[i] for i in wanted)]
        for cells in summary
        if len(cells) == len(head)
        and cells[0].split(",")[0].replace(" ", "_").lower() == method.name
    ]
    return table(("Norm", "Work", *PEERS), body) if body else ""


def passes(method: Method) -> str:
    """Passes over memory in programs compiled for one GPU."""
    body = [
        [cells[0], cells[1], *cells[2:5]]
        for cells in rows(RESULTS / "memory_passes_h100.md")
        if PASSES.get(re.split(r"[ ,]", cells[0])[0]) == method.name
    ]
    return table(("Program", "x", "Least", "Flax", "jaxnorm"), body) if body else ""


def accuracy(method: Method) -> str:
    """The method's row of docs/accuracy.md."""
    example = (ROOT / "examples" / "01_train_digits.py").read_text()
    names = dict(re.findall(r'^    "([\w-]+)": jaxnorm\.(\w+)\(', example, re.M))
    kind = method.settings.__name__ if method.settings else ""
    ours = {f"`{name}`" for name, found in names.items() if found == kind}
    head, *body = rows(ROOT / "docs" / "accuracy.md")
    body = [cells for cells in body if cells[0] in ours]
    return table(tuple(head), body) if body else ""


def experiments(method: Method) -> list[tuple[str, str]]:
    """The names and titles of the experiments that speak of the method."""
    words = {method.title.lower(), method.name.replace("_", " ")}
    found = []
    for path in sorted((ROOT / "experiments" / "claims").glob("*.py")):
        page = ROOT / "docs" / "evidence" / f"{path.stem}.md"
        text = page.read_text() if page.exists() else ""
        if any(word in " ".join(text.split()).lower() for word in words):
            found.append((path.stem, text.partition("\n")[0].removeprefix("# ")))
    return found
