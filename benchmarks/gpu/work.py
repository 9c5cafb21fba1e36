"""Runs the items of a phase until its deadline; what they find are lines of JSON."""

import importlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from gpu.plan import Settings

THREADS = 12  # of the compiler
AHEAD = 12  # items that are compiled together; while any is timed, nothing compiles
LOST = (
    "CUDA_ERROR_ILLEGAL",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_MISALIGNED",
    "CUDA_ERROR_ASSERT",
    "illegal memory access",
)

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
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            file.flush()

        write({"planned": [item.name for item in items]})
        for line in results(items, deadline, getattr(module, "AHEAD", AHEAD)):
            write(line)
    os._exit(0)  # whatever still compiles


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results(items: list[Item], deadline: float, ahead: int = AHEAD) -> Iterator[Row]:
    """The rows of each item, and that it is done or what went wrong.

    Nothing follows what costs the process its GPU.
    """
    pool = ThreadPoolExecutor(THREADS)
    for start in range(0, len(items), ahead):
        chosen = items[start : start + ahead]
        built = [[pool.submit(f) for f in item.builds] for item in chosen]
        wait(itertools.chain(*built), timeout=max(0.0, deadline - time.time()))
        for item, futures in zip(chosen, built, strict=True):
            if time.time() > deadline:
                pool.shutdown(wait=False, cancel_futures=True)
                return
            problem = yield from _rows(item, futures)
            if any(word in problem for word in LOST):
                return


def said(error: Exception) -> str:
    """What an error is and says first."""
    first, *_ = [*str(error).splitlines(), ""]
    return f"{type(error).__name__}: {first}"[:300]


def _rows(item: Item, futures: list[Future]) -> Iterator[Row]:
    problem = ""
    try:
        for row in item.run(*(f.result() for f in futures)):
            yield {"row": row}
    except Exception as error:  # whatever a library or a driver raises
        problem = said(error)
        yield {"item": item.name, "problem": problem}
    yield {"done": item.name}
    return problem
