r"""Domain-specific batch norm (Chang et al., 2019, https://arxiv.org/abs/1906.03950).

    y_i = \frac{x_i - \mu_{d(i)}}{\sqrt{\sigma^2_{d(i)} + \epsilon}} \gamma + \beta

Statistics over: all axes but the features, within each domain. A call takes the
    `domain` of each example.
Take it for: one network for data of several sources, or for clean and adversarial
    examples, mixed in one batch.
Not for: domains of which a batch holds few examples, or that are not known in
    evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Params, Stats
from jaxnorm._dtypes import one_rounding
from jaxnorm._moments import Moments
from jaxnorm._segments import (
    along,
    as_ids,
    moments_of_segment,
    of_segment,
    segment_moments,
)
from jaxnorm._stateful import RunningNorm
from jaxnorm._working import as_mask


class DomainBatchNorm(RunningNorm):
    """Batch norm within each domain, in batches that mix domains.

    The input `domain` says which of `num_domains` each example belongs to. With
    `share_affine=False` each has a scale and bias of its own. Split or auxiliary batch
    norm is the same, with domains by slice: jnp.arange(n) // (n // num_domains).

    Attributes:
        epsilon: added to the variance.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        momentum: weight of the old statistics; None for the average of all batches.
        unbiased: keep the unbiased variance, as PyTorch does.
        num_domains: number of domains.
        share_affine: have one scale and bias for all domains.
        axis: the feature axis or axes.
    """

    required_inputs = ("domain",)
    epsilon: float = 1e-5
    num_domains: int = 2
    share_affine: bool = True
    axis: int | Sequence[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_domains < 1:
            raise ValueError(f"num_domains must be at least 1, got {self.num_domains}")

    def axes(self, shape: Shape) -> Axes:
        return Axes.keep(shape, self.axis)

    def init_params(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Ones for the scale, zeros for the bias; for each domain, unless shared."""
        shape = () if self.share_affine else (self.num_domains,)
        return super().init_params((*shape, *feature_shape), dtype)

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Those of batch norm, along a leading axis of domains."""
        return super().init_stats((self.num_domains, *feature_shape), dtype)

    def from_single(
        self, params: Params, stats: Stats
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Parameters and statistics of this norm from those of a trained batch norm:
        every domain starts with a copy."""

        def copies(tree: Mapping[str, ArrayLike | None]) -> dict[str, Array]:
            return {
                k: jnp.broadcast_to(jnp.asarray(v), (self.num_domains, *jnp.shape(v)))
                for k, v in tree.items()
                if v is not None
            }

        shared = {k: jnp.asarray(v) for k, v in params.items() if v is not None}
        return shared if self.share_affine else copies(params), copies(stats)

    def stats_axes(self, shape: Shape) -> Axes:
        table = (self.num_domains, *self.axes(shape).feature_shape)
        return Axes.keep(table, tuple(range(len(table))))

    @one_rounding
    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, Moments]:
        axes = Axes.per_example(x.shape, self.axis)
        domain = self._ids(inputs["domain"], x.shape)
        m = self.sync(segment_moments(x, axes, domain, self.num_domains, mask))
        return self._standardized(x, params, m, domain, mask, dtype), m

    @one_rounding
    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> Array:
        domain = self._ids(inputs["domain"], x.shape)
        m = running.read(stats, self.stats_axes(x.shape), x.dtype)
        shape = (self.num_domains, *self.axes(x.shape).stats_shape[1:])
        m = Moments(m.mean.reshape(shape), m.var.reshape(shape), 1)
        return self._standardized(x, params, m, domain, mask, dtype)

    def _ids(self, domain: ArrayLike, shape: Shape) -> Array:
        return as_ids("domain", domain, shape, self.num_domains)

    def _standardized(
        self,
        x: Array,
        params: Params,
        m: Moments,
        domain: Array,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        params = dict(params)
        if not self.share_affine:
            self._check_affine(params, x.shape)
            params = {
                k: of_segment(domain, jnp.asarray(v))
                for k, v in params.items()
                if v is not None
            }
        own = moments_of_segment(domain, m)
        y = self.normalize_by(x, params, own, mask=mask, dtype=dtype)
        # At the end only, so that no gradient of what exists meets a NaN.
        missing = along(domain == self.num_domains, x.ndim)
        mask = as_mask(mask, x.shape)
        shown = missing if mask is None else missing & mask
        return jnp.where(shown, jnp.asarray(jnp.nan, y.dtype), y)

    def _check_affine(self, params: Params, shape: Shape) -> None:
        expected = self.stats_axes(shape).shape
        for k, v in params.items():
            if v is not None and jnp.shape(v) != expected:
                raise ValueError(
                    f"{k} has shape {jnp.shape(v)}, but the features of an input of "
                    f"shape {shape} with {self.num_domains} domains are {expected}"
                )


def domain_batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    domain: ArrayLike,
    use_running_average: bool | ArrayLike,
    num_domains: int = 2,
    share_affine: bool = True,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Batch norm of the examples of each domain by the statistics of that domain.

        for d in range(num_domains):
            y[domain == d], stats[d] = batch_norm(x[domain == d], stats[d])

    in one pass, whatever the mixture. A domain that the batch lacks keeps its
    statistics. An example whose domain does not exist comes out as NaN, and counts in
    no statistic.

    Args:
        stats: {"mean", "var"} of shape (num_domains, *features), from
            `DomainBatchNorm(num_domains=...).init_stats`, or `from_single`.
        scale, bias: as in batch norm; of shape (num_domains, *features) with
            `share_affine=False`.
        domain: (batch,), integers from 0 to num_domains - 1.

    All else is as in `jaxnorm.batch_norm`.

    Source: Chang, You, Seo, Kwak and Han, 2019; as auxiliary batch norm, Xie et al.,
    2019, https://arxiv.org/abs/1911.09665.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0], [10.0], [3.0], [30.0]])
    >>> y, stats = jaxnorm.domain_batch_norm(
    ...     x,
    ...     jaxnorm.DomainBatchNorm().init_stats((1,)),
    ...     domain=jnp.array([0, 1, 0, 1]),
    ...     use_running_average=False,
    ...     momentum=0.0,
    ... )
    >>> print(y.round(3).ravel(), stats["mean"].ravel())
    [-1. -1.  1.  1.] [ 2. 20.]
    """
    norm = DomainBatchNorm(
        num_domains=num_domains,
        share_affine=share_affine,
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    return norm(
        x,
        {"scale": scale, "bias": bias},
        stats,
        use_running_average=use_running_average,
        mask=mask,
        domain=domain,
    )
