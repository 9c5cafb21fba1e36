r"""Graph normalization (Cai et al., 2020, https://arxiv.org/abs/2009.03294).

    y = \frac{x - \alpha \mu_s}{\sqrt{\nu_s + \epsilon}} \gamma + \beta
    \nu_s = \mathrm{mean}_s (x - \alpha \mu_s)^2

Statistics over: the nodes of a graph, for each feature. A call takes the `segment_ids`
    of the nodes.
Take it for: graph neural networks on batches of graphs, in which the mean over a graph
    tells of its structure and should not be lost.
Not for: tasks on the nodes of one graph, where batch norm takes the same statistics and
    costs nothing in evaluation.

$\alpha$ is `mean_scale`, a learned share of the mean for each feature.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params
from jaxnorm._exact import abs_square
from jaxnorm._methods._segmented import SegmentedNorm
from jaxnorm._moments import Moments
from jaxnorm._standardize import as_param


class GraphNorm(SegmentedNorm):
    """Normalizes each feature of each graph of a batch, after it has subtracted a
    learned share of the mean over the graph.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share graphs.
        axis_index_groups: groups of indices along `axis_name` that share graphs.
        num_segments: number of graphs; None for as many as there are nodes.
        axis: the feature axis or axes.
    """

    param_names = ("scale", "bias", "mean_scale")
    axis: int | Sequence[int] = -1

    def within(self, shape: Shape) -> Axes:
        return Axes.per_example(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale and for the share of the mean, zeros for the bias."""
        return super().init_params(feature_shape, dtype) | {
            "mean_scale": jnp.ones(feature_shape, dtype)
        }

    def taken(
        self, x: Array, params: Params, m: Moments, mask: Array
    ) -> tuple[Params, Moments]:
        axes = self.within(x.shape)
        share = as_param("mean_scale", params.get("mean_scale"), axes, m.var.dtype)
        return params, m if share is None else _less_of_the_mean(m, share)


def _less_of_the_mean(m: Moments, share: Array) -> Moments:
    """`share` of the mean, and the mean square about it. What is left of the mean goes
    into the residue, so that nothing is rounded where the mean is large."""
    left = (1 - share) * m.mean
    return m._replace(var=m.var + abs_square(left), residue=share * m.residue - left)


def graph_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    mean_scale: ArrayLike | None = None,
    *,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Normalizes each feature of each graph by its nodes, less a share of their mean.

        for s in range(num_segments):
            v = x[segment_ids == s]
            v = v - mean_scale * v.mean(0)
            y[segment_ids == s] = v / sqrt((v**2).mean(0) + epsilon) * scale + bias

    in one pass, whatever the number of graphs.

    Args:
        scale, bias: of the shape of the features, or (nodes, *features); None is 1, 0.
        mean_scale: likewise; None is 1, with which it is instance norm over a graph.

    All else is as in `jaxnorm.segment_norm`.

    Source: Cai, Luo, Xu, He, Liu and Wang, 2020.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0], [10.0], [3.0], [30.0]])
    >>> graph = jnp.array([0, 1, 0, 1])
    >>> print(jaxnorm.graph_norm(x, segment_ids=graph).round(3).ravel())
    [-1. -1.  1.  1.]
    >>> y = jaxnorm.graph_norm(x, mean_scale=jnp.zeros(1), segment_ids=graph)
    >>> print(np.asarray(y).round(3).ravel())
    [0.447 0.447 1.342 1.342]
    """
    norm = GraphNorm(
        num_segments=num_segments,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias, "mean_scale": mean_scale}
    return norm(x, params, {}, mask=mask, segment_ids=segment_ids)[0]
