"""Norms of arrays on a mesh with explicit axes."""

import dataclasses
from typing import Any, cast

from jax import Array

from jaxnorm._base import Norm, Params, Stats
from jaxnorm._running import as_arrays
from jaxnorm._sharding import automatically


def apply_automatically(
    norm: Norm, x: Array, params: Params, stats: Stats, how: dict[str, Any]
) -> tuple[Array, dict[str, Array]]:
    """`norm.apply`, with the explicit axes of the mesh automatic within it.

    The result is sharded as `x`, and the new statistics are as the old ones.
    """
    stats = as_arrays(stats)
    settings = {k: v for k, v in vars(norm).items() if isinstance(v, Array)}

    def apply(
        settings: dict[str, Array],
        how: dict[str, Any],
        x: Array,
        params: Params,
        stats: Stats,
    ) -> tuple[Array, dict[str, Array]]:
        own = dataclasses.replace(cast(Any, norm), **settings) if settings else norm
        return own.apply(x, params, stats, **how)

    return automatically(apply, settings, how, x, params, stats, like=(x, stats))
