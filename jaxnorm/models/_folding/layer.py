"""What are the kernel and bias of a layer that also does the work of a norm?"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxnorm._arguments import as_bool, as_integer, optional
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm.models._leaves import array_of, boxed_like, unboxed
from jaxnorm.models._paths import check_tree, copied

LayerParams = Mapping[str, ArrayLike]  # {"kernel"} or {"kernel", "bias"}


def fold_output(
    layer: LayerParams, a: ArrayLike, b: ArrayLike, *, axis: int = -1
) -> dict[str, ArrayLike]:
    """The layer whose output is `a * y + b`, where that of `layer` is `y`.

        kernel = kernel * a         # along the output features
        bias = bias * a + b         # where there is none, it is 0

    Exact for every Dense, Conv and ConvTranspose, dilated, grouped and depthwise ones
    included.

    Args:
        layer: {"kernel", "bias"}, or {"kernel"}.
        a, b: of shape (output features,), from `affine_form`.
        axis: of the kernel, for the output features: -1 in Flax, but -2 for a
            ConvTranspose with `transpose_kernel=True`.

    Returns:
        {"kernel", "bias"} in the dtypes of the layer, rounded once from at least
        float32; a new bias has the dtype of the kernel. What else the layer holds is
        copied, and boxes of Flax's, such as `nn.Partitioned`, stay around what they
        held.

    Raises:
        ValueError, TypeError: for shapes that do not fit, and a layer without a kernel,
            or with one of integers.

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> layer = {"kernel": jnp.ones((2, 1))}
    >>> print(models.fold_output(layer, jnp.array([3.0]), jnp.array([-3.0]))["bias"])
    [-3.]
    """
    kernel, a, b = _arrays(layer, a, b)
    shape = [1] * kernel.ndim
    shape[_axis(kernel, axis)] = a.size
    _check_features(kernel, a.size, axis)
    return _layer(layer, kernel * a.reshape(shape), _bias(layer, a) * a + b)


def fold_input(
    layer: LayerParams,
    a: ArrayLike,
    b: ArrayLike,
    *,
    axis: int = -2,
    groups: int = 1,
    padded: bool | None = None,
) -> dict[str, ArrayLike]:
    """The layer whose output for `x` is that of `layer` for `a * x + b`.

        kernel_of_b = sum(kernel * b)    # over space and input features
        kernel = kernel * a              # along the input features
        bias = bias + kernel_of_b        # where there is none, it is 0

    Zeros that a convolution reads beside its input stand beside `a * x + b`; folded,
    they would stand beside `x`, which is the same only where `b` is 0.

    Args:
        layer: {"kernel", "bias"}, or {"kernel"}.
        a, b: of shape (input features,), from `affine_form`.
        axis: of the kernel, for the input features: -2 in Flax, but -1 for a
            ConvTranspose with `transpose_kernel=True`. The other is the outputs'.
        groups: `feature_group_count` of the layer.
        padded: whether the layer reads zeros beside its input: False for a Dense, and
            for a Conv with the padding "VALID" or 0; True for every ConvTranspose. By
            default False for kernels of two axes, and True for others.

    Returns:
        As `fold_output` does.

    Raises:
        ValueError, TypeError: as `fold_output` does, and where `padded` and `b` is not
            known to be 0 (as a traced one is not).

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> layer = {"kernel": jnp.ones((2, 1))}
    >>> a, b = jnp.array([3.0, 1.0]), jnp.array([1.0, -5.0])
    >>> print(models.fold_input(layer, a, b)["bias"])
    [-4.]
    """
    kernel, a, b = _arrays(layer, a, b)
    if as_integer("groups", groups) < 1:
        raise ValueError(
            f"groups must be 1 or more, got {groups}: the feature_group_count of the "
            "layer"
        )
    optional(as_bool)("padded", padded)
    if {_axis(kernel, axis)} - {kernel.ndim - 1, kernel.ndim - 2}:
        raise ValueError(
            f"input features are on axis -2 or -1 of a kernel, got axis={axis} for one "
            f"of shape {kernel.shape}"
        )
    _check_features(kernel, a.size, axis, groups)
    if padded if padded is not None else kernel.ndim > 2:
        _check_zero(b)
    by_group = _by_group(kernel, axis, groups)
    shape = (*[1] * (kernel.ndim - 2), -1, groups, 1)
    a, b = (v.reshape(groups, -1).T.reshape(shape) for v in (a, b))
    added = (by_group * b).sum(tuple(range(kernel.ndim - 1))).reshape(-1)
    folded = (by_group * a).reshape((*by_group.shape[:-2], added.size))
    return _layer(layer, jnp.moveaxis(folded, -2, axis), _bias(layer, added) + added)


def scale_input(
    layer: LayerParams, scale: Array, bias: ArrayLike | None, *, axis: int
) -> dict[str, ArrayLike]:
    """The layer whose output for `x` is that of `layer` for `scale * x + bias`.

    Without a bias as `fold_input` of one that is 0, but the layer gets none by it. It
    sums over one `axis` of its kernel, and may have several for its outputs.
    """
    kernel, a, b = _arrays(
        layer, scale, jnp.zeros_like(scale) if bias is None else bias
    )
    _check_features(kernel, a.size, axis)
    shape = [1] * kernel.ndim
    shape[_axis(kernel, axis)] = a.size
    if bias is None:
        return _layer(layer, kernel * a.reshape(shape))
    added = (kernel * b.reshape(shape)).sum(axis)
    return _layer(layer, kernel * a.reshape(shape), _bias(layer, added) + added)


def _arrays(
    layer: LayerParams, a: ArrayLike, b: ArrayLike
) -> tuple[Array, Array, Array]:
    """Kernel, a and b in the dtype to compute in; raises unless a and b fit."""
    check_tree(layer, "layer")
    if "kernel" not in layer:
        raise ValueError(
            f"a layer to fold a norm into holds a 'kernel', got {sorted(layer)}: pass "
            "the parameters of one Dense, Conv or ConvTranspose"
        )
    named = {"kernel": layer["kernel"], "a": a, "b": b}
    kernel, a, b = (array_of(name, v) for name, v in named.items())
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        raise TypeError(
            f"a norm cannot be folded into a kernel of {kernel.dtype}: fold it into "
            "the floating point one, and quantize that then"
        )
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            "a norm to fold has one mean and variance per feature, on one axis, but "
            f"here a and b are of shapes {a.shape} and {b.shape}"
        )
    wide = promote(at_least_float32(kernel.dtype), a.dtype, b.dtype)
    return kernel.astype(wide), a.astype(wide), b.astype(wide)


def _axis(kernel: Array, axis: int) -> int:
    """`axis` counted from the first; raises unless `kernel` has it."""
    axis = as_integer("axis", axis)
    if not -kernel.ndim <= axis < kernel.ndim:
        raise ValueError(f"a kernel of shape {kernel.shape} has no axis {axis}")
    return axis % kernel.ndim


def _check_features(
    kernel: Array, num_features: int, axis: int, groups: int = 1
) -> None:
    """Raises ValueError unless the kernel has this many features along `axis`."""
    size = kernel.shape[axis]
    if size * groups == num_features:
        return
    fix = "fold it into the layer beside it, and pass axis= for a transposed kernel"
    if num_features % size == 0 and num_features > size:
        groups_that_fit = num_features // size
        fix += f", or groups={groups_that_fit} for a norm before a grouped convolution"
    raise ValueError(
        f"the norm has {num_features} features, but axis {axis} of a kernel of shape "
        f"{kernel.shape} with groups={groups} is for {size * groups}: {fix}"
    )


def _check_zero(b: Array) -> None:
    """Raises ValueError unless `b` is known to be 0."""
    if not isinstance(b, Tracer) and not b.any():
        return
    raise ValueError(
        "the zeros that pad the input of this layer stand beside the normalized input, "
        "and would not once the norm is folded, as its b = bias - mean * a is not "
        "known to be 0: pass padded=False if the layer pads nothing (a Conv with "
        "padding 'VALID'), or leave this pair out"
    )


def _by_group(kernel: Array, axis: int, groups: int) -> Array:
    """The kernel as (*space, inputs of a group, groups, outputs of a group)."""
    kernel = jnp.moveaxis(kernel, axis, -2)
    if kernel.shape[-1] % groups:
        raise ValueError(
            f"groups={groups} does not divide the {kernel.shape[-1]} output features: "
            "it is the feature_group_count of the layer"
        )
    return kernel.reshape((*kernel.shape[:-1], groups, -1))


def _bias(layer: LayerParams, like: Array) -> Array:
    """The bias of `layer`, or 0, in the dtype and shape of `like`."""
    bias = array_of("bias", layer.get("bias", jnp.zeros_like(like)))
    if bias.shape != like.shape:
        raise ValueError(
            f"the layer has {like.size} output features, but a bias of shape "
            f"{bias.shape}: take both from one model"
        )
    return bias.astype(like.dtype)


def _layer(layer: LayerParams, kernel: Array, *bias: Array) -> dict[str, ArrayLike]:
    """`layer` with this kernel and bias, in the dtypes and boxes of its own."""
    arrays = dict(zip(("kernel", "bias"), (kernel, *bias), strict=False))
    new = {k: v for k, v in layer.items() if k not in arrays}
    for k, v in arrays.items():
        old = layer.get(k, unboxed(layer["kernel"]))
        dtype = jnp.result_type(unboxed(old))
        if jnp.iscomplexobj(v) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"the {k} of the layer is {dtype}, and would be complex with a norm of "
                "complex numbers in it: leave this pair out"
            )
        new[k] = boxed_like(old, v.astype(dtype))
    return copied(new)
