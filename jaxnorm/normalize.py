"""Steps 2 and 3 as one call: the one place where an implementation is chosen."""

from collections.abc import Mapping

from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.axes import Axes
from jaxnorm.devices import AxisName, Groups, sync
from jaxnorm.moments import Moments, moments
from jaxnorm.standardize import standardize


def normalize(
    x: Array,
    params: Mapping[str, ArrayLike],
    axes: Axes,
    *,
    epsilon: ArrayLike,
    center: bool = True,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Standardizes `x` by its own moments, then applies `params["scale"]` and
    `params["bias"]` where given; returns the moments, pooled over devices, too."""
    m = moments(x, axes, mask=mask, center=center)
    m = sync(m, axis_name, axis_index_groups)
    y = standardize(
        x,
        m.mean,
        m.rstd(epsilon),
        axes,
        scale=params.get("scale"),
        bias=params.get("bias"),
        mask=mask,
        dtype=dtype,
    )
    return y, m
