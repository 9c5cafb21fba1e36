"""Checks of arguments: one for each kind, whichever function takes them.

Each gives the argument back in the form that the rest relies on, or raises TypeError or
ValueError that names it. What is traced is checked as far as it is known.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

Shape = tuple[int, ...]


def shown(value: Any) -> str:
    """`value` in a few words, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape, dtype = (getattr(value, k, None) for k in ("shape", "dtype"))
    if isinstance(shape, tuple) and dtype is not None:
        return f"{dtype} of shape {shape}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(value).__name__})"


def as_array(name: str, value: ArrayLike) -> Array:
    """`value` as an array of real or complex numbers, or of booleans."""
    array = value if isinstance(value, Array) else _converted(name, value)
    if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_:
        return array
    raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}")


def _converted(name: str, value: Any) -> Array:
    words = any(isinstance(v, str | bytes) for v in jax.tree.leaves(value))
    try:
        if not words:  # which JAX would read as dtypes
            return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{name} must be an array of numbers, got {shown(value)}")


def array_or_none(value: Any) -> Array | np.ndarray | None:
    """`value` as an array, of NumPy if none of it is one of JAX; None if it is none."""
    try:
        of_jax = any(isinstance(v, Array) for v in jax.tree.leaves(value))
        return jnp.asarray(value) if of_jax else np.asarray(value)
    except (TypeError, ValueError):
        return None


def as_real(name: str, value: Any) -> Any:
    """`value` as a Python number where it is known, else as a traced scalar."""
    value = _scalar(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if math.isnan(value):
            raise ValueError(f"{name} must be a number, got {value}")
        return value
    if isinstance(value, Tracer) and not value.shape and _is_real(value.dtype):
        return value
    raise TypeError(f"{name} must be one real number, got {shown(value)}")


def as_epsilon(name: str, value: Any) -> Any:
    """`value` as a finite number from 0 on, such as is added to a variance."""
    value = as_real(name, value)
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        rule = "must not be negative" if value < 0 else "must be finite"
        raise ValueError(f"{name} {rule}, got {value}: pass 0 for none")
    return value


def as_positive(name: str, value: Any) -> Any:
    """`value` as a number over 0."""
    value = as_real(name, value)
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name} must be over 0, got {value}")
    return value


def as_share(name: str, value: Any) -> Any:
    """`value` as a number from 0 to 1."""
    value = as_real(name, value)
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return value


def as_momentum(name: str, value: Any) -> Any:
    """As `as_share`, for the weight of old statistics; None averages all of them."""
    value = None if value is None else as_real(name, value)
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(
            f"{name} is the weight of the old statistics, from 0 to 1, got {value}: "
            "PyTorch's momentum m is 1 - m here"
        )
    return value


def as_integer(name: str, value: Any) -> int:
    """`value` as an int."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None


def as_integers(name: str, value: Any) -> int | tuple[int, ...]:
    """`value` as an int, or as a tuple of ints."""
    try:
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            return tuple(as_integer(name, v) for v in value)
        return as_integer(name, value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a sequence of integers, got {shown(value)}"
        ) from None


def as_shape(name: str, value: Any) -> Shape:
    """`value` as a tuple of sizes, which may be symbolic."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple of sizes, got {shown(value)}")
    return tuple(_size(name, n) for n in value)


def as_feature_shape(name: str, value: Any) -> Shape:
    """As `as_shape`; one size, or the number of features, is that of one axis."""
    single = isinstance(value, int | np.integer) or export.is_symbolic_dim(value)
    return as_shape(name, (value,) if single else value)


def _size(name: str, value: Any) -> int:
    if export.is_symbolic_dim(value):
        return cast(int, value)
    size = value if type(value) is int else as_integer(name, value)
    if size < 0:
        raise ValueError(f"{name} must hold no negative sizes, got {size}")
    return size


def as_bool(name: str, value: Any) -> bool:
    """`value` as a bool, which must be known."""
    value = _scalar(value)
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def as_flag(value: Any, name: str = "use_running_average") -> bool | Array:
    """`value` as a bool where it is known, else as the traced boolean scalar it is."""
    value = _scalar(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Tracer) and not value.shape and value.dtype == jnp.bool_:
        return value
    raise TypeError(f"{name} must be a boolean scalar, got {shown(value)}")


def as_dtype(name: str, value: DTypeLike) -> jnp.dtype:
    """`value` as a dtype of real or complex floating point."""
    dtype = dtype_or_none(value)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be a dtype of floating point, such as jnp.float32, got "
            f"{shown(value)}"
        )
    if dtype.itemsize < 2:
        raise TypeError(
            f"{name} must be a dtype of 16 bits or more, got {dtype}: compute in "
            "jnp.float32, and pass the result to jaxnorm.to_float8"
        )
    return dtype


def dtype_or_none(value: Any) -> jnp.dtype | None:
    """`value` as a dtype; None if it is none."""
    try:
        return None if value is None else jnp.dtype(value)
    except TypeError:
        return None


def as_name(name: str, value: Any) -> str | None:
    """`value` as one of the names that the option `name` knows, or None."""
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"{name} must be a string or None, got {shown(value)}")


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """A check that leaves None as it is, and passes all else to `check`."""
    return lambda name, value: None if value is None else check(name, value)


def check_mapping(name: str, value: Any, like: str, fix: str = "pass that") -> None:
    """Raises TypeError unless `value` is a mapping; `like` makes an example of one."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a dict, as {like} makes it, got {shown(value)}: {fix}"
        )


def check_instance(name: str, value: Any, kind: type, like: str) -> None:
    """Raises TypeError unless `value` is a `kind`; `like` makes an example."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a jaxnorm.{kind.__name__}, as {like} makes it, got "
            f"{shown(value)}"
        )


def check_function(name: str, value: Any) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")


def check_known(name: str, value: Any) -> None:
    """Raises TypeError where `value` is traced."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be known while tracing, got a traced {shown(value)}: pass a "
            "Python number"
        )


def check_no_count(name: str, value: Any, count: str) -> None:
    """Raises TypeError where the array `name` is an integer, as for `count`."""
    if isinstance(value, int):
        raise TypeError(
            f"{name} must be an array, got {value}: pass {count}={value} by name"
        )


def check_real(name: str, value: Array, x: Array) -> None:
    """Raises TypeError where `value` is complex and `x` is not."""
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"{name} is {value.dtype}, but the input is real: pass real numbers, or "
            "make the input complex"
        )


def _scalar(value: Any) -> Any:
    """`value` as a Python scalar, if it is an array of one that is known."""
    if isinstance(value, np.generic | np.ndarray | Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.extended)
        if not isinstance(value, Tracer) and not value.shape and not is_key:
            return value.item()
    return value


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
