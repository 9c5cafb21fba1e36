r"""Activation normalization (Kingma and Dhariwal, 2018, https://arxiv.org/abs/1807.03039).

    y = x \gamma + \beta

Statistics over: nothing: scale and bias are parameters, which `init_from_batch` sets
    such that the first batch has mean 0 and variance 1 after them.
Take it for: normalizing flows, and nets that are to start as if normalized, but to
    depend on no batch.
Not for: nets that rely on a norm to keep the scale of its output while they train.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, canonicalize
from jaxnorm._base import Params
from jaxnorm._dtypes import as_floating, at_least_float32, out_dtype
from jaxnorm._standardize import as_param, standardize
from jaxnorm._stateless import StatelessNorm
from jaxnorm._working import as_mask, mask_to_working


class ActNorm(StatelessNorm):
    """A scale and a bias for each feature, with the inverse and the log-determinant
    that a flow needs. `jaxnorm.models.init_from_batch` sets both by a batch.

    Attributes:
        epsilon: not used: there is no variance.
        axis_name: none is taken: `init_from_batch` pools over devices.
        axis_index_groups: none are taken, likewise.
        axis: the feature axis or axes.
    """

    real_only = True
    center = False
    can_sync = False
    is_affine = True
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.over(shape, (), canonicalize(self.axis, len(shape)))

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        wide = at_least_float32(x.dtype)
        zero, one = jnp.zeros((), wide), jnp.ones((), wide)
        scale, bias = params.get("scale"), params.get("bias")
        how = {"scale": scale, "bias": bias, "mask": mask, "dtype": dtype}
        return standardize(x, zero, one, self.axes(x.shape), **how)

    def inverse(
        self,
        y: ArrayLike,
        params: Params,
        *,
        mask: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """The `x` that has become `y`: `(y - bias) / scale`, and 0 where `mask` is
        false. All else is as in a call."""
        y, axes, scale, bias = self._prepared(y, params)
        dtype = out_dtype(y, dtype)
        return standardize(y, bias, 1 / scale, axes, mask=mask, dtype=dtype)

    def log_det(
        self, x: ArrayLike, params: Params, *, mask: ArrayLike | None = None
    ) -> Array:
        """The logarithm of `abs(det(dy / dx))` for each example, (batch,).

            log(abs(scale)), summed over the elements of the example

        What `mask` excludes counts for nothing. In at least float32; of the array `x`
        the shape and dtype count alone. Raises ValueError where `x` has no axis of
        examples before those of the features, and what a call raises.
        """
        x, axes, scale, _ = self._prepared(x, params)
        if 0 in axes.feature:
            raise ValueError(
                f"the first axis must be that of examples, got axis={self.axis} for an "
                f"array of shape {x.shape}: add an axis of one example"
            )
        each = jnp.broadcast_to(jnp.log(abs(scale)), axes.working_shape)
        mask = as_mask(mask, x.shape)
        if mask is not None:
            each = jnp.where(mask_to_working(mask, axes), each, 0)
        return each.sum(tuple(range(1, each.ndim)))

    def _prepared(
        self, x: ArrayLike, params: Params
    ) -> tuple[Array, Axes, Array, Array]:
        """A checked array, its axes, and scale and bias as they broadcast to it."""
        x = as_floating(x)
        self.check_call(x, params, {})
        axes, wide = self.axes(x.shape), at_least_float32(x.dtype)
        scale, bias = (as_param(k, params.get(k), axes, wide) for k in self.param_names)
        shape = axes.param_shape()
        scale = jnp.ones(shape, wide) if scale is None else scale
        return x, axes, scale, jnp.zeros(shape, wide) if bias is None else bias


def act_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
) -> Array:
    """Scales and shifts each feature by parameters that a first batch has set.

        y = x * scale + bias

    `ActNorm` has the inverse and the log-determinant. `jaxnorm.models.init_from_batch`
    sets the scales and biases of a model by a batch.

    Args:
        x: array of numbers; integers are read as float32.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        axis: the feature axis or axes.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes comes out as 0.

    Returns:
        y, of the shape and dtype of x, computed in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for axes or parameters that do not fit.

    Source: Kingma and Dhariwal, 2018.

    >>> import jax.numpy as jnp, jaxnorm
    >>> norm = jaxnorm.ActNorm()
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> params = {"scale": jnp.array([2.0, 1.0]), "bias": jnp.array([0.0, -1.0])}
    >>> y, _ = norm(x, params, {})
    >>> print(y[0], norm.inverse(y, params)[0], norm.log_det(x, params).round(3))
    [2. 1.] [1. 2.] [0.693 0.693]
    """
    norm = ActNorm(axis=axis)
    return norm(x, {"scale": scale, "bias": bias}, {}, mask=mask)[0]
