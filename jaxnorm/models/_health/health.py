"""Are the running statistics of a model fit to evaluate it with?"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxnorm._arguments import as_epsilon
from jaxnorm._marks import BATCH, MARKS, shape_of
from jaxnorm.models._paths import (
    Tree,
    Where,
    check_layers,
    everywhere,
    layers,
    path_name,
    select_layers,
)

# A few features may stray without a word: in wide layers, some always do.
DRIFTED_SHARE = 0.05


class Limits(NamedTuple):
    """From where on `health` finds something; its arguments of the same names."""

    epsilon: float = 1e-5
    dead: float = 1e-3
    drift: float = 0.5
    least: int = 16


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong with a layer (the rule, and how much) and what to do about it."""

    rule: str
    detail: str
    fix: str
    severe: bool


@dataclasses.dataclass(frozen=True)
class LayerHealth:
    """The figures of one layer: numbers of features, or of what else is said.

    Those of means are of absolute values. None is what the layer does not keep, or
    what only a fresh batch could tell.
    """

    path: str
    features: int  # steps and domains with statistics of their own count apart
    mean_min: float | None
    mean_median: float | None
    mean_max: float | None
    var_min: float | None
    var_median: float | None
    var_max: float | None
    never_updated: int
    invalid: int  # values that are NaN or infinite, and negative variances
    small: int  # of a variance below epsilon
    dead: int  # of a constant output
    size: int | None = None  # elements of the fresh batch in each statistic, at least
    fresh_invalid: int | None = None
    mean_drift_median: float | None = None
    mean_drift_max: float | None = None
    deviation_drift_median: float | None = None
    deviation_drift_max: float | None = None
    drifted: int | None = None
    findings: tuple[Finding, ...] = ()


@dataclasses.dataclass(frozen=True)
class Health:
    """The report of `health`: one row per layer, and ways to show them.

    `print` shows a table, and `rich.print` one in colours.
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

    def figure(self) -> Any:
        """A matplotlib Figure of the variances, the means and, if known, the drift.

        Raises ImportError without matplotlib, which `jaxnorm[examples]` installs.
        """
        from jaxnorm.models._health.report import as_figure

        return as_figure(self)

    def __str__(self) -> str:
        from jaxnorm.models._health.report import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from jaxnorm.models._health.report import as_table

        return as_table(self)


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
    """What is wrong with the running statistics of each layer of a model.

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
        where: whether the layer at a path, such as "Block_0/BatchNorm_1", is meant.
        epsilon: what the layers add to the variance.
        dead: deviation of an output that counts as constant.
        drift: differences up to here are none, in deviations.
        least: elements that a statistic of a batch needs to be trusted.

    Returns:
        A row of figures and findings for each layer: `rows`, `healthy`, `as_dicts()`,
        `figure()`, and a table by `print` or `rich.print`.

    Raises:
        ValueError: if `where` means no layer, `params` hold their scales at other
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
    given = {"dead": dead, "drift": drift, "least": least}
    limits = Limits(epsilon, *(as_epsilon(k, v) for k, v in given.items()))
    found = select_layers(batch_stats, where)
    _check_known(batch_stats, params, fresh)
    scales, batches = _scales(found, params), _batches(found, fresh)
    arrays = jax.device_get((found, scales, batches))
    found, scales, batches = ({p: _float64(v) for p, v in t.items()} for t in arrays)
    rows = (
        _row(path, stats, scales.get(path, {}), batches.get(path), limits)
        for path, stats in sorted(found.items(), key=_by_number)
    )
    return Health(tuple(rows), limits)


def _check_known(*trees: Tree | None) -> None:
    """Raises TypeError for arrays whose values are not known."""
    for value in jax.tree.leaves(trees):
        if isinstance(value, Tracer | jax.ShapeDtypeStruct):
            raise TypeError(
                f"health needs values, got {type(value).__name__} of shape "
                f"{value.shape}: call it outside of `jit`, with the arrays it returns"
            )


def _by_number(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Sorts "Block_10" after "Block_9"."""
    parts = re.split(r"(\d+)", item[0])
    return [(int(v), "") if v.isdigit() else (-1, v) for v in parts]


def _scales(found: Mapping[str, Any], params: Tree | None) -> dict[str, Any]:
    """{"scale"} of the layers that have one; there may be none."""
    if params is None:
        return {}
    check_layers(params, "params")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    by_path = {path_name(path): value for path, value in leaves}
    names = {path: f"{path}/scale".lstrip("/") for path in found}
    scales = {p: {"scale": by_path[k]} for p, k in names.items() if k in by_path}
    if not scales and any(
        _shifted(k, name) for k in by_path for name in names.values()
    ):
        raise ValueError(
            f"params hold no scale for any of the layers {list(found)}: pass those of "
            'the same model, variables["params"], with no other tree around them, or '
            "leave them out"
        )
    for path, scale in scales.items():
        features = shape_of(found[path])
        if not _broadcasts(np.shape(scale["scale"]), features):
            raise ValueError(
                f"the scale of {path!r} has shape {np.shape(scale['scale'])}, but the "
                f"statistics {features}: take both from one model"
            )
    return scales


def _shifted(a: str, b: str) -> bool:
    """Whether one path is the other one below something."""
    return a.endswith(f"/{b}") or b.endswith(f"/{a}")


def _batches(found: Mapping[str, Any], fresh: Tree | None) -> dict[str, Any]:
    """The moments of a fresh batch, {"mean", "var", "size"} as far as known."""
    if fresh is not None:
        check_layers(fresh, "fresh")
    source = found if fresh is None else layers(fresh)
    missing = [path for path in found if path not in source]
    if missing:
        raise ValueError(
            f"fresh lacks the layers {missing}, it holds {list(source)}: take it from "
            "the same model, or leave layers out with `where`"
        )
    source = {path: source[path] for path in found}
    batches = {p: _pooled(stats) for p, stats in source.items() if BATCH[0] in stats}
    empty = batches and not any(np.any(m["size"]) for m in batches.values())
    if fresh is None and empty:
        return {}
    if empty:
        raise ValueError(
            f"fresh holds no batch in any of {list(batches)}: pass the statistics that "
            "a training pass of the model returned; Flax's own norms gather none"
        )
    if fresh is not None and not batches:
        batches = source
    for path, moments in batches.items():
        _check_batch(path, found[path], moments)
    return batches


def _pooled(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {k: stats[f"batch_{k}"] for k in ("mean", "var", "size")}


def _check_batch(
    path: str, stats: Mapping[str, Any], moments: Mapping[str, Any]
) -> None:
    shape = shape_of(stats)
    for name, value in moments.items():
        fits = _broadcasts if name == "size" else tuple.__eq__
        if name in ("mean", "var", "size") and not fits(np.shape(value), shape):
            raise ValueError(
                f"the {name} of {path!r} in the fresh batch has shape "
                f"{np.shape(value)}, but the statistics {shape}: take both "
                "from one model"
            )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def _float64(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`arrays` but the marks, of whatever is wide enough for them all."""
    return {
        k: np.asarray(v, np.complex128 if np.iscomplexobj(v) else np.float64)
        for k, v in arrays.items()
        if k not in MARKS
    }


def _row(
    path: str,
    stats: Mapping[str, np.ndarray],
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray] | None,
    limits: Limits,
) -> LayerHealth:
    var = stats.get("var", np.array([]))
    valid = _valid("var", var)
    known = {} if batch is None else _of_batch(stats, batch, limits)
    row = LayerHealth(
        path=path,
        features=int(np.prod(shape_of(stats))),
        **_spread("mean", abs(stats.get("mean", np.array([])))),
        **_spread("var", valid),
        never_updated=int(_never_updated(stats).sum()),
        invalid=sum(_infinite(v) for v in stats.values()) + int((var < 0).sum()),
        small=int((valid < limits.epsilon).sum()),
        dead=int((_output_deviation(stats, params, batch, limits) < limits.dead).sum()),
        **known,
    )
    found = [(rule, rule.detail(row, limits)) for rule in RULES]
    findings = (Finding(r.name, text, r.fix, r.severe) for r, text in found if text)
    return dataclasses.replace(row, findings=tuple(findings))


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    of = {"min": np.min, "median": np.median, "max": np.max}
    return {
        f"{name}_{k}": float(f(values)) if values.size else None for k, f in of.items()
    }


def _infinite(values: np.ndarray) -> int:
    return int((~np.isfinite(values)).sum())


def _valid(name: str, values: np.ndarray) -> np.ndarray:
    """`values`, with NaN in place of those that no mean or variance can have."""
    possible = np.isfinite(values) & ((name == "mean") | (np.real(values) >= 0))
    return np.where(possible, values, np.nan)


def _never_updated(stats: Mapping[str, np.ndarray]) -> np.ndarray:
    """Where all statistics of a feature are those that `init_stats` makes."""
    if "count" in stats:
        return stats["count"] == 0
    initial = [stats[k] == v for k, v in (("mean", 0), ("var", 1)) if k in stats]
    if "whitening" in stats:
        rows = stats["whitening"].reshape(*shape_of(stats), -1)
        size = rows.shape[-1]
        eye = np.tile(np.eye(size), (rows.shape[-2] // size, 1))
        initial.append((rows == eye).all(-1))
    return np.logical_and.reduce(initial)


def _output_deviation(
    stats: Mapping[str, np.ndarray],
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray] | None,
    limits: Limits,
) -> np.ndarray:
    """The deviation of each feature of the output at evaluation."""
    scale = abs(params.get("scale", np.array(1.0)))
    deviation = np.broadcast_to(scale, shape_of(stats))
    if "var" not in stats:  # whitened
        return deviation
    var = seen = _valid("var", stats["var"])
    if batch is not None and "var" in batch:
        fresh = _valid("var", batch["var"])
        seen = np.where(_trusted(batch, limits), fresh, var)
    return deviation * np.sqrt(seen / (var + limits.epsilon))


def _trusted(batch: Mapping[str, np.ndarray], limits: Limits) -> np.ndarray:
    """Where a fresh batch is large enough, or its size not known."""
    return batch.get("size", np.array(np.inf)) >= limits.least


def _of_batch(
    stats: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], limits: Limits
) -> dict[str, Any]:
    """The figures that need a fresh batch."""
    size = np.broadcast_to(batch.get("size", np.array(np.inf)), shape_of(stats))
    moments = {k: batch[k] for k in ("mean", "var") if k in batch and k in stats}
    drifts = _drifts(stats, moments, limits.epsilon)
    drifts = {k: np.where(size > 0, v, np.nan) for k, v in drifts.items()}
    far = np.maximum(limits.drift, 4 / np.sqrt(np.maximum(size, 1)))
    strays = np.array([(v > far) & _trusted(batch, limits) for v in drifts.values()])
    figures = {
        "fresh_invalid": sum(_infinite(_valid(k, v)) for k, v in moments.items()),
        "drifted": int(strays.any(0).sum()),
    }
    if "size" in batch:
        figures["size"] = int(size[size > 0].min(initial=size.max()))
    for name, values in drifts.items():
        spread = _spread(f"{name}_drift", values)
        figures |= {k: v for k, v in spread.items() if not k.endswith("min")}
    return figures


def _drifts(
    stats: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray], epsilon: float
) -> dict[str, np.ndarray]:
    """How far the batch is off, in running deviations: its mean, its deviation."""
    if "var" not in stats:
        return {}
    stats, batch = ({k: _valid(k, v) for k, v in t.items()} for t in (stats, batch))
    divisor = stats["var"] + epsilon
    drifts = {}
    if "mean" in batch:
        drifts["mean"] = abs(batch["mean"] - stats["mean"]) / np.sqrt(divisor)
    if "var" in batch:
        drifts["deviation"] = abs(np.log((batch["var"] + epsilon) / divisor)) / 2
    return drifts


class Rule(NamedTuple):
    """Something to find, the words for how much of it there is, and what to do."""

    name: str
    detail: Callable[[LayerHealth, Limits], str]  # "" where there is none
    fix: str
    severe: bool = False


def _features(count: int, row: LayerHealth) -> str:
    if not count:
        return ""
    share = f"all {count}" if count == row.features else f"{count} of {row.features}"
    return f"{share} features"


def _drifted(row: LayerHealth, limits: Limits) -> str:
    count = row.drifted or 0
    return _features(count, row) if count > DRIFTED_SHARE * row.features else ""


def _small_batch(row: LayerHealth, limits: Limits) -> str:
    if not row.size or row.size >= limits.least:
        return ""
    if row.size == 1:
        return "1 element, which has no variance"
    error = np.sqrt(2 / (row.size - 1))
    return f"{row.size} elements, variances are off by {error:.0%}"


RULES = (
    Rule(
        "never updated",
        lambda row, _: _features(row.never_updated, row),
        'train with mutable=["batch_stats"] and keep what comes back (in NNX, after '
        "model.train()), unfreeze the layer, or load its statistics: evaluation takes "
        "mean 0 and variance 1",
        severe=True,
    ),
    Rule(
        "not finite",
        lambda row, _: f"{row.invalid} values" if row.invalid else "",
        "go back to a checkpoint before, or start from init_stats and train; batches "
        "with moments that are not finite change nothing here, so look where else the "
        "statistics were computed or converted",
        severe=True,
    ),
    Rule(
        "small variance",
        lambda row, _: _features(row.small, row),
        "scale up what enters the layer, or give it a smaller epsilon, which decides "
        "here what it divides by",
    ),
    Rule(
        "dead",
        lambda row, _: _features(row.dead, row),
        "prune the features, whose output is constant, or keep weight decay off their "
        "scale (decay_mask); a scale that is meant to start at 0 is no fault",
    ),
    Rule(
        "drift",
        _drifted,
        "take the statistics anew from batches such as the fresh one, lower the "
        "momentum, or prepare the data alike in training and evaluation",
    ),
    Rule(
        "small batch",
        _small_batch,
        "give the layer more examples, pool devices with axis_name, freeze it, or take "
        "a norm that needs no batch, such as group norm",
    ),
    Rule(
        "not reached",
        lambda row, _: "no elements" if row.size == 0 else "",
        "pass a batch that the layer takes part in, in training, or leave the layer "
        "out with `where`, as if it is Flax's own, which gathers no batch",
    ),
    Rule(
        "batch not finite",
        lambda row, _: f"{row.fresh_invalid} values" if row.fresh_invalid else "",
        "look for NaN in the batch and for overflow in the layers before this one",
        severe=True,
    ),
)
