r"""Segment normalization (Ba et al., 2016, https://arxiv.org/abs/1607.06450).

    y = \frac{x - \mu_{s,g}}{\sqrt{\sigma_{s,g}^2 + \epsilon}} \gamma + \beta

Statistics over: the nodes of a segment, such as a graph of the batch, and a group of
    features. A call takes the `segment_ids` of the nodes.
Take it for: layer, group and instance norm of whole graphs, point clouds or sequences
    that are packed along one axis.
Not for: statistics of one node, which layer norm takes, or of all, which batch norm
    takes.

With one group of features it is the layer norm of each graph, with one feature in each
group the instance norm.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._methods._segmented import SegmentedNorm


class SegmentNorm(SegmentedNorm):
    """Normalizes each segment of nodes, such as a graph of a batch, within each group
    of features.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share segments.
        axis_index_groups: groups of indices along `axis_name` that share segments.
        num_segments: number of segments; None for as many as there are nodes.
        num_groups: number of groups of consecutive features, or None.
        group_size: number of features in each, or None; one of the two is given.
        axis: the feature axis.
    """

    num_groups: int | None = 1
    group_size: int | None = None
    axis: int = -1

    def within(self, shape: Shape) -> Axes:
        return Axes.groups(
            shape, self.axis, num_groups=self.num_groups, group_size=self.group_size
        )


def segment_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    num_groups: int | None = 1,
    group_size: int | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Normalizes each segment of the nodes in `x` within each group of features.

        for s in range(num_segments):
            y[segment_ids == s] = group_norm(x[None, segment_ids == s], ...)[0]

    in one pass, whatever the number of segments. `num_groups=1` is layer norm over a
    graph, and `num_groups=None, group_size=1` instance norm over it. The variance is
    biased; in a segment of one value it is 0, and so is y before the bias.

    Args:
        x: array of numbers, (nodes, ..., features) by default; integers are read as
            float32.
        scale, bias: (features,), or (nodes, features); None is 1 and 0.
        segment_ids: (nodes,), integers from 0 to num_segments - 1, in any order. Nodes
            with others are padding: they count for nothing and come out as 0.
        num_segments: number of segments, some of which may be empty; None for as many
            as there are nodes, which needs more memory.
        num_groups, group_size: the number of groups of consecutive features, or the
            features in each; exactly one is not None, and divides the features.
        axis: the feature axis.
        epsilon: added to the variance.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices the nodes of a segment
            are spread; `segment_ids` number the segments alike on all of them.
        axis_index_groups: groups of indices along `axis_name` that share segments.

    Returns:
        y, of the shape and dtype of x; moments are taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit, for `axis_name` without `num_segments`, and where each variance
            would be that of one single value.

    Source: Ba, Kiros and Hinton, 2016; of graphs, Fey and Lenssen, 2019,
    https://arxiv.org/abs/1903.02428.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0], [10.0], [3.0], [30.0]])
    >>> y = jaxnorm.segment_norm(x, segment_ids=jnp.array([0, 1, 0, 1]))
    >>> print(y.round(3).ravel())
    [-1. -1.  1.  1.]
    """
    norm = SegmentNorm(
        num_segments=num_segments,
        num_groups=num_groups,
        group_size=group_size,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, {}, mask=mask, segment_ids=segment_ids)[0]
