r"""Positional normalization (Li et al., 2019, https://arxiv.org/abs/1907.04312).

    y = \frac{x - \mu_p}{\sqrt{\sigma_p^2 + \epsilon}}

Statistics over: the features, for each example and position. The function returns the
    moments, too.
Take it for: generators that give the moments back to a later layer (a moment shortcut).
Not for: networks that do not use the moments: layer norm is the same, with scale and
    bias.
"""

from collections.abc import Sequence

from jax import Array
from jax.typing import ArrayLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._dtypes import as_floating
from jaxnorm._moments import Moments
from jaxnorm._stateless import StatelessNorm


class PositionalNorm(StatelessNorm):
    """Normalizes each position of each example over its features; has no parameters.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        axis: the feature axis or axes.
    """

    param_names = ()
    epsilon: float = 1e-5
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        axis = canonicalize(self.axis, len(shape))
        return Axes.over(shape, axis, axis)


def positional_norm(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, Moments]:
    """Normalizes each position over its features, and returns its moments beside it.

        mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
        y = (x - mean) / sqrt(var + epsilon)

    A later layer takes the moments as its bias and scale (a moment shortcut):
    `y * sqrt(m.var + epsilon) + m.mean`.

    Args:
        x: array of numbers; integers are read as float32.
        axis: the feature axis or axes.
        epsilon: added to the variance.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices the features are split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.

    Returns:
        y, of the shape and dtype of x, and the moments, in at least float32, with 1 for
        the axes of features.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes or axes that do not
            fit, and for a single feature.

    Source: Li, Wu, Weinberger and Belongie, 2019.

    >>> import jax.numpy as jnp, jaxnorm
    >>> y, m = jaxnorm.positional_norm(jnp.array([[1.0, 3.0], [10.0, 30.0]]))
    >>> print(y.round(3).tolist(), m.mean.ravel(), m.var.ravel())
    [[-1.0, 1.0], [-1.0, 1.0]] [ 2. 20.] [  1. 100.]
    """
    norm = PositionalNorm(
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    x = as_floating(x)
    problem = norm.single_value_problem(x.shape, by_batch=True)
    if problem:
        raise ValueError(problem)
    return norm.normalize_by_batch(x, {}, mask=mask, dtype=None)
