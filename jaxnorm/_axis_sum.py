"""The sum over a mapped axis, also where a derivative no longer knows the axis."""

from collections.abc import Sequence
from typing import Any

from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

AxisName = str | tuple[str, ...]


def axis_sum(v: Array, name: AxisName) -> Array:
    """`jax.lax.psum`, which also sums over an axis of a vmap whose name is gone.

    JAX traces the rule of a derivative when the derivative is taken: that of a function
    under jit, which holds the vmap, only after it. The vmap is still there, as a batch,
    but psum refuses a name that is not bound. Axes of devices are bound there, too.
    """
    names = (name,) if isinstance(name, str) else name
    if all(map(_is_bound, names)):
        return lax.psum(v, name)
    return _sum_over_batch.bind(v, names=names)


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


# Without a lowering: what is left of it after all batching has no axis to sum over.
_sum_over_batch = Primitive("jaxnorm_sum_over_batch")
_sum_over_batch.def_abstract_eval(lambda v, *, names: v)
ad.deflinear2(_sum_over_batch, lambda cotangent, _, names: [axis_sum(cotangent, names)])


def _batch(
    axis: Any, values: Sequence[Array], dims: Sequence[int | None], *, names: Any
) -> tuple[Array, int | None]:
    (v,), (dim,) = values, dims
    if axis.name in names:
        v = v * axis.size if dim is None else v.sum(dim)
        names, dim = tuple(n for n in names if n != axis.name), None
    return (axis_sum(v, names) if names else v), dim


batching.fancy_primitive_batchers[_sum_over_batch] = _batch
