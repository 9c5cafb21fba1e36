r"""Iterative normalization (Huang et al., 2019, https://arxiv.org/abs/1904.03441).

    y = (x - \mu) \Sigma^{-1/2} \gamma + \beta
    \Sigma = \frac{1}{n} (x - \mu)^T (x - \mu) + \epsilon I

Statistics over: all axes but the features, for each pair of features within a group.
    Masks are of whole positions.
Take it for: networks whose features are to be decorrelated, and not only scaled.
Not for: groups with as many features as there are values for each: the covariance is
    not of full rank then.
"""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _devices as devices
from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape, is_known
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import at_least_float32, one_rounding
from jaxnorm._moments import Moments
from jaxnorm._sharding import vary_together
from jaxnorm._standardize import affine, as_param, pointwise
from jaxnorm._stateful import StatefulNorm
from jaxnorm._working import aligned, as_mask, to_working


class IterNorm(StatefulNorm):
    """Whitens each group of features: subtracts the mean and multiplies by the inverse
    root of the covariance, which Newton's iteration approaches.

    More iterations whiten more; few leave features of little variance alone. A mask is
    of whole positions: it has 1 for the feature axis.

    Attributes:
        epsilon: added to the diagonal of the covariance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics.
        iterations: of Newton's method.
        num_groups: number of groups of consecutive features, or None.
        group_size: number of features in each, or None; one of the two is given.
        axis: the feature axis.
    """

    real_only = True
    epsilon: float = 1e-5
    momentum: float = 0.9
    iterations: int = 5
    num_groups: int | None = None
    group_size: int | None = 64
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, operator.index(self.axis))

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Mean 0, and the identity to whiten each group with."""
        dtype = at_least_float32(dtype)
        if len(feature_shape) != 1:
            raise ValueError(f"IterNorm has one feature axis, got {feature_shape}")
        count, size = self._groups(*feature_shape)
        whitening = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (count, size, size))
        return {"mean": jnp.zeros(feature_shape, dtype), "whitening": whitening}

    @one_rounding
    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, dict[str, Array]]:
        axes = self.axes(x.shape)
        valid = self._checked(x, stats, mask)
        m = self.batch_moments(x, valid)
        total = devices.group_sum(self._products(x, m, valid), self.peers())
        size = jnp.max(jnp.asarray(m.size))  # the same for all features
        matrix = self._whitening(total / jnp.maximum(size, 1).astype(total.dtype))
        y = self._whitened(x, params, m, matrix, valid, dtype)
        when = running.all_finite(m.mean, matrix) & (size > 1)
        new = {"mean": m.mean.reshape(axes.feature_shape), "whitening": matrix}
        new = {
            k: running.moving_average(jnp.asarray(stats[k]), v, self.momentum)
            for k, v in new.items()
        }
        return y, running.replaced(stats, new, when)

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        valid = self._checked(x, stats, mask)
        wide = at_least_float32(x.dtype)
        mean, matrix = (
            jnp.asarray(stats[k]).astype(wide) for k in ("mean", "whitening")
        )
        mean = mean.reshape(axes.param_shape())
        m = Moments(mean, jnp.ones_like(mean), 1)
        return self._whitened(x, params, m, matrix, valid, dtype)

    def _groups(self, features: int) -> tuple[int, ...]:
        """How many groups of features there are, and of how many."""
        size = self.group_size
        if size is not None and self.num_groups is None and is_known(features):
            size = min(size, features)  # a group of 64 at most, of fewer features
        axes = Axes.groups(
            (1, features), -1, num_groups=self.num_groups, group_size=size
        )
        return axes.working_shape[1:]

    def _checked(self, x: Array, stats: Stats, mask: ArrayLike | None) -> Array | None:
        """The mask, of the rank of x; raises where anything does not fit."""
        known = as_mask(mask, x.shape)
        if known is not None:
            known = aligned(known, x.shape)
            if known.shape[self.axis] != 1:
                raise ValueError(
                    f"IterNorm takes masks of whole positions, with 1 for the feature "
                    f"axis {self.axis}, got shape {known.shape}"
                )
        self.check_stats(stats, x.shape)
        return known

    def _rows(self, x: Array, mean: Array, residue: Array, mask: Array | None) -> Array:
        """Centred, as (..., groups, features of each); 0 where masked."""
        axes = self.axes(x.shape)
        x = to_working(x, mask, axes) - mean - residue
        x = x if mask is None else jnp.where(mask, x, 0)
        x = jnp.moveaxis(x, axes.feature[0], -1)
        return x.reshape(*x.shape[:-1], *self._groups(x.shape[-1]))

    def _products(self, x: Array, m: Moments, mask: Array | None) -> Array:
        """Sums of products of features; only `x` is kept for the backward pass."""

        def products(x: Array, mean: Array, residue: Array) -> Array:
            rows = self._rows(x, mean, residue, mask)
            return jnp.einsum("...gi,...gj->gij", rows, rows, precision="highest")

        given = vary_together(x, m.mean, jnp.asarray(m.residue))
        return jax.checkpoint(products, prevent_cse=False)(x, *given)

    def _whitening(self, covariance: Array) -> Array:
        """The inverse square root of `covariance + epsilon`, by Newton's iteration."""
        one = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)[None]
        covariance = covariance + self.epsilon * one
        trace = jnp.trace(covariance, axis1=1, axis2=2)[:, None, None]
        # p and its product with the covariance, side by side: alone, p would lose that
        # it commutes with it, and diverge after some ten steps.
        product, root = covariance / trace, jnp.broadcast_to(one, covariance.shape)
        for _ in range(self.iterations):
            step = (3 * one - _product(root, product)) / 2
            product, root = _product(product, step), _product(step, root)
        return root * lax.rsqrt(trace)

    def _whitened(
        self,
        x: Array,
        params: Params,
        m: Moments,
        matrix: Array,
        mask: Array | None,
        dtype: DTypeLike | None,
    ) -> Array:
        axes = self.axes(x.shape)
        scale, bias = (
            as_param(k, params.get(k), axes, matrix.dtype) for k in self.param_names
        )

        def whiten(
            x: Array,
            mean: Array,
            residue: Array,
            matrix: Array,
            scale: Array | None,
            bias: Array | None,
        ) -> Array:
            rows = self._rows(x.reshape(axes.shape), mean, residue, None)
            y = jnp.einsum("...gi,gij->...gj", rows, matrix, precision="highest")
            at = axes.feature[0]
            others = axes.shape[:at] + axes.shape[at + 1 :]
            y = jnp.moveaxis(y.reshape(*others, axes.shape[at]), -1, at)
            return affine(y, scale, bias)

        arrays = (m.mean, jnp.asarray(m.residue), matrix, scale, bias)
        return pointwise(whiten, x, axes, *arrays, mask=mask, dtype=dtype)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def iter_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    num_groups: int | None = None,
    group_size: int | None = 64,
    iterations: int = 5,
    axis: int = -1,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    mask: Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Whitens each group of features over the batch and space.

        x = x - mean
        s = x.T @ x / len(x) + epsilon * eye(d)
        p = eye(d)
        for _ in range(iterations):
            p = (3 * p - p @ p @ p @ s / trace(s)) / 2
        y = x @ p / sqrt(trace(s)) * scale + bias

    `stats` follow the mean and the matrix `p / sqrt(trace(s))`, and stand in for them
    with `use_running_average=True`. Over devices it takes two collectives each way, of
    the size of the matrices.

    Args:
        stats: {"mean", "whitening"}, of shape (features,) and (groups, d, d), from
            `IterNorm().init_stats`.
        num_groups, group_size: the number of groups of consecutive features, or the
            features in each; exactly one is not None, and divides the features. Fewer
            than `group_size` features are one group.
        iterations: of Newton's method.
        momentum: weight of the old statistics.
        mask: of whole positions, with 1 for the feature axis.

    All else is as in `jaxnorm.batch_norm`.

    Source: Huang, Zhou, Zhu, Liu and Shao, 2019.

    >>> import jax.numpy as jnp, jaxnorm, numpy as np
    >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0], [2.0, -2.0], [-2.0, 2.0]])
    >>> y, _ = jaxnorm.iter_norm(
    ...     x, jaxnorm.IterNorm().init_stats((2,)), use_running_average=False
    ... )
    >>> print(np.cov(y.T, bias=True).round(2) + 0)
    [[1. 0.]
     [0. 1.]]
    """
    norm = IterNorm(
        num_groups=num_groups,
        group_size=group_size,
        iterations=iterations,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
