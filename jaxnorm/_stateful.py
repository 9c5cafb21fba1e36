"""Norms that learn statistics in training and use them in evaluation."""

import abc
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import _running as running
from jaxnorm._axes import Axes, Shape
from jaxnorm._base import Norm, Params, Stats
from jaxnorm._marks import BATCH, MARKS, SWITCHES, use, without
from jaxnorm._mesh import apply_automatically
from jaxnorm._moments import Moments
from jaxnorm._running import as_arrays
from jaxnorm._sharding import on_explicit_mesh


class StatefulNorm(Norm):
    """A norm that learns statistics in training and uses them in evaluation."""

    momentum: float | None = 0.99
    counts_batches: ClassVar[bool] = False  # whether momentum=None averages all batches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is None and not self.counts_batches:
            raise ValueError(
                f"{type(self).__name__} does not count batches to average over all of "
                "them, as momentum=None asks for: give a weight from 0 to 1"
            )

    @abc.abstractmethod
    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, dict[str, Array]]:
        """The normalized batch, and the statistics after it."""

    @abc.abstractmethod
    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        """`x` normalized by `stats`."""

    @final
    def check_stats(self, stats: Stats, shape: Shape) -> None:
        """Raises unless `stats` hold what `init_stats` makes for inputs of `shape`."""
        running.require(stats, self._expected(shape))
        self._check_entries(as_arrays(stats), shape)

    def _check_entries(self, stats: Mapping[str, Array], shape: Shape) -> None:
        """Raises for statistics of names, shapes or kinds that `init_stats` has not."""
        expected = self._expected(shape)
        # Methods that keep but one of mean and var leave the other as it is.
        known = {"mean", "var", *expected, *MARKS}
        unknown = sorted(set(stats) - known)
        if unknown:
            raise ValueError(
                f"stats holds {unknown}, but {self} keeps {sorted(expected)}: start "
                "from its init_stats"
            )
        for k, (like, integer) in expected.items():
            if k in stats and jnp.shape(stats[k]) != like:
                raise ValueError(
                    f"stats[{k!r}] has shape {jnp.shape(stats[k])}, but for an input "
                    f"of shape {shape} it is {like}: start from init_stats of {self}"
                )
            if k in stats and integer == jnp.issubdtype(stats[k].dtype, jnp.inexact):
                raise TypeError(
                    f"stats[{k!r}] is {stats[k].dtype}: start from init_stats of {self}"
                )

    def _expected(self, shape: Shape) -> dict[str, tuple[Shape, bool]]:
        """The shape of each statistic for inputs of `shape`, and whether it counts."""
        features = self.axes(shape).feature_shape
        try:
            hash(self)
        except TypeError:  # as with a setting that is traced
            return _initial.__wrapped__(self, features)
        return _initial(self, features)

    @final
    def apply(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        use_running_average: bool | Array,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        how = {"mask": mask, "dtype": dtype, **inputs}
        if on_explicit_mesh(x, params, stats, how, use_running_average):
            how["use_running_average"] = use_running_average
            return apply_automatically(self, x, params, stats, how)
        by_batch, updates = use(stats, use_running_average)
        same = as_arrays(stats)
        own = without(same, SWITCHES)
        self._check_accumulation(stats)
        self._check_entries(own, x.shape)
        if not (by_batch or updates):
            return self.evaluate(x, params, own, **how), same
        self.check_bound()
        params = self._without_renewal(params, use_running_average, updates)
        y, new = self.train(x, params, own, **how)
        new = same | new if updates else same
        if not by_batch:
            y = self.evaluate(x, params, own, **how)
        if use_running_average is False:
            return y, new
        evaluated = self.evaluate(x, params, own, **how), same
        choose = functools.partial(jnp.where, use_running_average)
        return jax.tree.map(choose, evaluated, (y, new))

    def _check_accumulation(self, stats: Stats) -> None:
        if BATCH[0] in stats:
            kept = sorted({*stats} - {*MARKS})
            raise ValueError(
                f"{type(self).__name__} moves {kept} by a rule of its own at each step,"
                " and not towards statistics of one batch, so that those of several "
                "batches cannot be pooled: leave its layers out with `where`"
            )

    def _without_renewal(
        self, params: Params, flag: bool | Array, updates: bool
    ) -> Params:
        """`params`; the backward pass renews controls only where statistics move."""
        if updates and flag is False:
            return params
        stops = flag if updates else True

        def stopped(v: ArrayLike) -> Array:
            return jnp.where(stops, lax.stop_gradient(v), v)

        held = {k: v for k, v in params.items() if k in self.controls and v is not None}
        return {**params, **{k: stopped(v) for k, v in held.items()}}


@functools.lru_cache(256)
def _initial(norm: Norm, features: Shape) -> dict[str, tuple[Shape, bool]]:
    stats = jax.eval_shape(lambda: norm.init_stats(features))
    return {
        k: (v.shape, jnp.issubdtype(v.dtype, jnp.integer)) for k, v in stats.items()
    }


class RunningNorm(StatefulNorm):
    """A norm by batch moments in training and by their moving average in evaluation.

    `momentum` is the weight of the old statistics at each step; None keeps the average
    over all batches instead. With `unbiased` the variance kept is the unbiased one, as
    in PyTorch; the batch is always normalized by the biased one.
    """

    unbiased: bool = False
    counts_batches = True
    # Whether the statistics are moments of the data, or else averages over batches.
    keeps_moments: ClassVar[bool] = True
    stat_names: ClassVar[tuple[str, ...]] = ("mean", "var")

    def by_batch(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> tuple[Array, Moments]:
        """Normalizes by the batch; returns the moments that the running ones follow,
        one of each per feature. Over `axes`, unless a method says otherwise."""
        return self.normalize_by_batch(x, params, mask=mask, dtype=dtype)

    def init_stats(
        self, feature_shape: Shape, dtype: DTypeLike = jnp.float32
    ) -> dict[str, Array]:
        """Mean 0 and variance 1, and a count where `momentum` is None."""
        return running.init_stats(
            feature_shape,
            momentum=self.momentum,
            dtype=dtype,
            stat_names=self.stat_names,
        )

    def train(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        **inputs: Any,
    ) -> tuple[Array, dict[str, Array]]:
        y, m = self.by_batch(x, params, stats, mask=mask, dtype=dtype, **inputs)
        return y, self.updated(stats, m, x.shape)

    def stats_axes(self, shape: Shape) -> Axes:
        """Axes whose features have the shape of the running statistics."""
        return self.axes(shape)

    @final
    def updated(self, stats: Stats, m: Moments, shape: Shape) -> dict[str, Array]:
        """The statistics, moved towards those of a batch of `shape`, or with its
        moments pooled into those of batches before."""
        if BATCH[0] in stats:
            how = {"averaged": not self.keeps_moments}
            return running.accumulate(stats, m, self.stats_axes(shape), **how)
        return running.update_stats(
            stats,
            m,
            self.stats_axes(shape),
            momentum=self.momentum,
            unbiased=self.unbiased,
            stat_names=self.stat_names,
            least=2 if self.center else 1,
        )

    def _check_accumulation(self, stats: Stats) -> None:
        """Any statistics of batches can be pooled."""

    def evaluate(
        self,
        x: Array,
        params: Params,
        stats: Stats,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        m = running.read(stats, self.axes(x.shape), x.dtype, stat_names=self.stat_names)
        return self.normalize_by(x, params, m, mask=mask, dtype=dtype)
