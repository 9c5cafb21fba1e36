"""Are the running statistics of a model fit to evaluate it with?"""

import dataclasses
import re
from typing import Any

import jax

from jaxnorm._arguments import as_epsilon
from jaxnorm.models._health.arrays import (
    as_float64,
    batches_of,
    check_known,
    scales_of,
)
from jaxnorm.models._health.figures import layer_health
from jaxnorm.models._health.records import LayerHealth, Limits
from jaxnorm.models._health.report import as_figure, as_table
from jaxnorm.models._health.rules import findings
from jaxnorm.models._paths import (
    Tree,
    Where,
    everywhere,
    join_path,
    select_layers,
)
from jaxnorm.models._shown import Shown


@dataclasses.dataclass(frozen=True)
class Health(Shown):
    """The report of `health`: a row of figures and findings for each layer.

    `print` shows a table, `rich.print` and a notebook one in colours.
    """

    rows: tuple[LayerHealth, ...]
    limits: Limits

    @property
    def healthy(self) -> bool:
        """Whether nothing was found in any layer."""
        return not any(row.findings for row in self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, for JSON or a data frame."""
        return [dataclasses.asdict(row) for row in self.rows]

    def scalars(self) -> dict[str, float]:
        """Every figure that is known, such as "Block_0/BatchNorm_1/var_min", and in
        "findings" how many each layer has: what a logger takes in one call."""
        return {
            join_path(row.path, name): float(value)
            for row in self.rows
            for name, value in (*vars(row).items(), ("findings", len(row.findings)))
            if isinstance(value, int | float)
        }

    def figure(self) -> Any:
        """A matplotlib Figure of the variances, the means and, if known, the drift.

        Raises ImportError without matplotlib, which `jaxnorm[examples]` installs.
        """
        return as_figure(self.rows, self.limits)

    def __rich__(self) -> Any:
        return as_table(self.rows)


def health(
    batch_stats: Tree,
    params: Tree | None = None,
    *,
    fresh: Tree | None = None,
    where: Where = everywhere,
    epsilon: float = 1e-5,
    dead: float = 1e-3,
    drift: float = 0.5,
    least: int = 16,
) -> Health:
    """A report on what is wrong with the running statistics of each layer of a model.

    | Rule | Found where |
    |---|---|
    | never updated | a mean is exactly 0 and its variance 1, or a count is 0 |
    | not finite | a value is NaN or infinite, or a variance negative |
    | small variance | `var < epsilon`: epsilon decides what the layer divides by |
    | dead | `abs(scale) * sqrt(v / (var + epsilon)) < dead`, the deviation of the output at evaluation; `v` is the variance of the fresh batch, or else `var` |
    | drift | more than 1 in 20 features drift |
    | small batch | there are fewer than `least` elements in a statistic of the fresh batch: a variance of n elements is off by `sqrt(2 / (n - 1))` of itself |
    | not reached | no element of the fresh batch is in a statistic of the layer |
    | batch not finite | a moment of the fresh batch is NaN or infinite |

    A feature drifts where the fresh batch differs from the running statistics by more
    than `drift`, in its mean, `abs(fresh_mean - mean) / sqrt(var + epsilon)`, or in its
    deviation, `abs(log((fresh_var + epsilon) / (var + epsilon))) / 2`, and by more than
    chance makes it, `4 / sqrt(n)`. From fewer than `least` elements, no feature is said
    to drift or to be dead.

    All figures are taken on the host, in float64; not under `jit`. For an NNX model,
    `health(**jaxnorm.nnx.variables(model))`.

    Args:
        batch_stats: statistics of the layers of a model, or of one layer. Those that
            pool the moments of batches have a fresh batch of their own.
        params: parameters of the same model, for the scales; one that is not there is 1.
        fresh: the same tree after a training pass with statistics that pool the moments
            of its batches; one batch of the training tells whether it is large enough.
            Or else moments by layer: "mean", "var" or both, and "size" if known.
        where: whether to take the layer at a path, such as "Block_0/BatchNorm_1".
        epsilon: what the layers add to the variance.
        dead: deviation of an output that counts as constant.
        drift: differences up to here are none, in deviations.
        least: elements that a statistic of a batch needs to be trusted.

    Returns:
        A row of figures and findings for each layer: `rows`, `healthy`, `as_dicts()`,
        `scalars()`, `figure()`, and a table by `print`, `rich.print` or in a notebook.

    Raises:
        ValueError: if `where` selects no layer, `params` hold their scales at other
            paths, `fresh` lacks a layer or holds no batch, a limit is not as it should
            be, or shapes differ.
        TypeError: for what is no tree of arrays, limits that are no numbers, and under
            `jit`.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]] * 8)
    >>> _, stats = jaxnorm.batch_norm(
    ...     x, jaxnorm.init_stats(2), use_running_average=False, momentum=0.0
    ... )
    >>> report = jaxnorm.models.health({"stem": stats, "head": jaxnorm.init_stats(2)})
    >>> for row in report.rows:
    ...     print(row.path, [f"{f.rule}: {f.detail}" for f in row.findings])
    head ['never updated: all 2 features']
    stem ['small variance: 1 of 2 features', 'dead: 1 of 2 features']
    """  # noqa: E501
    if not as_epsilon("epsilon", epsilon) > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}: give the layers'")
    others = {"dead": dead, "drift": drift, "least": least}
    limits = Limits(epsilon, *(as_epsilon(k, v) for k, v in others.items()))
    layers = select_layers(batch_stats, where)
    check_known(batch_stats, params, fresh)
    scales, batches = scales_of(layers, params), batches_of(layers, fresh)
    arrays = jax.device_get((layers, scales, batches))
    layers, scales, batches = ({p: as_float64(v) for p, v in t.items()} for t in arrays)
    rows = [
        layer_health(path, stats, scales.get(path, {}), batches.get(path), limits)
        for path, stats in sorted(layers.items(), key=_by_number)
    ]
    rows = [dataclasses.replace(r, findings=findings(r, limits)) for r in rows]
    return Health(tuple(rows), limits)


def _by_number(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """The key that sorts "Block_10" after "Block_9"."""
    parts = re.split(r"(\d+)", item[0])
    return [(int(v), "") if v.isdigit() else (-1, v) for v in parts]
