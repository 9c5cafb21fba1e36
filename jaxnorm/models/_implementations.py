"""Which code runs for each norm of a function: a kernel of ours, or XLA's formula."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params

from jaxnorm._arguments import check_function
from jaxnorm._primitives._operation import Operation, why_unfit


class Implementation(NamedTuple):
    """What computes one operation on one kind of array, `times` in all."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    kernel: str | None  # its name, or None for XLA's formula
    reason: str | None  # why there is no kernel
    times: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        often = f"{self.times} times " if self.times > 1 else ""
        by = self.kernel or f"XLA's formula, as {self.reason}"
        return f"{often}{self.operation} of {self.dtype} {shape}: {by}"


class Implementations(tuple[Implementation, ...]):
    """What computes the norms of a function; printed one in a line."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing is normalized"


# Where JAX lowers for another name than it gives the backend. A GPU of another maker is
# one on which kernels for NVIDIA's do not serve.
_LOWERED_AS = {"gpu": "cuda"}


def implementations(function: Callable[..., Any], *args: Any) -> Implementations:
    """Which implementation each norm in `function(*args)` takes on this machine, and
    why.

    The function is traced, not run: `args` may be `jax.ShapeDtypeStruct`. Pass the
    gradient to see what its backward pass takes. What is said is of one device: where
    XLA spreads a computation over several, kernels for CPUs do not serve, and in what
    `jax.export` writes, it is XLA's formula throughout.

    >>> import jax, jax.numpy as jnp, jaxnorm
    >>> x = jax.ShapeDtypeStruct((4096, 1000), jnp.complex64)
    >>> print(jaxnorm.models.implementations(jaxnorm.layer_norm, x))
    row_norm of complex64 4096x1000: XLA's formula, as the kernels take float32, \
bfloat16, float16, float64, not complex64
    """
    check_function("function", function)
    backend = jax.default_backend()
    platform = _LOWERED_AS.get(backend, backend)
    closed = jax.make_jaxpr(function)(*args)
    found = collections.Counter(
        _of_operation(op, platform, eqn) for op, eqn in _operations(closed.jaxpr)
    )
    return Implementations(v._replace(times=n) for v, n in found.items())


def _operations(jaxpr: Jaxpr) -> Iterator[tuple[Operation, Any]]:
    for eqn in jaxpr.eqns:
        op = Operation.every.get(eqn.primitive)
        if op is not None and not op.is_small:
            yield op, eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _operations(inner)


def _of_operation(op: Operation, platform: str, eqn: Any) -> Implementation:
    avals = [v.aval for v in eqn.invars]
    tree, static = eqn.params["tree"], eqn.params["static"]
    kernel = op.kernels.get(platform)
    if kernel is None:
        reason = f"there is no kernel of it for {platform}"
    else:
        reason = why_unfit(kernel, static, *jax.tree.unflatten(tree, avals))
    name = None if kernel is None or reason else kernel.name()
    array = avals[0]
    operation = op.primitive.name.removeprefix("jaxnorm_")
    return Implementation(operation, array.shape, array.dtype.name, name, reason, 1)
