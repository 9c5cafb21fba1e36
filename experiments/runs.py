"""What is kept of each training, and how is the rate of an arm chosen?"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

SWEEP, FINAL = "sweep", "final"
SWEEP_SEED = 1000  # of the runs that choose a rate; no final run has it
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass
class Run:
    """One training: its settings, its seed, what came out, and how long it took."""

    arm: dict[str, Any]
    seed: int
    metrics: dict[str, float]
    curve: list[float] = field(default_factory=list)
    stage: str = FINAL
    seconds: float = 0.0

    def is_of(self, arm: Mapping[str, Any]) -> bool:
        """Whether it is a final run with these settings, whatever the others are."""
        own = self.arm
        return self.stage == FINAL and all(own.get(k) == v for k, v in arm.items())


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    data: str
    data_dir: Path | None = None
    seeds: int | None = None
    quick: bool = False

    def steps(self, full: int) -> int:
        return max(full // 20, 2) if self.quick else full

    def seed_range(self, default: int) -> range:
        return range(1 if self.quick else self.seeds or default)

    def some(self, values: Sequence[Any]) -> Sequence[Any]:
        """All values; of a quick run the first and the last."""
        return [values[0], values[-1]] if self.quick else values

    def rates(self, rates: Sequence[float] = RATES) -> Sequence[float]:
        """All rates; of a quick run the one in the middle."""
        return rates[len(rates) // 2 :][:1] if self.quick else rates


# A training at a rate, with a seed: its metrics, and a curve.
Train = Callable[[float, int], tuple[dict[str, float], list[float]]]


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start


def run(arm: dict[str, Any], train: Train, rate: float, seed: int, stage=FINAL) -> Run:
    with timed() as seconds:
        metrics, curve = train(rate, seed)
        return Run(arm | {"rate": rate}, seed, metrics, curve, stage, seconds())


def best_rate(runs: Sequence[Run]) -> float:
    """That of the lowest validation error."""
    return min(runs, key=lambda run: run.metrics["validation"]).arm["rate"]


def tuned(
    arm: dict[str, Any], train: Train, rates: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """The runs of an arm: one at each rate, then all seeds at the best of them."""
    swept = rates if len(rates) > 1 else ()
    sweep = [run(arm, train, rate, SWEEP_SEED, SWEEP) for rate in swept]
    rate = best_rate(sweep) if sweep else rates[0]
    return sweep + [run(arm, train, rate, seed) for seed in seeds]


def all_tuned(
    arms: Sequence[tuple[dict[str, Any], Train]],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[Run]:
    """The runs of all arms, with a progress bar."""
    bar = tqdm(arms, "arms", leave=False, disable=None)
    return [run for arm, train in bar for run in tuned(arm, train, rates, seeds)]


def thinned(values: Sequence[float] | np.ndarray, points: int = 20) -> list[float]:
    """Means of at most `points` consecutive stretches of `values`."""
    parts = np.array_split(np.asarray(values), min(points, len(values)))
    return [float(part.mean()) for part in parts]
