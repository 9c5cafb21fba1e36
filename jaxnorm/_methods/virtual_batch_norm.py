r"""Virtual batch normalization (Salimans et al., 2016,
https://arxiv.org/abs/1606.03498).

    y_i = \frac{x_i - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}} \gamma + \beta
    \mu_i, \sigma_i^2 \;\text{of}\; \{x_1, \dots, x_{\mathrm{size}}\} \cup \{x_i\}

Statistics over: the first `size` examples (the reference batch) and the example itself,
    over all axes but the features.
Take it for: generators, and whatever must give an example the same result whichever
    others are in its batch.
Not for: networks for which the reference batch in each step, in evaluation as well,
    costs too much.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax.numpy as jnp
from jax import Array
from jax.core import min_dim
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape, is_known
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments, pool
from jaxnorm._reduce import moments
from jaxnorm._stateless import StatelessNorm


class VirtualBatchNorm(StatelessNorm):
    """Normalizes each example by the statistics of a reference batch and itself.

    The reference batch is the first `size` examples; they are normalized by their own.
    `axis_name` pools the reference batch over devices.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        size: examples in the reference batch, on each device.
        axis: the feature axis or axes.
    """

    epsilon: float = 1e-5
    size: int = 32
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be at least 1 example, got {self.size}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def without_devices(self) -> Self:
        # A model may be initialized with a single example.
        return dataclasses.replace(super().without_devices(), size=1)

    def single_value_problem(self, shape: Shape, by_batch: bool) -> str | None:
        self.axes(shape)  # which raises if there is no batch
        reference = min_dim(self.size, shape[0]), *shape[1:]
        return super().single_value_problem(reference, by_batch)

    @one_rounding
    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        batch = x.shape[0]
        if min_dim(self.size, batch) != self.size:
            hint = "put the reference batch before the examples"
            if not is_known(batch):
                hint = f'give jax.export.symbolic_shape "{batch} >= {self.size}"'
            raise ValueError(
                f"size={self.size} examples of reference do not fit in an input of "
                f"shape {x.shape}: {hint}"
            )
        each = moments(x, Axes.per_example(x.shape, self.axis), mask=mask)
        each = each.broadcast_to(each.var.shape)
        first, others = (
            Moments(*v) for v in zip(*map(self._parted, each), strict=True)
        )
        reference = self.sync(pool(first, lambda v: v.sum(0, keepdims=True)))
        both = Moments(*map(_stacked, reference, others))
        pooled = pool(both, lambda v: v.sum(0, keepdims=True))
        mean, var, residue = (
            jnp.concatenate([jnp.broadcast_to(a, b.shape), c[0]])
            for a, b, c in (
                (reference.mean, first.mean, pooled.mean),
                (reference.var, first.var, pooled.var),
                (reference.residue, first.residue, pooled.residue),
            )
        )
        m = Moments(mean, var, 1, residue)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)

    def _parted(self, v: Array) -> tuple[Array, Array]:
        return v[: self.size], v[self.size :]


def _stacked(reference: Array, others: Array) -> Array:
    """Pairs of sets along a new leading axis."""
    return jnp.stack([jnp.broadcast_to(reference, others.shape), others])


def virtual_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    size: int = 32,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Array:
    """Normalizes each example by a reference batch, the first `size` examples of `x`,
    and itself.

        reference = x[:size]
        y[i] = x[i] normalized by the moments of reference, if i < size,
               else by those of concatenate([reference, x[i]])

    An example's output does not depend on the other examples beside it. Choose the
    reference batch once and put it before every batch, in training and evaluation: it
    goes through all layers with it.

    Args:
        x: array of numbers, (batch, ..., features) by default; integers are read as
            float32.
        scale, bias: of the shape of the features, or (batch, *features); None is 1, 0.
        size: examples in the reference batch, on each device.
        axis: the feature axis or axes; not the leading one.
        epsilon: added to the variance.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices the reference is split.
        axis_index_groups: groups of indices along `axis_name` that share a reference.

    Returns:
        y, of the shape and dtype of x; moments are taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit, and for a reference batch of one single value per feature.

    Source: Salimans et al., 2016.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0], [3.0], [2.0]])
    >>> print(jaxnorm.virtual_batch_norm(x, size=2).round(3).ravel())
    [-1.  1.  0.]
    """
    norm = VirtualBatchNorm(
        size=size,
        axis=axis,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    return norm(x, {"scale": scale, "bias": bias}, {}, mask=mask)[0]
