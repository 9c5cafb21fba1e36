"""What is the array of a variable, which may be in one of Flax's boxes?"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxnorm._arguments import as_array


def is_box(node: Any) -> bool:
    """Whether `node` is a variable with Flax's metadata, such as `nn.Partitioned`."""
    return hasattr(node, "replace_boxed")


def array_of(name: str, variable: Any) -> Array:
    """The value of `variable`; raises TypeError unless that is an array of numbers."""
    return as_array(name, unboxed(variable))


def unboxed(variable: Any) -> Any:
    """The value of `variable`."""
    return jax.tree.leaves(variable)[0] if is_box(variable) else variable


def boxed_like(variable: Any, value: Array) -> Any:
    """`value` with the metadata of `variable`, if it has any.

    Axes that `value` has beyond those of `variable` are the first ones, and are not
    partitioned.
    """
    if not is_box(variable):
        return value
    for _ in range(value.ndim - jnp.ndim(unboxed(variable))):
        variable = variable.add_axis(0, {"partition_name": None})
    return variable.replace_boxed(value)
