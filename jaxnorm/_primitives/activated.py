"""A norm by own moments and its activation as one operation, which keeps x alone.

Only where kernels for GPUs are asked for: their gradient takes all sums in one pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxnorm import _exact as exact
from jaxnorm._activation import ACTIVATIONS
from jaxnorm._axes import Axes
from jaxnorm._dtypes import at_least_float32
from jaxnorm._primitives import _moment_formulas as formulas
from jaxnorm._primitives import affine, rows
from jaxnorm._primitives._linear import Linear
from jaxnorm._primitives._operation import Operation, Reduction, Struct


class Activated(NamedTuple):
    """What is known of a normalization and its activation before any array is."""

    reduction: Reduction
    activation: str

    @property
    def axes(self) -> Axes:
        return self.reduction.axes

    @property
    def implementation(self) -> str | None:
        return self.reduction.implementation

    @property
    def wide(self) -> Reduction:
        """Of the result before the activation, so that it is rounded once."""
        return self.reduction._replace(dtype=at_least_float32(self.reduction.dtype))

    def batched(self, size: int) -> "Activated":
        return self._replace(reduction=self.reduction.batched(size))


class Normed(NamedTuple):
    """What is normalized, with what, and its moments."""

    x: Array
    epsilon: Array
    scale: Array | None
    bias: Array | None
    mean: Array
    var: Array
    residue: Array

    @property
    def line(self) -> affine.Line:
        rstd = exact.rstd(self.var, self.epsilon)
        return affine.Line(self.mean, self.residue, rstd, self.scale, self.bias)


def norm(
    centered: Callable[..., Any],
    static: Activated,
    x: Array,
    epsilon: Array,
    scale: Array | None,
    bias: Array | None,
) -> tuple[Array, ...]:
    """The activated norm, and the moments by the formula `centered`."""
    _, z, *m = rows.norm(centered, static.wide, x, epsilon, scale, bias)
    y = ACTIVATIONS[static.activation](z)
    return y.astype(static.reduction.dtype), *m


def tangent(
    static: Activated, normed: Normed, change: rows.RowChange
) -> tuple[Array, ...]:
    """The tangents of y, mean and variance."""
    x, epsilon, scale, _, *m = normed
    row = rows.Row(x, epsilon, scale, *m)
    formula = functools.partial(rows.tangent, rows.as_given, affine.by_sums)
    _, dz, dmean, dvar = formula(static.wide, row, change)
    z = affine.apply_line(x, None, normed.line, static.axes)
    z = z.reshape(static.axes.shape)
    _, dy = jax.jvp(ACTIVATIONS[static.activation], (z,), (dz.astype(z.dtype),))
    return dy.astype(static.reduction.dtype), dmean, dvar


def _norm_results(static: Activated, x: Any, *_: Any) -> list[Struct]:
    y = Struct(static.axes.shape, static.reduction.dtype)
    return [y, *formulas.results(static.reduction, x)]


def _tangent_results(static: Activated, normed: Normed, _: Any) -> list[Struct]:
    return _norm_results(static, normed.x)[:3]


ACTIVATED_TANGENT = Linear(
    "activated_tangent", "activated_gradient", tangent, _tangent_results
)


class _ActivatedNorm(Operation):
    def tangent(
        self, static: Activated, operands: Any, changes: Any, out: list[Array]
    ) -> list[Array]:
        found = ACTIVATED_TANGENT(
            static, Normed(*operands, *out[1:]), rows.RowChange(*changes)
        )
        return [*found, jnp.zeros_like(out[-1])]


ACTIVATED_NORM = _ActivatedNorm(
    "activated_norm", functools.partial(norm, formulas.about_the_mean), _norm_results
)
