"""What the Linen and the NNX modules have in common: settings in, a call out."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.base import Norm
from jaxnorm.dtypes import as_floating, promote, widened


def settings(kind: type[Norm], module: Any, **others: Any) -> Norm:
    """The settings value of `kind`, from the attributes that `module` names alike."""
    names = [f.name for f in dataclasses.fields(kind) if hasattr(module, f.name)]
    return kind(**({k: getattr(module, k) for k in names} | others))


def refuse(problem: str) -> None:
    """What a generic module does about a variance of single values."""
    raise ValueError(problem)


def warn(problem: str) -> None:
    """What a class of Flax's name does: Flax takes such inputs, in shape probes say."""
    warnings.warn(problem, stacklevel=2)


def run(
    norm: Norm,
    x: ArrayLike,
    params: Mapping[str, Array],
    stats: Mapping[str, Array],
    *,
    flag: bool | Array,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    on_lone_values: Callable[[str], None],
    inputs: Mapping[str, Any],
) -> tuple[Array, dict[str, Array]]:
    """Applies `norm` with Flax's output dtype: `dtype`, or that of all inputs."""
    given = jnp.asarray(x).dtype
    x = as_floating(x)
    dtypes = (given, *(p.dtype for p in params.values()))
    dtype = promote(*dtypes) if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = promote(dtype, jnp.float32)
    norm.check_names(params, inputs)
    problem = norm.lone_values(x.shape, flag)
    if problem:
        on_lone_values(problem)
    x = widened(x, dtype)
    return norm.apply(
        x, params, stats, use_running_average=flag, mask=mask, dtype=dtype, **inputs
    )
