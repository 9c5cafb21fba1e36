"""Norms by the statistics of segments of the leading axis: the graphs of a batch."""

import abc
from typing import final

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding, recomputed
from jaxnorm._moments import Moments
from jaxnorm._segments import along, as_ids, moments_of_segment, segment_moments
from jaxnorm._stateless import StatelessNorm
from jaxnorm._working import as_mask


class SegmentedNorm(StatelessNorm):
    """A norm of nodes, along the leading axis, by the moments of each segment of them.

    A node whose segment is not one of `num_segments` (as many as there are nodes, if
    None) is padding: it counts for nothing and comes out as 0.
    """

    required_inputs = ("segment_ids",)
    epsilon: float = 1e-5
    num_segments: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_segments is not None and self.num_segments < 1:
            raise ValueError(
                f"num_segments must be at least 1, got {self.num_segments}: pass None "
                "for as many as there are nodes"
            )

    @abc.abstractmethod
    def within(self, shape: Shape) -> Axes:
        """The axes of an array of `shape` that are reduced within one node."""

    @final
    def axes(self, shape: Shape) -> Axes:
        each = self.within(shape)
        return each._replace(reduce=(0, *each.reduce))

    def taken(
        self, x: Array, params: Params, m: Moments, mask: Array
    ) -> tuple[Params, Moments]:
        """The parameters and moments that `x` is normalized with, where `m` are those
        of each node's segment."""
        return params, m

    @final
    @one_rounding
    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        segment_ids: ArrayLike,
    ) -> Array:
        count = self._count(x.shape)
        ids = as_ids("segment_ids", segment_ids, x.shape, count)
        valid = along(ids != count, x.ndim)
        given = as_mask(mask, x.shape)
        valid = valid if given is None else valid & given

        # Not kept: the moments of each node are as large as x, if it has no other axis.
        @recomputed
        def moments(x: Array) -> Moments:
            return segment_moments(x, self.within(x.shape), ids, count, valid)

        @recomputed
        def normalized(x: Array, params: Params, table: Moments) -> Array:
            params, m = self.taken(x, params, moments_of_segment(ids, table), valid)
            # Nodes that are rows are taken as rows: their gradient takes less memory.
            how = {"mask": valid, "dtype": dtype, "axes": self.within(x.shape)}
            return self.normalize_by(x, params, m, **how)

        return normalized(x, params, self.sync(moments(x)))

    def _count(self, shape: Shape) -> int:
        if self.num_segments is None and self.axis_name is not None:
            raise ValueError(
                f"num_segments=None is the number of nodes here, but axis_name="
                f"{self.axis_name!r} shares segments between devices, which must "
                "number them alike: pass num_segments, and the same segment_ids for "
                "the nodes of one segment on all devices"
            )
        return shape[0] if self.num_segments is None else self.num_segments
