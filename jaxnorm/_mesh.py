"""Norms of arrays on a mesh with explicit axes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

from jax import Array

from jaxnorm._base import Norm, Params, Stats
from jaxnorm._running import as_arrays
from jaxnorm._sharding import automatically, on_explicit_mesh

Applied = tuple[Array, dict[str, Array]]  # what normalizing gives


def on_any_mesh(apply: Callable[..., Applied]) -> Callable[..., Applied]:
    """The `apply` of a norm, also on a mesh of explicit axes.

    The result is sharded as `x`, and the new statistics are as the old ones.
    """

    @functools.wraps(apply)
    def call(norm: Norm, x: Array, params: Params, stats: Stats, **how: Any) -> Applied:
        # Kernels are parted along explicit axes, so that they can be exported.
        parted = getattr(norm, "implementation", None) not in (None, "xla")
        if parted or not on_explicit_mesh(x, params, stats, how):
            return apply(norm, x, params, stats, **how)
        stats = as_arrays(stats)
        settings = {k: v for k, v in vars(norm).items() if isinstance(v, Array)}

        def applied(
            settings: dict[str, Array],
            how: dict[str, Any],
            x: Array,
            params: Params,
            stats: Stats,
        ) -> Applied:
            own = dataclasses.replace(cast(Any, norm), **settings) if settings else norm
            return apply(own, x, params, stats, **how)

        arrays = settings, how, x, params, stats
        return automatically(applied, *arrays, like=(x, stats))

    return call
