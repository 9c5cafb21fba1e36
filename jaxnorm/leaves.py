"""What is one variable of a tree, in a box of Flax's or not, and how is it copied?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxnorm.layers import kind_of


def is_box(node: Any) -> bool:
    """Whether `node` is a variable with Flax's metadata, such as `nn.Partitioned`."""
    return hasattr(node, "replace_boxed")


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


def as_array(variable: Any, name: str) -> Array:
    """The value of `variable` as an array; raises unless that is one of numbers."""
    value, array = unboxed(variable), None
    try:
        given = value if hasattr(value, "dtype") else np.asarray(value)
        if given.dtype.kind not in "OSUMm":
            array = jnp.asarray(value)
    except (TypeError, ValueError):
        pass  # a list of lists of several lengths, or a shape without values
    kinds = (jnp.number, jnp.bool_)
    if array is None or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name} must be an array of numbers, got {kind_of(value)}")
    return array


def copied(tree: Any) -> Any:
    """`tree` in buffers of its own: no leaf shares one with another, or with `tree`.

    So it can be donated, and what it was made from as well.
    """
    if type(tree) is dict:  # whose order JAX does not keep
        return {k: copied(v) for k, v in tree.items()}
    return jax.tree.map(
        lambda v: v.copy() if isinstance(v, Array | np.ndarray) else v, tree
    )
