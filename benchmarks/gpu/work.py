"""Runs the items of a phase until its deadline; what they find are lines of JSON."""

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gpu.plan import Settings

THREADS = 12  # of the compiler
AHEAD = 12  # items that are compiled together; while any is timed, nothing compiles
LOST = ("CUDA_ERROR", "illegal memory access", "device-side assert")

Row = dict[str, Any]


class Item(NamedTuple):
    """`run(*(f() for f in builds))` gives rows; builds may run in threads."""

    name: str
    run: Callable[..., Iterable[Row]]
    builds: tuple[Callable[[], Any], ...] = ()


def main(phase: str, settings: Settings, lines: Path, deadline: float) -> None:
    """Runs a phase in this process."""
    module = importlib.import_module(f"gpu.{phase}")
    items = list(module.items(settings))
    with lines.open("a") as file:

        def write(line: Row) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        write({"planned": [item.name for item in items]})
        for line in results(items, deadline):
            write(line)


def results(items: list[Item], deadline: float) -> Iterator[Row]:
    """The rows of each item, and that it is done or what went wrong.

    Nothing follows what costs the process its GPU.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), AHEAD):
            chosen = items[start : start + AHEAD]
            if time.time() > deadline:
                return
            built = [[pool.submit(f) for f in item.builds] for item in chosen]
            for futures in built:
                for future in futures:
                    future.exception()  # waits for it
            for item, futures in zip(chosen, built, strict=True):
                if time.time() > deadline:
                    return
                problem = yield from _rows(item, futures)
                if any(word in problem for word in LOST):
                    return


def _rows(item: Item, futures: list[Future]) -> Iterator[Row]:
    problem = ""
    try:
        for row in item.run(*(f.result() for f in futures)):
            yield {"row": row}
    except Exception as error:  # whatever a library or a driver raises
        first, *_ = [*str(error).splitlines(), ""]
        problem = f"{type(error).__name__}: {first}"
        yield {"item": item.name, "problem": problem}
    yield {"done": item.name}
    return problem
