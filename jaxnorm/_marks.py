"""Marks among the statistics of a layer: which does a call read, and which move?"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# Of these two the presence counts, not the value.
RUNNING = "running"  # the layer normalizes by the running statistics, in training too
HELD = "held"  # the layer does not update its statistics
SWITCHES = (RUNNING, HELD)
# The moments of all batches since `accumulate`, in the place of an update; and whether
# they are averages, without how far the means of the batches are apart.
MOMENTS = ("batch_mean", "batch_var", "batch_size", "batch_residue")
AVERAGED = "batch_averaged"
BATCH = (*MOMENTS, AVERAGED)
MARKS = (*SWITCHES, *BATCH)


class Use(NamedTuple):
    """Which statistics a call reads, and whether it updates those of the layer."""

    by_batch: bool  # normalizes by the batch, unless a traced flag says otherwise
    updates: bool


def use(stats: Mapping[str, Any], use_running_average: bool | Array) -> Use:
    """How a call with this flag uses the statistics of a layer.

    | flag | marks | by_batch | updates |
    |---|---|---|---|
    | True | any | False | False |
    | False or traced | none | True | True |
    | False or traced | running | False | True |
    | False or traced | held | True | False |
    | False or traced | both | False | False |
    """
    trains = use_running_average is not True
    return Use(trains and RUNNING not in stats, trains and HELD not in stats)


def marks(stats: Mapping[str, ArrayLike], *names: str) -> dict[str, Array]:
    """The marks of these names for a layer.

    As large as its statistics, so that they can be split wherever these are, as over
    the steps of a scan over layers.
    """
    return {name: jnp.ones(shape_of(stats), bool) for name in names}


def without(stats: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """`stats` without the entries of these names."""
    return {k: v for k, v in stats.items() if k not in names}


def shape_of(stats: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the statistics of a layer."""
    return jnp.shape(stats["var" if "var" in stats else "mean"])
