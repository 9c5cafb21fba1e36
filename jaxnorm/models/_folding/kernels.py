"""Is an equation a layer, and where are its features?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxnorm.models._folding.values import Flow, Known, LayerCall, Value, Variable

MOVES = ("reshape", "transpose", "rev", "squeeze", "broadcast_in_dim", "copy")


def place_after(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """Which axis an axis is after a reshape; None if it does not stay one."""
    ahead = math.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == ahead:
            return place
    return None


def is_real(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.floating)


def layer_of(
    eqn: Any, args: Sequence[Value], variables: Mapping[Variable, Any]
) -> LayerCall | None:
    """The layer that the equation is, if its kernel is one of `variables`, moved about.

    With `variables` come their shapes and dtypes.
    """
    name = eqn.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return None
    side = 0 if isinstance(args[0], Known) else 1
    kernel, data = args[side], args[1 - side]
    if not isinstance(kernel, Known) or not isinstance(data, Flow):
        return None
    if [(v.collection, v.name) for v in kernel.variables] != [("params", "kernel")]:
        return None
    if not is_real(eqn.outvars[0].aval):
        return None
    (variable,) = kernel.variables
    places = _places(kernel, variables[variable])
    axes = (_product_axes if name == "dot_general" else _conv_axes)(eqn, side)
    if places is None or axes is None:
        return None
    kernel_output, kernel_input = (
        _stored_axis(places, axis, variables[variable].shape)
        for axis in (axes.kernel_output, axes.kernel_input)
    )
    return LayerCall(
        path=variable.path,
        kernel=variable,
        data=data,
        data_axis=axes.data,
        kernel_input=kernel_input,
        kernel_output=kernel_output,
        output_axis=axes.output,
        groups=axes.groups,
        padded=axes.padded,
    )


class _Axes(NamedTuple):
    """The axes of a layer's features: in its kernel as it is used, input and output."""

    kernel_output: int | None  # None where there are several
    kernel_input: int | None
    data: int | None
    output: int | None
    groups: int = 1
    padded: bool = False


def _conv_axes(eqn: Any, side: int) -> _Axes | None:
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    if side != 1 or p["batch_group_count"] != 1:
        return None
    padded = any(map(any, p["padding"])) or any(n != 1 for n in p["lhs_dilation"])
    # With a stride, padding "SAME" depends on the size of the image.
    window = [eqn.invars[1].aval.shape[axis] for axis in dims.rhs_spec[2:]]
    moves = zip(window, p["window_strides"], strict=True)
    padded = padded or any(size > 1 and stride > 1 for size, stride in moves)
    return _Axes(
        kernel_output=dims.rhs_spec[0],
        kernel_input=dims.rhs_spec[1],
        data=dims.lhs_spec[1],
        output=dims.out_spec[1],
        groups=p["feature_group_count"],
        padded=padded,
    )


def _product_axes(eqn: Any, side: int) -> _Axes | None:
    contracted, batch = eqn.params["dimension_numbers"]
    of_kernel, of_data = contracted[side], contracted[1 - side]
    free = {*range(eqn.invars[side].aval.ndim)} - {*of_kernel}
    if any(batch):
        return None
    last = eqn.outvars[0].aval.ndim - 1
    one_input, one_output = len(of_kernel) == 1, len(free) == 1
    return _Axes(
        kernel_output=free.pop() if one_output else None,
        kernel_input=of_kernel[0] if one_input else None,
        data=of_data[0] if one_input else None,
        output=(last if side == 1 else 0) if one_output else None,
    )


def _places(kernel: Known, variable: Any) -> np.ndarray | None:
    """The place of each element of `kernel` in its variable, if it is that, moved."""
    if kernel.variable is not None:
        return np.arange(math.prod(variable.shape)).reshape(variable.shape)
    if kernel.eqn is None or len(kernel.args) != 1:
        return None
    places, name = _places(kernel.args[0], variable), kernel.eqn.primitive.name
    after = kernel.eqn.outvars[0].aval
    if places is None or after.size != places.size:
        return None
    if name == "convert_element_type":
        return places if is_real(after) else None
    if name not in MOVES:
        return None
    return np.asarray(kernel.eqn.primitive.bind(places, **kernel.eqn.params))


def _stored_axis(
    places: np.ndarray, axis: int | None, shape: tuple[int, ...]
) -> int | None:
    """The axis of a variable of `shape` that became `axis`, from the last; or None."""
    if axis is None:
        return None
    stored = np.empty(places.size, int)
    stored[places.ravel()] = _counted(places.shape, axis).ravel()
    stored = stored.reshape(shape)
    for found in range(-1, -len(shape) - 1, -1):
        same_size = shape[found] == places.shape[axis]
        if same_size and (stored == _counted(shape, found)).all():
            return found
    return None


def _counted(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """An array of `shape` that counts from 0 along `axis`."""
    size = shape[axis]
    counts = np.arange(size).reshape([-1] + [1] * (len(shape) - axis % len(shape) - 1))
    return np.broadcast_to(counts, shape)
