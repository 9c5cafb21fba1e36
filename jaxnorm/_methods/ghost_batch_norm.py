r"""Ghost batch normalization (Hoffer et al., 2017, https://arxiv.org/abs/1705.08741).

    y_i = \frac{x_i - \mu_{g(i)}}{\sqrt{\sigma^2_{g(i)} + \epsilon}} \gamma + \beta
    g(i) = \left\lfloor \frac{i}{\mathrm{size}} \right\rfloor

Statistics over: all axes but the features, within each `size` consecutive examples. The
    last virtual batch takes a remainder as well, and devices pool only the running
    statistics.
Take it for: large batches, where the noise of the statistics of small ones is wanted as
    a regularizer, or where devices are not to wait for each other.
Not for: batches that are small already.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.core import max_dim
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments, pool
from jaxnorm._normalize import normalize
from jaxnorm._reduce import moments
from jaxnorm._stateful import RunningNorm


class GhostBatchNorm(RunningNorm):
    """Batch norm within each virtual batch of `size` consecutive examples.

    Examples that are left over join the last virtual batch. `axis_name` pools the
    running statistics only: a virtual batch stays on its device.

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, to pool the running statistics over.
        axis_index_groups: groups of indices along `axis_name` that share these.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        size: examples per virtual batch.
        axis: the feature axis or axes.
    """

    epsilon: float = 1e-5
    size: int = 32
    axis: int | Sequence[int] = -1

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be at least 1 example, got {self.size}")

    @one_rounding
    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, Moments]:
        positions = self.axes((1, *x.shape[1:])).size
        if self.size * positions == 1:
            raise ValueError(
                f"size=1 leaves one value per variance in an input of shape {x.shape}: "
                "choose larger virtual batches"
            )
        if x.shape[0] % self.size:
            y, each = self._by_ragged(x, params, mask, dtype)
        else:
            virtual = Axes.virtual_batches(x.shape, self.axis, self.size)
            y, each = normalize(
                x, params, virtual, epsilon=self.epsilon, mask=mask, dtype=dtype
            )
        whole = pool(each, lambda v: v.sum(0, keepdims=True))
        return y, self.sync(whole)

    def _by_ragged(
        self, x: Array, params: Params, mask: ArrayLike | None, dtype: DTypeLike | None
    ) -> tuple[Array, Moments]:
        """With a last virtual batch that is larger, or the only one."""
        each = moments(x, Axes.per_example(x.shape, self.axis), mask=mask)
        each = each.broadcast_to(each.var.shape)
        cut = max_dim(x.shape[0] // self.size - 1, 0) * self.size
        equal = pool(
            Moments(
                *(
                    v[:cut].reshape(cut // self.size, self.size, *v.shape[1:])
                    for v in each
                )
            ),
            lambda v: v.sum(1, keepdims=True),
        )
        last = pool(
            Moments(*(v[cut:] for v in each)), lambda v: v.sum(0, keepdims=True)
        )
        mean, var, residue = (
            jnp.concatenate(
                [
                    jnp.repeat(a[:, 0], self.size, 0),
                    jnp.repeat(b, x.shape[0] - cut, 0),
                ]
            )
            for a, b in (
                (equal.mean, last.mean),
                (equal.var, last.var),
                (equal.residue, last.residue),
            )
        )
        m = Moments(mean, var, 1, residue)
        y = self.normalize_by(x, params, m, mask=mask, dtype=dtype)
        return y, each


def ghost_batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool | ArrayLike,
    size: int = 32,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm within each virtual batch of `size` consecutive examples.

        x = x.reshape(batch // size, size, ...)
        y = batch norm of each x[i], with the same scale and bias

    If `size` does not divide the batch, the last virtual batch takes the remainder as
    well; a smaller batch is one virtual batch. The running statistics follow the
    moments of the whole batch, and evaluation knows no virtual batches. Under jit, with
    examples sharded over devices and virtual batches that do not straddle them, y needs
    no communication (but one boolean on a CPU, see `jaxnorm.moments`).

    Args:
        size: examples per virtual batch.
        axis_name: mapped axis, or several, to pool the running statistics over.

    All else is as in `jaxnorm.batch_norm`.

    Source: Hoffer, Hubara and Soudry, 2017.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
    >>> y, _ = jaxnorm.ghost_batch_norm(
    ...     x, jaxnorm.init_stats(1), use_running_average=False, size=2
    ... )
    >>> print(y.round(3).ravel())
    [-1.  1. -1.  1.]
    """
    norm = GhostBatchNorm(
        size=size,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    params = {"scale": scale, "bias": bias}
    return norm(x, params, stats, use_running_average=use_running_average, mask=mask)
