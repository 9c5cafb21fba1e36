r"""Root mean square norm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).

    y = \frac{x}{\sqrt{\frac{1}{n} \sum x^2 + \epsilon}} \gamma

Statistics over: `reduction_axes`, the last by default; no mean is subtracted.
Take it for: transformers; it has one sum less than layer norm, and no bias.
Not for: inputs with a large mean that says nothing: it stays, and sets the scale.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._activation import add_residual
from jaxnorm._axes import Shape
from jaxnorm._base import Params
from jaxnorm._dtypes import one_rounding, recomputed
from jaxnorm._moments import Moments
from jaxnorm._reduce import moments
from jaxnorm._stateless import ReductionNorm
from jaxnorm._working import as_mask


class RMSNorm(ReductionNorm):
    """Divides each example by its root mean square over `reduction_axes`.

    Attributes:
        epsilon: added to the mean square.
        axis_name: mapped axis, or several, whose devices share statistics.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too; "xla" for XLA's formula.
        reduction_axes: the axes that share a mean square.
        feature_axes: the axes that the scale varies along.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
        first_features: number of features, the first ones, whose mean square is taken
            for that of all (partial RMS norm); None for all.
    """

    param_names = ("scale",)
    center = False
    first_features: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_features is None:
            return
        if self.first_features < 1:
            raise ValueError(
                f"first_features must be at least 1, got {self.first_features}: pass "
                "None for all features"
            )
        if self.axis_name is not None or self.implementation not in (None, "xla"):
            raise ValueError(
                f"first_features={self.first_features} takes no axis_name and no "
                f"kernels, got axis_name={self.axis_name!r} and implementation="
                f"{self.implementation!r}: leave them out"
            )

    def transform(
        self,
        x: Array,
        params: Params,
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
        residual: ArrayLike | None = None,
    ) -> Any:
        size, how = self.first_features, {"mask": mask, "dtype": dtype}
        if size is None:
            return super().transform(x, params, residual=residual, **how)
        how["mask"] = as_mask(mask, x.shape)
        if residual is None:
            return self._by_first(x, size, params, **how)
        x = add_residual(x, residual)
        return x, self._by_first(x, size, params, **how)

    @one_rounding
    def _by_first(
        self,
        x: Array,
        size: int,
        params: Params,
        *,
        mask: Array | None,
        dtype: DTypeLike | None,
    ) -> Array:
        first = self._first(x.shape, size)
        valid = None if mask is None else jnp.broadcast_to(mask, x.shape)[first]

        @recomputed  # so that the part is not kept beside the whole
        def square(x: Array) -> Moments:
            part = x[first]
            return moments(part, self.axes(part.shape), mask=valid, center=False)

        params = self.with_whole_scale(x, params)
        return self.normalize_by(x, params, square(x), mask=mask, dtype=dtype)

    def _first(self, shape: Shape, size: int) -> tuple[slice, ...]:
        """Where the `size` features are whose mean square is taken."""
        reduce = self.axes(shape).reduce
        if len(reduce) != 1 or 0 < shape[reduce[0]] < size:
            raise ValueError(
                f"first_features={size} must be at most the number of elements along "
                f"the one axis that is reduced, got reduction_axes="
                f"{self.reduction_axes} for an input of shape {shape}"
            )
        return *[slice(None)] * reduce[0], slice(size)


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    reduction_axes: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
    zero_centered_scale: bool = False,
    first_features: int | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: str | None = None,
) -> Any:
    """Divides `x` by its root mean square over `reduction_axes`; no mean is subtracted.

        y = x / sqrt((x**2).mean(reduction_axes, keepdims=True) + epsilon) * scale

    Args:
        x: array of numbers; integers are read as float32.
        scale: of the shape of `feature_axes`, or (batch, *features) for one per
            example; None is 1.
        reduction_axes: the axes that share a mean square.
        feature_axes: the axes that the scale varies along.
        epsilon: added to the mean square.
        zero_centered_scale: multiply by 1 + scale, as in Gemma.
        residual: array of the shape of x, or 0, added to x before the norm: the sum is
            returned, too, for what else reads it, whose gradient kernels for GPUs add
            to the norm's.
        first_features: number of features, the first ones, whose mean square is taken
            for that of all, `(x[..., :first_features]**2).mean(-1, keepdims=True)`;
            None for all. It needs one reduction axis and takes no `axis_name` and no
            kernels; where a mask leaves none of the first, their mean square is 0.
        mask: boolean, or 0 and 1, broadcasting to x; what it excludes counts for
            nothing and comes out as 0.
        axis_name: mapped axis, or several, over whose devices `x` is split.
        axis_index_groups: groups of indices along `axis_name` that share statistics.
        implementation: None for kernels where they are default, as on CPUs; "triton"
            or "mosaic" for kernels on NVIDIA's GPUs, too, of the gradient; "xla" for
            XLA's formula everywhere.

    Returns:
        y, of the shape and dtype of x; with a residual, (x + residual, y). The mean
        square is taken in at least float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes, axes or settings that
            do not fit.

    Source: Zhang and Sennrich, 2019; `first_features` is their partial RMS norm.

    >>> import jax.numpy as jnp, jaxnorm
    >>> print(jaxnorm.rms_norm(jnp.array([[2.0, 2.0], [-30.0, 30.0]])).round(3))
    [[ 1.  1.]
     [-1.  1.]]
    """
    norm = RMSNorm(
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=epsilon,
        zero_centered_scale=zero_centered_scale,
        first_features=first_features,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        implementation=implementation,
    )
    return norm(x, {"scale": scale}, {}, mask=mask, residual=residual)[0]
