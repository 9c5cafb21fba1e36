"""Which figures sum up the statistics of a layer, and its fresh batch?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxnorm._marks import shape_of
from jaxnorm.models._health.records import LayerHealth, Limits


def layer_health(
    path: str,
    stats: Mapping[str, np.ndarray],
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray] | None,
    limits: Limits,
) -> LayerHealth:
    """The figures of one layer, without findings."""
    var = stats.get("var", np.array([]))
    valid = _valid("var", var)
    known = {} if batch is None else _batch_figures(stats, batch, limits)
    return LayerHealth(
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


def _spread(name: str, values: np.ndarray) -> dict[str, Any]:
    """The least, median and greatest of the finite values, under `name`."""
    values = values[np.isfinite(values)]
    of = {"min": np.min, "median": np.median, "max": np.max}
    return {
        f"{name}_{k}": float(f(values)) if values.size else None for k, f in of.items()
    }


def _infinite(values: np.ndarray) -> int:
    """How many values are infinite or NaN."""
    return int((~np.isfinite(values)).sum())


def _valid(name: str, values: np.ndarray) -> np.ndarray:
    """The values of a statistic, with NaN in place of those that it cannot have."""
    possible = np.isfinite(values) & ((name == "mean") | (np.real(values) >= 0))
    return np.where(possible, values, np.nan)


def _never_updated(stats: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether the statistics of each feature are those that `init_stats` makes."""
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
    """Whether a fresh batch has enough elements of each feature, if it is known."""
    return batch.get("size", np.array(np.inf)) >= limits.least


def _batch_figures(
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
    """The differences of a batch's mean and deviation, in running deviations."""
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
