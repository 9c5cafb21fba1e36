# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a type checker must refuse: each comment that it does not need is an error.

Nothing runs this; the type check of the repository reads it.
"""

from typing import TYPE_CHECKING

from flax import linen as nn
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

if TYPE_CHECKING:
    norm = jaxnorm.BatchNorm()
    rngs = nnx.Rngs(0)
    dense, linear = nn.Dense(4), nnx.Linear(3, 4, rngs=rngs)

    jaxnorm.bach_norm()  # pyright: ignore[reportAttributeAccessIssue]
    jaxnorm.BatchNorm(momentun=0.9)  # pyright: ignore[reportCallIssue]
    jaxnorm.GroupNorm(4)  # pyright: ignore[reportCallIssue]

    jaxnorm.linen.Norm(norm, use_bais=False)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.BatchNorm(momentun=0.9)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.LayerNorm(epsilom=1e-3)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.RMSNorm(use_bias=False)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.GroupNorm(groups=2)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.InstanceNorm(axis=1)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.WeightNorm(dense, axis=1)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.SpectralNorm(dense, steps=2)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.WeightStandardization(dense, scale=1)  # pyright: ignore[reportCallIssue]
    jaxnorm.linen.BatchNorm(momentum=None)
    jaxnorm.linen.BatchNorm(momentum="0.9")  # pyright: ignore[reportArgumentType]

    jaxnorm.nnx.Norm(norm, 4, use_bais=False)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.BatchNorm(4, momentun=0.9, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.LayerNorm(4, epsilom=1e-3, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.RMSNorm(4, use_bias=False, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.GroupNorm(4, groups=2, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.InstanceNorm(4, axis=1, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.WeightNorm(linear, axis=1, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.SpectralNorm(linear, steps=2, rngs=rngs)  # pyright: ignore[reportCallIssue]
    ws = jaxnorm.nnx.WeightStandardization
    ws(linear, scale=1, rngs=rngs)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.BatchNorm(4)  # pyright: ignore[reportCallIssue]
    jaxnorm.nnx.BatchNorm(4, momentum=None, rngs=rngs)
    jaxnorm.nnx.BatchNorm(4, momentum="0.9", rngs=rngs)  # pyright: ignore[reportArgumentType]
