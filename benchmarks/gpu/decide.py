"""From the results of a run to the defaults, by a rule and nothing else.

A box is a range of features and a least size, of a pattern of kernels, for some dtypes.
Kernels become the default in the largest box of tested arrays in which

1. all checks of the pattern pass, and repeats give the same bits;
2. the gradient with its forward pass takes at least 5 % and twice the noise less than
   XLA's at three of the four main shapes, and nowhere more than 2 % and the noise more;
3. by the clock, the smallest array takes no longer than by XLA;
4. training steps take no more than 0.5 % longer, and 1 % more memory.

Of two backends whose kernels may, it is the one that is faster by more than 3 % over
the arrays of both, or else Triton before jax 0.13 and Mosaic from then on.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

PATTERNS = {"rows": ("LN", "RMS"), "columns": ("GN + SiLU",)}
STEPS = {"rows": "blocks", "columns": "U-Net"}
MODES = ("both", "both, skip")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FASTER, SLOWER = 0.05, 0.02
STEP_SLOWER, STEP_LARGER = 0.005, 0.01
BACKEND_FASTER = 0.03
MAIN = 4  # shapes of each pattern, the first ones timed; three of them decide

Results = dict[str, Any]


class Point(NamedTuple):
    """A case that XLA and a backend have both been timed at."""

    shape: tuple[int, ...]
    dtype: str
    ratio: float  # of the kernel's time to XLA's
    noise: float
    wall_ratio: float

    @property
    def features(self) -> int:
        return self.shape[-1]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def is_slower(self) -> bool:
        return self.ratio > 1 + SLOWER + self.noise

    @property
    def is_faster(self) -> bool:
        return self.ratio < 1 - FASTER - 2 * self.noise


class Decision(NamedTuple):
    """Of a pattern and a backend: the boxes in which it may be the default, or why it
    may nowhere."""

    pattern: str
    backend: str
    box: dict[str, Any] | None
    why: str
    points: tuple[Point, ...] = ()


def decisions(results: Results) -> list[Decision]:
    if results["dry_run"]:
        return []
    found = []
    for pattern in PATTERNS:
        both = [_decision(results, pattern, b) for b in ("triton", "mosaic")]
        found += _one_of_two(both, results["versions"]["jax"])
    return found


def defaults(results: Results) -> list[dict[str, Any]]:
    """What `defaults.json` holds for the device of a run."""
    return [d.box for d in decisions(results) if d.box is not None]


def _decision(results: Results, pattern: str, backend: str) -> Decision:
    points = tuple(_points(results, pattern, backend))
    why = _wrong(results, pattern, backend) or _slow_steps(results, pattern, backend)
    if why or not points:
        why = why or "it was not timed beside XLA"
        return Decision(pattern, backend, None, why, points)
    boxes = [b for b in _boxes(pattern, backend, points) if _holds(b, points)]
    if not boxes:
        why = "in no box it is faster at three of four main shapes and slower nowhere"
        return Decision(pattern, backend, None, why, points)
    box = max(boxes, key=lambda b: (len(_inside(b, points)), -b["least_bytes"]))
    return Decision(pattern, backend, box, "the rule holds", points)


def _wrong(results: Results, pattern: str, backend: str) -> str:
    """Rule 1."""
    own = {"pattern": pattern, "backend": backend}
    checks = [c for c in results["checks"] if own.items() <= c.items()]
    wrong = [c for c in checks if not c["ok"]]
    if wrong:
        c = wrong[0]
        return f"{len(wrong)} of {len(checks)} checks fail: {c['case']} {c['shape']}"
    unfinished = [n for n in results["not_run"] if n.startswith(f"checks: {backend}")]
    if unfinished or not any(c["by_kernel"] for c in checks):
        return f"{len(unfinished)} checks were not run, {len(checks)} were"
    return ""


def _slow_steps(results: Results, pattern: str, backend: str) -> str:
    """Rule 4."""
    steps = [s for s in results["steps"] if STEPS[pattern] in s["step"]]
    by_xla = {s["step"]: s for s in steps if s["impl"] == "xla"}
    own = [s for s in steps if s["impl"] == backend and s["step"] in by_xla]
    for step in own:
        xla = by_xla[step["step"]]
        if not step["agrees"]:
            return f"the loss differs in a step of {step['step']}"
        if step["ms"] > xla["ms"] * (1 + STEP_SLOWER):
            return f"a step of {step['step']} takes {step['ms'] / xla['ms']:.3f} times"
        if (step["peak_bytes"] or 0) > (xla["peak_bytes"] or 0) * (1 + STEP_LARGER):
            return f"a step of {step['step']} takes more memory"
    return "" if own else "no training step was timed"


def _points(results: Results, pattern: str, backend: str) -> Iterator[Point]:
    timed = {}
    for t in results["times"]:
        if t["norm"] in PATTERNS[pattern] and t["mode"] in MODES and "us" in t:
            case = t["norm"], t["mode"], tuple(t["shape"]), t["dtype"]
            timed.setdefault(case, {})[t["impl"]] = t
    for (_, _, shape, dtype), by in timed.items():
        if {"xla", backend} <= by.keys():
            xla, own = by["xla"], by[backend]
            ratio = _median(own["us"]) / _median(xla["us"])
            noise = max(map(_noise, (xla["us"], own["us"])))
            wall = own["wall_us"] / xla["wall_us"]
            yield Point(shape, dtype, ratio, noise, wall)


def _median(times: list[float]) -> float:
    return sum(times) / len(times)


def _noise(times: list[float]) -> float:
    return (max(times) - min(times)) / min(times)


def _boxes(pattern: str, backend: str, points: tuple[Point, ...]) -> Iterator[dict]:
    """All ranges between tested arrays, for bfloat16 and what else was timed there."""
    widths = sorted({p.features for p in points})
    sizes = sorted({p.bytes for p in points})
    for least, most in itertools.combinations_with_replacement(widths, 2):
        for size in sizes:
            box = {
                "pattern": pattern,
                "backend": backend,
                "dtypes": ["bfloat16"],
                "features": [least, most],
                "least_bytes": size,
            }
            others = [p for p in points if p.dtype != "bfloat16"]
            for dtype in sorted({p.dtype for p in others}):
                own = _inside(box | {"dtypes": [dtype]}, points)
                if own and all(p.is_faster for p in own):
                    box["dtypes"].append(dtype)
            yield box


def _inside(box: dict, points: tuple[Point, ...]) -> list[Point]:
    least, most = box["features"]
    return [
        p
        for p in points
        if p.dtype in box["dtypes"]
        and least <= p.features <= most
        and p.bytes >= box["least_bytes"]
    ]


def _holds(box: dict, points: tuple[Point, ...]) -> bool:
    """Rules 2 and 3."""
    inside = _inside(box, points)
    usual = [p for p in inside if p.dtype == "bfloat16"]
    if not usual or any(p.is_slower for p in inside):
        return False
    main = list(dict.fromkeys(p.shape for p in points if p.dtype == "bfloat16"))[:MAIN]
    faster = [s for s in main if all(p.is_faster for p in usual if p.shape == s)]
    known = {p.shape for p in usual}
    smallest = min(p.bytes for p in inside)
    by_the_clock = max(p.wall_ratio for p in inside if p.bytes == smallest)
    return len(known.intersection(faster)) >= 3 and by_the_clock <= 1


def _one_of_two(found: list[Decision], jax: str) -> list[Decision]:
    """Without the box of the backend that the other is preferred to."""
    if any(d.box is None for d in found):
        return found
    ratios = [
        {(p.shape, p.dtype): p.ratio for p in _inside(d.box or {}, d.points)}
        for d in found
    ]
    common = ratios[0].keys() & ratios[1].keys()
    triton, mosaic = (sum(r[k] for k in common) for r in ratios)
    newer = tuple(map(int, jax.split(".")[:2])) >= (0, 13)
    chosen = "mosaic" if newer else "triton"
    if common and abs(triton - mosaic) > BACKEND_FASTER * min(triton, mosaic):
        chosen = "triton" if triton < mosaic else "mosaic"
    why = f"{chosen} is preferred"
    return [d if d.backend == chosen else d._replace(box=None, why=why) for d in found]
