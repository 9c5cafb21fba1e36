"""What is a batch norm in evaluation, for each feature?"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import as_epsilon, check_known
from jaxnorm._dtypes import at_least_float32, promote
from jaxnorm.models._leaves import array_of
from jaxnorm.models._paths import check_tree


def affine_form(
    params: Mapping[str, ArrayLike | None],
    stats: Mapping[str, ArrayLike],
    *,
    epsilon: float,
) -> tuple[Array, Array]:
    """The a and b of a batch norm in evaluation, `a * x + b` for each feature.

        a = scale / sqrt(var + epsilon)
        b = bias - mean * a

    This is so for every norm that evaluates as `BatchNorm` does, by running statistics.
    `EvalNorm` does not, and cannot be told from them by its variables; `find_pairs`
    can tell.

    Args:
        params: {"scale", "bias"}, of which either may be missing or None: 1 and 0. A
            "control" counts for nothing.
        stats: {"mean", "var"}, or {"var"} alone, as of `PowerNorm`: the mean is 0.
        epsilon: that of the layer. Variables do not hold it, and the defaults of
            layers differ, so that there is none here.

    Returns:
        a and b, in at least float32.

    Raises:
        ValueError, TypeError: for parameters of other methods, missing statistics,
            shapes that differ, and an epsilon that is negative or no number.

    >>> import jax.numpy as jnp, jaxnorm
    >>> from jaxnorm import models
    >>> stats = {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}
    >>> a, b = models.affine_form({"scale": jnp.array([6.0])}, stats, epsilon=0.0)
    >>> print(a, b)
    [3.] [-3.]
    """
    check_tree(params, "params")
    check_tree(stats, "stats")
    unknown = sorted({*params} - {"scale", "bias", "control"})
    if unknown:
        raise ValueError(
            f"a norm with the parameters {unknown} is not affine in its input: only "
            "norms of scale and bias can be folded"
        )
    if stats.get("var") is None:
        raise ValueError(
            f"a norm to fold keeps a running variance, 'var', got {sorted(stats)}"
        )
    check_known("epsilon", as_epsilon("epsilon", epsilon))
    named = {k: {**params, **stats}.get(k) for k in ("scale", "bias", "mean", "var")}
    arrays = {k: array_of(k, v) for k, v in named.items() if v is not None}
    shapes = {k: v.shape for k, v in arrays.items()}
    if len({*shapes.values()}) > 1:
        raise ValueError(
            f"the parameters and statistics of a norm are of one shape, got {shapes}: "
            "take both from one layer, and one row of a table of domains or steps"
        )
    wide = at_least_float32(promote(*(v.dtype for v in arrays.values())))
    arrays = {k: v.astype(wide) for k, v in arrays.items()}
    a = arrays.get("scale", 1) / jnp.sqrt(arrays["var"] + epsilon)
    b = arrays.get("bias", 0) - arrays.get("mean", 0) * a
    return a, b
