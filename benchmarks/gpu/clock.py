"""How long the kernels of a call take, by CUPTI; and a call, by the clock."""

import collections
import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from gpu.plan import Plan

PRODUCTS = re.compile("cutlass|sm90_xmma|gemm|nvjet|cublas", re.IGNORECASE)


def rotating(f: Callable[..., Any], args: Any, cache: int) -> Callable[[], Any]:
    """Calls `f` with copies of `args` in turn, more of them than the cache holds."""
    leaves = [v for v in jax.tree.leaves(args) if isinstance(v, jax.Array)]
    size = max(1, sum(v.nbytes for v in leaves))
    copies = [args]
    for _ in range(min(7, -(-cache // size) - 1)):
        copies.append(jax.tree.map(lambda v: v.copy(), args))
    count = itertools.count()
    return lambda: f(*copies[next(count) % len(copies)])


def kernel_times(call: Callable[[], Any], plan: Plan) -> dict[str, float] | None:
    """Microseconds of one call by name of kernel; None where CUPTI is not to be had."""
    extension = _cupti()
    if extension is None:
        return None
    jax.block_until_ready(call())
    try:
        extension._cupti_init()
        jax.block_until_ready([call() for _ in range(plan.repeats)])
        found = extension._cupti_get_timings(False)
    except RuntimeError:
        _refused.append(True)
        return None
    total = collections.Counter()
    for name, milliseconds in found or ():
        total[name] += milliseconds * 1000 / plan.repeats
    return dict(total) or None


_refused: list[bool] = []  # not empty once it has refused to work


def _cupti() -> Any:
    if jax.default_backend() != "gpu" or _refused:
        return None
    # Its own `measure` takes one compiled function and one set of arguments.
    from jax.experimental.mosaic.gpu import profiler

    extension = getattr(profiler.mosaic_gpu_lib, "_mosaic_gpu_ext", None)
    return extension if hasattr(extension, "_cupti_init") else None


def by_clock(call: Callable[[], Any], plan: Plan) -> float:
    """Microseconds that one more call takes where many are queued."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count - 1):
            call()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return each_of_many(seconds, plan)


def each_of_many(seconds: Callable[[int], float], plan: Plan) -> float:
    """Microseconds of one more call, where `seconds(count)` times a queue of them."""
    seconds(1)
    each = max(seconds(2) / 2, 1e-6)
    few = max(1, min(50, int(plan.seconds_queued / each / 4)))
    more, less = seconds(3 * few), seconds(few)
    # Where all is noise, as of tiny arrays, at least no less than nothing.
    slope = (more - less) / (2 * few)
    return 1e6 * (slope if slope > 0 else more / (3 * few))


def microseconds(call: Callable[[], Any], plan: Plan) -> float:
    """Of all kernels of a call, by CUPTI, or else of the call by the clock."""
    times = kernel_times(call, plan)
    return sum(times.values()) if times else by_clock(call, plan)


def without_products(times: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in times.items() if not PRODUCTS.search(k)}
