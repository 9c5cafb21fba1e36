"""How does an array of any framework become one of NumPy, and of which dtype?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxnorm.models._checkpoints.fit import Misfit


def as_numpy(key: str, value: Any) -> np.ndarray:
    """`value` as an array of NumPy; raises Misfit if it has no values, or is no array.

    A tensor of torch may be on any device, require gradients, and be of a dtype that
    NumPy has not.
    """
    if isinstance(value, Tracer | jax.ShapeDtypeStruct):
        raise Misfit(f"{key!r} has no value here, only the shape {value.shape}")
    try:
        if not hasattr(value, "detach"):
            return np.asarray(value)
        tensor = value.detach().cpu()
        dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        return np.asarray(tensor.float() if _beyond_numpy(dtype) else tensor, dtype)
    except Exception as error:  # each framework has its own
        problem = f"{key!r} of {type(value).__name__} is no array of numbers: {error}"
        raise Misfit(problem) from None


def as_torch_takes(array: np.ndarray) -> np.ndarray:
    """`array`, in float32 if it is of a dtype that `torch.from_numpy` does not know."""
    return array.astype(np.float32) if _beyond_numpy(array.dtype) else array


def _beyond_numpy(dtype: np.dtype) -> bool:
    """Whether `dtype` is one such as bfloat16, which JAX has and NumPy has not."""
    return jnp.issubdtype(dtype, jnp.floating) and not np.issubdtype(dtype, np.floating)
