"""Batch norm in quantization-aware training: which kernel is quantized, and when?"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxnorm import _marks as marks
from jaxnorm import _running as running
from jaxnorm._arguments import (
    as_array,
    as_flag,
    check_function,
    check_mapping,
    shown,
)
from jaxnorm._base import Stats
from jaxnorm._dtypes import as_floating, promote
from jaxnorm._methods.batch_norm import BatchNorm
from jaxnorm._moments import Moments
from jaxnorm._running import as_arrays
from jaxnorm._standardize import standardize


def quantization_aware_layer(
    kernel: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    layer: Callable[[Array], Array],
    quantize: Callable[[Array], Array],
    freeze: bool | ArrayLike,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    unbiased: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """A layer and its batch norm, with the kernel quantized as inference will use it.

        running_std = sqrt(stats["var"] + epsilon)
        y = layer(quantize(kernel * scale / running_std))
        mean, std = moments of layer(kernel), or running ones where `freeze`
        y = y * (running_std / std) + (bias - mean * scale / std)

    What is quantized follows the running statistics alone, so that it does not jitter
    from batch to batch; the correction `running_std / std` gives the output back the
    batch's own deviation. Where `freeze`, it is 1, the bias is that of the running
    statistics, and these stay: the layer computes what inference does. Switch once the
    statistics have settled (`freeze=step >= 10_000`), and pass True for evaluation.
    While it is false or traced, the layer runs twice: also by the kernel itself, whose
    output the moments are of. With the identity for `quantize`, it is the layer
    followed by `jaxnorm.batch_norm`, to within the rounding of the kernel to its dtype.

    Args:
        kernel: of the layer; its last axis holds the features.
        stats: {"mean", "var"}, of the shape of the features, from `init_stats`. What
            `jaxnorm.models.freeze` marks in them holds here, too.
        scale, bias: of the shape of the features; None is 1, 0.
        layer: such that `layer(kernel)` is its output, without bias, and with the
            features on the last axis; linear in the kernel.
        quantize: rounds a kernel as inference will, with the gradient it should have,
            such as that of the identity.
        freeze: boolean scalar, which may be traced.
        mask: boolean, or 0 and 1, broadcasting to the output; what it excludes counts
            for nothing and comes out as 0.

    momentum, epsilon, axis_name, axis_index_groups and unbiased are as in
    `jaxnorm.batch_norm`.

    Returns:
        y, of the shape and dtype of the output of the layer, and the new stats.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes or settings that do not
            fit, and for a batch of one single value per feature.

    Source: Krishnamoorthi, 2018 (https://arxiv.org/abs/1806.08342, section 3.2.2);
    without correction, Jacob et al., 2017 (https://arxiv.org/abs/1712.05877).

    >>> import jax, jax.numpy as jnp, jaxnorm
    >>> def quantize(kernel):  # to 8 bits, with the gradient of the identity
    ...     step = abs(kernel).max() / 127
    ...     rounded = (kernel / step).round() * step
    ...     return kernel + jax.lax.stop_gradient(rounded - kernel)
    >>> x, kernel = jnp.array([[1.0, 0.0], [3.0, 1.0]]), jnp.array([[1.0], [0.5]])
    >>> y, stats = jaxnorm.models.quantization_aware_layer(
    ...     kernel, jaxnorm.init_stats(1), layer=lambda kernel: x @ kernel,
    ...     quantize=quantize, freeze=False,
    ... )
    >>> print(y.round(2).ravel())
    [-1.  1.]
    """
    check_function("layer", layer)
    check_function("quantize", quantize)
    check_mapping("stats", stats, "init_stats")
    norm = BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        unbiased=unbiased,
    )
    kernel, frozen = as_floating(as_array("kernel", kernel)), as_flag(freeze, "freeze")
    by_running = True if marks.RUNNING in stats else frozen
    stays = True if marks.HELD in stats else frozen
    past = running.read(stats, norm.axes(kernel.shape), kernel.dtype)
    used, new = past, as_arrays(stats)
    if not (by_running is True and stays is True):
        x = _output(layer, kernel)
        batch, moved = _batch(norm, x, stats, by_running is not True, mask)
        mean, var = (v.reshape(past.var.shape) for v in (batch.mean, batch.var))
        batch = Moments(mean, var, past.size)
        used = _where(by_running, past, batch)
        new = _where(stays, new, moved)
    slope = past.rstd(norm.epsilon)
    if scale is not None:
        slope = slope * _scale(scale, kernel, slope)
    wide = kernel.astype(promote(kernel.dtype, slope.dtype))
    y = _output(layer, quantize((wide * slope).astype(kernel.dtype)))
    axes = norm.axes(y.shape)
    # (y - mean * slope) * correction is y * correction - mean * scale / std.
    center, correction = (
        v.reshape(axes.param_shape())
        for v in (used.mean * slope, used.rstd(norm.epsilon) / past.rstd(norm.epsilon))
    )
    return standardize(y, center, correction, axes, bias=bias, mask=mask), new


def _output(layer: Callable[[Array], Any], kernel: Array) -> Array:
    """What the layer computes; raises TypeError unless that is an array."""
    y = layer(kernel)
    if not isinstance(y, Array | np.ndarray):
        raise TypeError(f"layer(kernel) must return one array, got {shown(y)}")
    return as_array("layer(kernel)", y)


def _batch(
    norm: BatchNorm,
    x: Array,
    stats: Stats,
    by_batch: bool,
    mask: ArrayLike | None,
) -> tuple[Moments, dict[str, Array]]:
    """The moments of a batch, and the statistics after it."""
    problem = norm.single_value_problem(x.shape, by_batch)
    if problem:
        raise ValueError(problem)
    batch = norm.batch_moments(x, mask)
    return batch, norm.updated(stats, batch, x.shape)


def _where(condition: bool | Array, a: Any, b: Any) -> Any:
    """The arrays of the tree `a` where the condition holds, else those of `b`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _scale(scale: ArrayLike, kernel: Array, slope: Array) -> Array:
    """`scale` as it broadcasts to the kernel."""
    scale = as_array("scale", scale)
    if scale.shape != kernel.shape[-1:]:
        raise ValueError(
            f"scale has shape {scale.shape}, but the features of a kernel of shape "
            f"{kernel.shape} are {kernel.shape[-1:]}: pass that shape"
        )
    return scale.astype(promote(scale.dtype, slope.dtype)).reshape(slope.shape)
