r"""Local response norm (Krizhevsky et al., 2012, https://papers.nips.cc/paper/4824).

    y_c = \frac{x_c}{\left(k + \frac{\alpha}{\mathrm{size}} \sum_{j} x_j^2\right)^\beta}

Statistics over: neighbouring features at each position; nothing is shared over devices.
Take it for: networks such as AlexNet that were trained with it.
Not for: new networks: with its defaults it hardly changes the scale of its input.

Summed up with others in Ren et al., 2016, https://arxiv.org/abs/1611.04520.
"""

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._base import Params
from jaxnorm._exact import overflow_as_nan
from jaxnorm._methods import _windows as windows
from jaxnorm._standardize import pointwise
from jaxnorm._stateless import StatelessNorm


class LocalResponseNorm(StatelessNorm):
    """Divides each element by a power of the sum of squares of its `size` neighbours
    along the features; has no parameters.

    Attributes:
        epsilon: not used: `k` is added instead.
        axis_name: none is taken: devices share nothing.
        axis_index_groups: none are taken, likewise.
        size: number of neighbouring features, the element itself among them.
        alpha: factor of the mean square.
        beta: power of the divisor.
        k: added to the mean square, after its factor.
        axis: the feature axis.
    """

    real_only = True
    param_names = ()
    center = False
    can_sync = False
    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        windows.as_widths(self.size, 1, "size")

    def axes(self, shape: Shape) -> Axes:
        axis = canonicalize(self.axis, len(shape))
        return Axes.over(shape, axis, axis)

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)

        def respond(x: Array) -> Array:
            squares = windows.total(x * x, axes.feature, (self.size,))
            power = self.k + self.alpha / self.size * overflow_as_nan(squares)
            return x * power**-self.beta

        return pointwise(respond, x, axes, mask=mask, dtype=dtype)


def local_response_norm(
    x: ArrayLike,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    axis: int = -1,
    mask: ArrayLike | None = None,
) -> Array:
    """Divides each element by a power of the squares of its neighbours in `axis`.

        near = x[..., max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        y[..., c] = x[..., c] / (k + alpha / size * (near**2).sum(-1)) ** beta

    Args:
        x: array of numbers; integers are read as float32.
        size: number of neighbouring features, the element itself among them.
        alpha, beta, k: as above; `alpha` is divided by `size`, as in PyTorch.
        axis: the feature axis.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.

    Returns:
        y, of the shape and dtype of x; sums are taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes or sizes that do not fit.

    Source: Krizhevsky, Sutskever and Hinton, 2012.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0, 2.0, 3.0]])
    >>> y = jaxnorm.local_response_norm(x, size=2, alpha=2.0, beta=1.0)
    >>> print(np.asarray(y).round(3))
    [[0.5   0.333 0.214]]
    """
    norm = LocalResponseNorm(size=size, alpha=alpha, beta=beta, k=k, axis=axis)
    return norm(x, {}, {}, mask=mask)[0]
