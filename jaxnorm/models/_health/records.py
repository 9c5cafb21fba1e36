"""What does a report of a layer's health consist of?"""

import dataclasses
from typing import NamedTuple


class Limits(NamedTuple):
    """The limits beyond which `health` finds something, which are its arguments."""

    epsilon: float = 1e-5
    dead: float = 1e-3
    drift: float = 0.5
    least: int = 16


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a layer: the rule, how much of it, and the fix."""

    rule: str
    detail: str
    fix: str
    severe: bool


@dataclasses.dataclass(frozen=True)
class LayerHealth:
    """The figures of one layer; counts are of features, where nothing else is said.

    Figures of means are of their absolute values. None stands for what the layer does
    not keep, or what only a fresh batch could tell.
    """

    path: str
    features: int  # steps and domains with statistics of their own count apart
    mean_min: float | None
    mean_median: float | None
    mean_max: float | None
    var_min: float | None
    var_median: float | None
    var_max: float | None
    never_updated: int
    invalid: int  # values that are NaN or infinite, and negative variances
    small: int  # of a variance below epsilon
    dead: int  # of a constant output
    size: int | None = None  # elements of the fresh batch in each statistic, at least
    fresh_invalid: int | None = None
    mean_drift_median: float | None = None
    mean_drift_max: float | None = None
    deviation_drift_median: float | None = None
    deviation_drift_max: float | None = None
    drifted: int | None = None
    findings: tuple[Finding, ...] = ()
