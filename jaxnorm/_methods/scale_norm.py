r"""Scale normalization (Nguyen and Salazar, 2019, https://arxiv.org/abs/1910.05895).

    y = \frac{x}{\sqrt{\sum x^2 + \epsilon}} \gamma

Statistics over: the features, for each example and position.
Take it for: transformers, in place of layer norm; without its scale, for queries and
    keys (L2 normalization).
Not for: features that need a scale each: there is one for all.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding
from jaxnorm._standardize import standardize
from jaxnorm._stateless import StatelessNorm


class ScaleNorm(StatelessNorm):
    """Divides each vector of features by its length; has one learned length for all.

    Attributes:
        epsilon: added to the sum of squares.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        axis: the feature axis or axes.
    """

    param_names = ("scale",)
    center = False
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        axis = canonicalize(self.axis, len(shape))
        return Axes.over(shape, axis, axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """One scale, the square root of the number of features."""
        return {"scale": jnp.full((), math.prod(feature_shape) ** 0.5, dtype)}

    @one_rounding
    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        m = self.batch_moments(x, mask)
        size = jnp.asarray(m.size).astype(m.var.dtype)
        squares = m._replace(var=m.var * size)
        scale = params.get("scale")
        if scale is not None:
            scale = _on_features(scale, axes)
        return standardize(
            x,
            m.mean,
            squares.rstd(self.epsilon),
            axes,
            scale=scale,
            mask=mask,
            dtype=dtype,
        )


def _on_features(scale: ArrayLike, axes: Axes) -> Array:
    """One number, or one per example, for all features."""
    scale = jnp.asarray(scale)
    batch = axes.shape[:1]
    if scale.shape not in ((), batch):
        raise ValueError(
            f"scale has shape {scale.shape}, but a scale norm has one number for all "
            f"features: pass shape (), or {batch} for one per example"
        )
    ones = (1,) * len(axes.feature)
    shape = (*scale.shape, *axes.feature_shape)
    return jnp.broadcast_to(scale.reshape(*scale.shape, *ones), shape)


def scale_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Divides each vector of features by its Euclidean length.

        y = x / sqrt((x**2).sum(axis, keepdims=True) + epsilon) * scale

    Without `scale` it is the L2 normalization that queries and keys get before their
    product.

    Args:
        x: array of numbers; integers are read as float32.
        scale: one number, or one per example, (batch,); None is 1.
        axis: the feature axis or axes.
        epsilon: added to the sum of squares.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices the features are split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.

    Returns:
        y, of the shape and dtype of x; the sum is taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes or axes that do not
            fit.

    Source: Nguyen and Salazar, 2019.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> print(np.asarray(jaxnorm.scale_norm(jnp.array([[3.0, 4.0]]), 10.0)).round(3))
    [[6. 8.]]
    """
    norm = ScaleNorm(
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    return norm(x, {"scale": scale}, {}, mask=mask)[0]
