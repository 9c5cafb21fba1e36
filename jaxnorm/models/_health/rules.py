"""What do the figures of a layer say is wrong with it, and what is to be done?"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxnorm.models._health.records import Finding, LayerHealth, Limits

# A few features may stray without a word: in wide layers, some always do.
DRIFTED_SHARE = 0.05


class Rule(NamedTuple):
    """Something that can be wrong with a layer, how much of it there is, and a fix."""

    name: str
    detail: Callable[[LayerHealth, Limits], str]  # "" where there is none
    fix: str
    severe: bool = False


def _features(count: int, row: LayerHealth) -> str:
    """A number of features in words; "" for 0."""
    if not count:
        return ""
    share = f"all {count}" if count == row.features else f"{count} of {row.features}"
    return f"{share} features"


def _drifted(row: LayerHealth, limits: Limits) -> str:
    count = row.drifted or 0
    return _features(count, row) if count > DRIFTED_SHARE * row.features else ""


def _small_batch(row: LayerHealth, limits: Limits) -> str:
    if not row.size or row.size >= limits.least:
        return ""
    if row.size == 1:
        return "1 element, which has no variance"
    error = np.sqrt(2 / (row.size - 1))
    return f"{row.size} elements, variances are off by {error:.0%}"


RULES = (
    Rule(
        "never updated",
        lambda row, _: _features(row.never_updated, row),
        'train with mutable=["batch_stats"] and keep what comes back (in NNX, after '
        "model.train()), unfreeze the layer, or load its statistics: evaluation takes "
        "mean 0 and variance 1",
        severe=True,
    ),
    Rule(
        "not finite",
        lambda row, _: f"{row.invalid} values" if row.invalid else "",
        "go back to a checkpoint before, or start from init_stats and train; batches "
        "with moments that are not finite change nothing here, so look where else the "
        "statistics were computed or converted",
        severe=True,
    ),
    Rule(
        "small variance",
        lambda row, _: _features(row.small, row),
        "scale up what enters the layer, or give it a smaller epsilon, which decides "
        "here what it divides by",
    ),
    Rule(
        "dead",
        lambda row, _: _features(row.dead, row),
        "prune the features, whose output is constant, or keep weight decay off their "
        "scale (decay_mask); a scale that is meant to start at 0 is no fault",
    ),
    Rule(
        "drift",
        _drifted,
        "take the statistics anew from batches such as the fresh one, lower the "
        "momentum, or prepare the data alike in training and evaluation",
    ),
    Rule(
        "small batch",
        _small_batch,
        "give the layer more examples, pool devices with axis_name, freeze it, or take "
        "a norm that needs no batch, such as group norm",
    ),
    Rule(
        "not reached",
        lambda row, _: "no elements" if row.size == 0 else "",
        "pass a batch that the layer takes part in, in training, or leave the layer "
        "out with `where`, as if it is Flax's own, which gathers no batch",
    ),
    Rule(
        "batch not finite",
        lambda row, _: f"{row.fresh_invalid} values" if row.fresh_invalid else "",
        "look for NaN in the batch and for overflow in the layers before this one",
        severe=True,
    ),
)


def findings(row: LayerHealth, limits: Limits) -> tuple[Finding, ...]:
    """What each rule finds in the figures of a layer."""
    found = [(rule, rule.detail(row, limits)) for rule in RULES]
    return tuple(Finding(r.name, text, r.fix, r.severe) for r, text in found if text)
