"""Values that a name decides, for models too large to store."""

import zlib

import numpy as np


def filled(name, shape):
    """Values for the array of a torch model, of the size that it would have trained."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return rng.integers(1000)
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = np.prod(shape[1:])
    return (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(np.float32)
