r"""Dynamic tanh (Zhu et al., 2025, https://arxiv.org/abs/2503.10622).

    y = \tanh(\alpha x) \gamma + \beta

Statistics over: nothing: each element by itself.
Take it for: transformers that are to train without statistics, in place of layer norm.
Not for: networks that rely on a norm to fix the scale of its input.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._base import Params
from jaxnorm._dtypes import at_least_float32
from jaxnorm._standardize import affine, as_number, as_param, pointwise
from jaxnorm._stateless import StatelessNorm


class DynamicTanh(StatelessNorm):
    """A tanh of learned steepness in the place of a norm; takes no statistics.

    It does not normalize: with an `initial_alpha` that is too small, a signal fades out
    over the layers of a deep network.

    Attributes:
        epsilon: not used: there is no variance.
        axis_name: none is taken: devices share nothing.
        axis_index_groups: none are taken, likewise.
        axis: the feature axis or axes.
        initial_alpha: what the parameter alpha starts at.
    """

    real_only = True
    param_names = ("scale", "bias", "alpha")
    center = False
    can_sync = False
    axis: int | Sequence[int] = -1
    initial_alpha: float = 0.5

    def axes(self, shape: Shape) -> Axes:
        return Axes.over(shape, (), canonicalize(self.axis, len(shape)))

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias, and one alpha."""
        return super().init_params(feature_shape, dtype) | {
            "alpha": jnp.full((), self.initial_alpha, dtype)
        }

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes, wide = self.axes(x.shape), at_least_float32(x.dtype)
        scale, bias = (
            as_param(k, params.get(k), axes, wide) for k in self.param_names[:2]
        )
        alpha = as_number("alpha", params.get("alpha"), self.initial_alpha, wide)

        def squash(
            x: Array, alpha: Array, scale: Array | None, bias: Array | None
        ) -> Array:
            return affine(jnp.tanh(alpha * x), scale, bias)

        return pointwise(squash, x, axes, alpha, scale, bias, mask=mask, dtype=dtype)


def dynamic_tanh(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
) -> Array:
    """Squashes each element by a tanh, as layer norm does on the whole.

        y = tanh(alpha * x) * scale + bias

    Args:
        x: array of numbers; integers are read as float32.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        alpha: one number; None is 0.5.
        axis: the feature axis or axes.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes comes out as 0.

    Returns:
        y, of the shape and dtype of x, computed in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes or parameters that do not fit.

    Source: Zhu, Chen, He, LeCun and Liu, 2025.

    >>> import jax.numpy as jnp, jaxnorm
    >>> print(jaxnorm.dynamic_tanh(jnp.array([[-1.0, 0.0, 2.0]])).round(3))
    [[-0.462  0.     0.762]]
    """
    norm = DynamicTanh(axis=axis)
    return norm(x, {"scale": scale, "bias": bias, "alpha": alpha}, {}, mask=mask)[0]
