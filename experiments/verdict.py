"""Which differences does a claim rest on, and do the runs show them?

A rule is data that stands in the file of the claim before the runs. A comparison is
between two groups of runs with the same seeds, so that their differences are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np
from scipy import stats

from experiments.runs import Run

HELD, FAILED, OPEN = "held", "did not hold", "open"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """The mean of `metric` in the runs of `left` less that in the runs of `right`.

    Exactly one of `more_than` and `less_than` is given. Without `right`, it is the
    metric of `left` itself.
    """

    says: str
    metric: str
    left: Mapping[str, Any]
    right: Mapping[str, Any] | None = None
    more_than: float | None = None
    less_than: float | None = None

    def __post_init__(self):
        if (self.more_than is None) == (self.less_than is None):
            raise ValueError(f"more_than or less_than, and not both: {self}")

    def verdict(self, low: float, high: float) -> str:
        """Held if the whole interval is where the claim has it; did not hold if the
        whole interval is elsewhere; else open."""
        if self.more_than is not None:
            held, failed = low > self.more_than, high <= self.more_than
        else:
            limit = cast(float, self.less_than)
            held, failed = high < limit, low >= limit
        return HELD if held else FAILED if failed else OPEN


@dataclass(frozen=True)
class Judged:
    """A comparison and what the runs say of it."""

    comparison: Comparison
    seeds: int
    left: float
    right: float
    difference: float
    low: float
    high: float
    verdict: str = field(init=False)

    def __post_init__(self):
        verdict = self.comparison.verdict(self.low, self.high)
        object.__setattr__(self, "verdict", verdict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its interval by Student's t; without ends where there
    are fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    half = float(quantile * stats.sem(values))
    return mean, mean - half, mean + half


def by_seed(runs: Sequence[Run], arm: Mapping[str, Any], metric: str):
    """The metric of the final runs with these settings, by their seeds."""
    chosen = [run for run in runs if run.is_of(arm)]
    values = {run.seed: run.metrics[metric] for run in chosen}
    if len(values) < len(chosen) or not values:
        raise ValueError(f"{len(chosen)} runs of {len(values)} seeds have {dict(arm)}")
    return values


def judge(comparison: Comparison, runs: Sequence[Run]) -> Judged:
    left = by_seed(runs, comparison.left, comparison.metric)
    right = dict.fromkeys(left, 0.0)
    if comparison.right is not None:
        right = by_seed(runs, comparison.right, comparison.metric)
    if left.keys() != right.keys():
        raise ValueError(f"the seeds of both sides differ: {comparison.says}")
    mean, low, high = interval([left[seed] - right[seed] for seed in left])
    of_left, of_right = (float(np.mean([*side.values()])) for side in (left, right))
    return Judged(comparison, len(left), of_left, of_right, mean, low, high)


def combined(verdicts: Sequence[str]) -> str:
    """The verdict on a claim that needs all of them."""
    if FAILED in verdicts:
        return FAILED
    return OPEN if OPEN in verdicts else HELD
