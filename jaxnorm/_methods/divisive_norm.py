r"""Divisive normalization (Ren et al., 2016, https://arxiv.org/abs/1611.04520).

    y = \frac{v}{\sqrt{\sigma^2 + \mathrm{mean}(v^2) + \epsilon}} \gamma + \beta
    v = x - \mathrm{mean}(x)

Statistics over: a window about each element, along `window_axes`; nothing is shared
    over devices.
Take it for: images and sequences in which light or loudness changes from place to
    place.
Not for: windows as wide as the input, for which layer norm does the same with fewer
    sums.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._base import Params
from jaxnorm._dtypes import at_least_float32, one_rounding
from jaxnorm._exact import overflow_as_nan
from jaxnorm._methods import _windows as windows
from jaxnorm._standardize import affine, as_number, as_param, pointwise
from jaxnorm._stateless import StatelessNorm
from jaxnorm._working import as_mask


class DivisiveNorm(StatelessNorm):
    """Subtracts from each element the mean of its neighbours and divides by the root
    of their mean square, with a learned deviation to smooth it.

    Neighbours lie within a window of `window` elements along each of `window_axes`.

    Attributes:
        epsilon: added to the mean square.
        axis_name: none is taken: devices share nothing.
        axis_index_groups: none are taken, likewise.
        window: elements per window, for each of `window_axes` or for all.
        window_axes: the axes along which elements are near each other.
        axis: the feature axis or axes.
        initial_sigma: what the parameter sigma starts at.
    """

    real_only = True
    param_names = ("scale", "bias", "sigma")
    center = False
    can_sync = False
    window: int | Sequence[int] = 5
    window_axes: int | Sequence[int] = -1
    axis: int | Sequence[int] = -1
    initial_sigma: float = 1.0

    def axes(self, shape: Shape) -> Axes:
        along = canonicalize(self.window_axes, len(shape), "window_axes")
        return Axes.over(shape, along, canonicalize(self.axis, len(shape)))

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias, and one sigma."""
        return super().init_params(feature_shape, dtype) | {
            "sigma": jnp.full((), self.initial_sigma, dtype)
        }

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
        along = axes.reduce
        widths = windows.as_widths(self.window, len(along), "window")
        mask = as_mask(mask, x.shape)
        wide = at_least_float32(x.dtype)
        # Without a mask, the number of neighbours depends on the place along windows.
        flat = tuple(n if a in along else 1 for a, n in enumerate(x.shape))
        scale, bias = (
            as_param(k, params.get(k), axes, wide) for k in self.param_names[:2]
        )
        smooth = jnp.square(
            as_number("sigma", params.get("sigma"), self.initial_sigma, wide)
        )

        def divide(
            x: Array, smooth: Array, scale: Array | None, bias: Array | None
        ) -> Array:
            valid = jnp.ones(flat, bool) if mask is None else mask
            valid = jnp.broadcast_to(valid, flat if mask is None else x.shape)
            near = jnp.maximum(windows.total(valid.astype(wide), along, widths), 1)
            # Far from 0, the sums over windows would lose what x varies by.
            count = valid.sum(along, keepdims=True, dtype=wide)
            level = x.sum(along, keepdims=True) / jnp.maximum(count, 1)
            level = lax.stop_gradient(level)
            x = jnp.where(valid, x - level, 0)
            centered = jnp.where(valid, x - windows.total(x, along, widths) / near, 0)
            power = windows.total(centered * centered, along, widths) / near
            square = overflow_as_nan(smooth + power + self.epsilon)
            y = centered * lax.rsqrt(square)
            return affine(y, scale, bias)

        return pointwise(divide, x, axes, smooth, scale, bias, mask=mask, dtype=dtype)


def divisive_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    sigma: ArrayLike | None = None,
    *,
    window: int | Sequence[int] = 5,
    window_axes: int | Sequence[int] = -1,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
) -> Array:
    """Normalizes each element by the elements near it.

        near(i) = x[max(0, i - window // 2) : i + (window - 1) // 2 + 1]
        v = x - mean of near(x)
        y = v / sqrt(sigma**2 + mean of near(v**2) + epsilon) * scale + bias

    With windows as wide as the input and sigma = 0 it is layer norm. The paper adds an
    L1 penalty on `v` to the loss; that is left to the loss.

    Args:
        x: array of numbers; integers are read as float32.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        sigma: one number; None is 1.
        window: elements per window, for each of `window_axes` or for all.
        window_axes: the axes along which elements are near each other.
        axis: the feature axis or axes, which carry scale and bias.
        epsilon: added to the mean square.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0. Nor does what lies outside the array count.

    Returns:
        y, of the shape and dtype of x; sums are taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes, windows or parameters that do
            not fit.

    Source: Ren, Liao, Urtasun, Sinz and Zemel, 2016.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0, 3.0, 5.0, 3.0]])
    >>> print(np.asarray(jaxnorm.divisive_norm(x, sigma=0.0, window=3)).round(3))
    [[-1.414  0.     1.386 -0.849]]
    """
    norm = DivisiveNorm(
        window=window, window_axes=window_axes, axis=axis, epsilon=epsilon
    )
    params = {"scale": scale, "bias": bias, "sigma": sigma}
    return norm(x, params, {}, mask=mask)[0]
