"""The same norms in PyTorch, eager and compiled, and in Liger's kernels.

Times are those of the stream between events, with many calls queued: of large arrays
they are those of the kernels.
"""

import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu.clock import each_of_many
from gpu.plan import Plan, Settings, Shape
from gpu.work import Item, Row

EPSILON = 1e-6


def items(settings: Settings) -> Iterator[Item]:
    plan = settings.plan
    for shape in plan.main_rows + plan.more_rows:
        for norm in ("LN", "RMS"):
            run = functools.partial(rows, plan, norm, shape)
            yield Item(f"torch {norm} {shape}", run)
    for shape in plan.maps:
        yield Item(f"torch GN + SiLU {shape}", functools.partial(maps, plan, shape))
    for shape in plan.images:
        yield Item(f"torch BN + ReLU {shape}", functools.partial(images, plan, shape))


def rows(plan: Plan, norm: str, shape: Shape) -> Iterator[Row]:
    torch = _torch()
    functional = torch.nn.functional
    scale, bias = _params(torch, shape, torch.bfloat16)
    if norm == "LN":

        def eager(x, scale, bias):
            return functional.layer_norm(x, shape[-1:], scale, bias, EPSILON)
    else:

        def eager(x, scale, bias):
            return functional.rms_norm(x, shape[-1:], scale, EPSILON)

    given = {"norm": norm, "shape": list(shape)}
    yield from _timed(plan, "torch", given, eager, shape, (scale, bias))
    if torch.cuda.is_available() and shape in plan.main_rows[:1]:
        compiled = torch.compile(eager)
        yield from _timed(plan, "torch.compile", given, compiled, shape, (scale, bias))
    yield from _timed(plan, "liger", given, _liger(norm), shape, (scale, bias))


def _liger(norm: str) -> Callable[..., Any]:
    """Raises ImportError where it is not installed."""
    if norm == "LN":
        ops = importlib.import_module("liger_kernel.ops.layer_norm")
        return lambda x, w, b: ops.LigerLayerNormFunction.apply(x, w, b, EPSILON)
    ops = importlib.import_module("liger_kernel.ops.rms_norm")
    # Not in place, or it would write the gradient over the cotangent of the next call.
    how = EPSILON, 0.0, "llama", False
    return lambda x, w, b: ops.LigerRMSNormFunction.apply(x, w, *how)


def maps(plan: Plan, shape: Shape) -> Iterator[Row]:
    torch = _torch()
    functional = torch.nn.functional
    params = _params(torch, shape, torch.bfloat16)

    def eager(x, scale, bias):
        return functional.silu(functional.group_norm(x, 32, scale, bias, EPSILON))

    given = {"norm": "GN + SiLU", "shape": list(shape)}
    yield from _timed(plan, "torch", given, eager, shape, params)


def images(plan: Plan, shape: Shape) -> Iterator[Row]:
    """By cuDNN, where it is channels last."""
    torch = _torch()
    functional = torch.nn.functional
    params = _params(torch, shape, torch.float32)
    stats = [torch.zeros(shape[-1:]), torch.ones(shape[-1:])]

    def eager(x, scale, bias):
        return functional.relu(
            functional.batch_norm(x, *stats, scale, bias, True, 0.1, EPSILON)
        )

    given = {"norm": "BN + ReLU", "shape": list(shape)}
    yield from _timed(plan, "torch", given, eager, shape, params)


def _torch() -> Any:
    torch = importlib.import_module("torch")
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    return torch


def _timed(
    plan: Plan,
    impl: str,
    given: Row,
    f: Callable[..., Any],
    shape: Shape,
    params: Any,
) -> Iterator[Row]:
    """Forward pass and gradient, beside `both` of `times`; and inference."""
    torch = _torch()
    copies = max(1, min(8, -(-plan.cache // (2 * math.prod(shape)))))
    xs, dys = ([_array(torch, shape) for _ in range(copies)] for _ in range(2))
    for x in xs:
        x.requires_grad_()

    def both(k: int) -> None:
        x, dy = xs[k % copies], dys[k % copies]
        torch.autograd.grad(f(x, *params), [x, *params], dy, allow_unused=True)

    def inference(k: int) -> None:
        with torch.no_grad():
            f(xs[k % copies], *params)

    for mode, call in (("both", both), ("inference", inference)):
        row = given | {"mode": mode, "dtype": "bfloat16", "impl": impl}
        yield row | {"us": [_microseconds(torch, call, plan) for _ in range(2)]}


def _params(torch: Any, shape: Shape, dtype: Any) -> list[Any]:
    """Scale and bias; in bfloat16, PyTorch's norms of rows are single kernels."""
    ones = (torch.ones(shape[-1:], dtype=dtype) for _ in range(2))
    return [v.requires_grad_() for v in ones]


def _array(torch: Any, shape: Shape) -> Any:
    """Channels last in memory, where PyTorch has them second."""
    x = torch.randn(shape).to(torch.bfloat16)
    return x if len(shape) == 2 else x.movedim(-1, 1)


def _microseconds(torch: Any, call: Callable[[int], None], plan: Plan) -> float:
    def seconds(count: int) -> float:
        if not torch.cuda.is_available():
            start = time.perf_counter()
            for k in range(count):
                call(k)
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for k in range(count):
            call(k)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return each_of_many(seconds, plan)
