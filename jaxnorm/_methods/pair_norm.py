r"""Pair normalization (Zhao and Akoglu, 2020, https://arxiv.org/abs/1909.12223).

    y = s \frac{x - \mu_s}{\sqrt{\sum_f \sigma_{s,f}^2 + \epsilon}}

Statistics over: the nodes of a graph; its features have a mean each and share one
    deviation. A call takes the `segment_ids` of the nodes.
Take it for: deep graph neural networks, whose nodes become alike: the mean square
    distance of the nodes of a graph stays the same from layer to layer.
Not for: features of different scales, which it keeps; it has no parameters.

The sum over the features of their variances is the mean square of the distance of a
node from the mean of its graph.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._exact import abs_square
from jaxnorm._methods._segmented import SegmentedNorm
from jaxnorm._moments import Moments
from jaxnorm._working import to_working


class PairNorm(SegmentedNorm):
    """Centres each graph of a batch and divides it by the root mean square of the
    distance of its nodes from the centre.

    With `scale_individually`, each node is divided by its own distance instead.

    Attributes:
        epsilon: added to the square of the distance.
        axis_name: mapped axis, or several, whose devices share graphs.
        axis_index_groups: groups of indices along `axis_name` that share graphs.
        num_segments: number of graphs; None for as many as there are nodes.
        scale: what the distance from the centre becomes.
        scale_individually: give each node this distance, and not only their mean.
        axis: the feature axis or axes.
    """

    param_names = ()
    scale: float = 1.0
    scale_individually: bool = False
    axis: int | Sequence[int] = -1

    def within(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)

    def taken(
        self, x: Array, params: Params, m: Moments, mask: Array
    ) -> tuple[Params, Moments]:
        axes = self.within(x.shape)
        if self.scale_individually:
            centered = (to_working(x, mask, axes) - m.mean) - m.residue
            squares = abs_square(jnp.where(mask, centered, 0))
        else:
            squares = m.var
        m = m._replace(var=squares.sum(axes.feature, keepdims=True))
        scale = jnp.full(axes.feature_shape, self.scale, m.var.dtype)
        return {"scale": scale}, m


def pair_norm(
    x: ArrayLike,
    *,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    scale: float = 1.0,
    scale_individually: bool = False,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Centres each graph of a batch and divides it by the distance of its nodes.

        for s in range(num_segments):
            v = x[segment_ids == s]
            v = v - v.mean(0)
            square = (v**2).sum(-1, keepdims=True)
            if not scale_individually:
                square = square.mean(0)
            y[segment_ids == s] = scale * v / sqrt(square + epsilon)

    in one pass, whatever the number of graphs. It has no parameters.

    Args:
        scale: what the distance from the centre becomes.
        scale_individually: give each node this distance, and not only their mean.

    All else is as in `jaxnorm.segment_norm`.

    Source: Zhao and Akoglu, 2020.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 0.0], [10.0, 0.0], [3.0, 0.0], [10.0, 8.0]])
    >>> print(jaxnorm.pair_norm(x, segment_ids=jnp.array([0, 1, 0, 1])).round(3))
    [[-1.  0.]
     [ 0. -1.]
     [ 1.  0.]
     [ 0.  1.]]
    """
    norm = PairNorm(
        num_segments=num_segments,
        scale=scale,
        scale_individually=scale_individually,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    return norm(x, {}, {}, mask=mask, segment_ids=segment_ids)[0]
