"""Which elements of an array count, how much, and how many are taken at once?"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax import Array, lax

from jaxnorm._axes import Axes
from jaxnorm._wide_data import Data, as_data
from jaxnorm._working import as_mask, as_weights

MAX_SIZE = 2**31 - 1  # moments are taken of at most so many elements at once


class Sample(NamedTuple):
    """Data, the axes that it is reduced over, and which elements count, or how much."""

    data: Data
    axes: Axes
    mask: Array | None
    weights: Array | None  # 0 where the mask is false, if there is one


def as_sample(x: Any, axis: Any, mask: Any, weights: Any) -> Sample:
    """The arguments of a fit, checked."""
    data = as_data(x)
    axes = Axes.keep(data.high.shape, axis)
    mask = as_mask(mask, axes.shape)
    return Sample(data, axes, mask, as_weights(weights, mask, axes.shape))


def pieces_of(sample: Sample, num_devices: int) -> Iterator[Sample]:
    """`sample` in parts of no more elements, on all devices together, than can be taken
    at once."""
    total = sample.axes.size * num_devices
    if isinstance(total, int) and total > MAX_SIZE:  # a symbolic one is not known
        for half in _halves(sample):
            yield from pieces_of(half, num_devices)
    else:
        yield sample


def _halves(sample: Sample) -> Iterator[Sample]:
    """Two parts along the longest of the axes that are reduced."""
    axes = sample.axes
    along = max(axes.reduce, key=lambda a: axes.shape[a])
    middle, end = axes.shape[along] // 2, axes.shape[along]

    def part(v: Array, start: int, stop: int) -> Array:
        whole = v.shape[along] == 1
        return v if whole else lax.slice_in_dim(v, start, stop, axis=along)

    data, _, mask, weights = sample
    for start, stop in ((0, middle), (middle, end)):
        cut = [
            jax.tree.map(lambda v, ends=(start, stop): part(v, *ends), tree)
            for tree in (data, mask, weights)
        ]
        shape = cut[0].high.shape
        yield Sample(cut[0], Axes.keep(shape, axes.feature), cut[1], cut[2])
