"""JAX's own kernels of norms of (batch, rows, features), as classes like Flax's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import layer_norm, rms_norm


def _settings() -> dict[str, Any]:
    return {"eps": 1e-6, "interpret": jax.default_backend() == "cpu"}


class LayerNorm(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm.layer_norm(x[None], scale, bias, **_settings())[0]


class RMSNorm(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = jnp.zeros_like(scale)  # which it takes in any case
        return rms_norm.rms_norm(x[None], scale, bias, **_settings())[0]
