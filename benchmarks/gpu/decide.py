"""From the results of a run to the defaults, by a rule and nothing else.

A box is a range of features and a least size, of a pattern of kernels, for a dtype.
Kernels become the default in the largest box of tested arrays in which

1. all checks of the pattern have run and pass, and repeats give the same bits;
2. the gradient with its forward pass takes at least 5 % and twice the noise less than
   XLA's at three of the four main shapes, and nowhere more than 2 % and the noise more;
3. by the clock, the smallest array takes no longer than by XLA;
4. training steps take no more than 0.5 % longer, and 1 % more memory.

That is of bfloat16. Another dtype has a box where it has been timed, if it is faster at
all of these arrays. Of two backends whose kernels may, it is the one that is faster by
more than 3 % over the cases of both, or else Triton before jax 0.13 and Mosaic from
then on. Cases in which the kernel did not serve decide nothing.
"""

import itertools
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from gpu.plan import FULL

PATTERNS = {"rows": ("LN", "RMS"), "columns": ("GN + SiLU",)}
MAIN = {"rows": FULL.main_rows, "columns": FULL.maps[:4]}
STEPS = {"rows": "blocks", "columns": "U-Net"}
MODES = ("both", "both, skip")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FASTER, SLOWER = 0.05, 0.02
BY_THE_CLOCK = 1.02  # as exact as that is
STEP_SLOWER, STEP_LARGER = 0.005, 0.01
BACKEND_FASTER = 0.03

Results = dict[str, Any]
Box = dict[str, Any]


class Point(NamedTuple):
    """A case that XLA and a backend's kernel have both been timed at."""

    norm: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    ratio: float  # of the kernel's time to XLA's
    noise: float
    wall_ratio: float

    @property
    def case(self) -> tuple[Any, ...]:
        return self[:4]

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
    boxes: tuple[Box, ...]
    why: str
    points: tuple[Point, ...] = ()


def decisions(results: Results) -> list[Decision]:
    if results["dry_run"]:
        return []
    found = []
    for pattern in PATTERNS:
        both = [_decision(results, pattern, b) for b in ("triton", "mosaic")]
        found += _one_of_two(both, results["versions"].get("jax", "0.0"))
    return found


def defaults(results: Results) -> list[Box]:
    """What `defaults.json` holds for the device of a run."""
    return [box for d in decisions(results) for box in d.boxes]


def _decision(results: Results, pattern: str, backend: str) -> Decision:
    points = tuple(_points(results, pattern, backend))
    why = wrong(results, backend, pattern) or _slow_steps(results, pattern, backend)
    if why or not points:
        return Decision(
            pattern, backend, (), why or "no kernel of it was timed", points
        )
    own = [p for p in points if p.dtype == "bfloat16"]
    usual = [b for b in _ranges(pattern, backend, own) if _holds(b, own)]
    if not usual:
        why = "in no box it is faster at three of four main shapes and slower nowhere"
        return Decision(pattern, backend, (), why, points)
    boxes = [max(usual, key=lambda b: (len(_inside(b, own)), -b["least_bytes"]))]
    for dtype in sorted({p.dtype for p in points} - {"bfloat16"}):
        others = [p for p in points if p.dtype == dtype]
        if all(p.is_faster for p in others):
            boxes.append(max(_ranges(pattern, backend, others), key=_width))
    return Decision(pattern, backend, tuple(boxes), "the rule holds", points)


def wrong(results: Results, backend: str, pattern: str = "") -> str:
    """Rule 1: what is wrong with the checks of a backend, and of one pattern."""
    begin = f"{backend} {pattern}"
    checks = [
        c
        for c in results["checks"]
        if f"{c['backend']} {c['pattern']}".startswith(begin)
    ]
    failed = [c for c in checks if not c["ok"]]
    raised = [p for p in results["problems"] if p["item"].startswith(begin)]
    if failed or raised:
        first = failed[0]["case"] if failed else raised[0]["problem"]
        return (
            f"{len(failed)} of {len(checks)} checks fail, {len(raised)} raise: {first}"
        )
    left = [n for n in results["not_run"] if n.startswith(f"checks: {begin}")]
    if left or not any(c["by_kernel"] for c in checks):
        return f"{len(left)} checks were not run, {len(checks)} were"
    return ""


def _slow_steps(results: Results, pattern: str, backend: str) -> str:
    """Rule 4."""
    left = [n for n in results["not_run"] if STEPS[pattern] in n or n == "steps: all"]
    if left:
        return f"{len(left)} training steps were not timed"
    steps = [s for s in results["steps"] if STEPS[pattern] in s["step"]]
    by_xla = {s["step"]: s for s in steps if s["impl"] == "xla"}
    own = [s for s in steps if s["impl"] == backend and s["step"] in by_xla]
    for step in own:
        xla = by_xla[step["step"]]
        if "problem" in step or "problem" in xla:
            return f"a step of {step['step']} fails"
        if not step["agrees"]:
            return f"the loss differs in a step of {step['step']}"
        if step["ms"] > xla["ms"] * (1 + STEP_SLOWER):
            return f"a step of {step['step']} takes {step['ms'] / xla['ms']:.3f} times"
        if (step["peak_bytes"] or 0) > (xla["peak_bytes"] or 0) * (1 + STEP_LARGER):
            return f"a step of {step['step']} takes more memory"
    return "" if own else "no training step was timed"


def _points(results: Results, pattern: str, backend: str) -> Iterator[Point]:
    timed: dict[Any, dict[str, Any]] = {}
    for t in results["times"]:
        if t["norm"] in PATTERNS[pattern] and t["mode"] in MODES and "us" in t:
            case = t["norm"], t["mode"], tuple(t["shape"]), t["dtype"]
            timed.setdefault(case, {})[t["impl"]] = t
    for case, by in timed.items():
        if not ({"xla", backend} <= by.keys() and by[backend]["by_kernel"]):
            continue
        xla, own = by["xla"], by[backend]
        if min(*xla["us"], *own["us"], xla["wall_us"], own["wall_us"]) <= 0:
            continue  # a clock that was of no use
        ratio = statistics.mean(own["us"]) / statistics.mean(xla["us"])
        noise = max(map(_noise, (xla["us"], own["us"])))
        yield Point(*case, ratio, noise, own["wall_us"] / xla["wall_us"])


def _noise(times: list[float]) -> float:
    return (max(times) - min(times)) / min(times)


def _ranges(pattern: str, backend: str, points: list[Point]) -> Iterator[Box]:
    """All boxes between tested arrays of one dtype."""
    widths = sorted({p.features for p in points})
    sizes = sorted({p.bytes for p in points})
    for least, most in itertools.combinations_with_replacement(widths, 2):
        for size in sizes:
            yield {
                "pattern": pattern,
                "backend": backend,
                "dtypes": [points[0].dtype],
                "features": [least, most],
                "least_bytes": size,
            }


def _width(box: Box) -> tuple[int, int]:
    least, most = box["features"]
    return most - least, -box["least_bytes"]


def _inside(box: Box, points: list[Point]) -> list[Point]:
    least, most = box["features"]
    return [
        p
        for p in points
        if least <= p.features <= most and p.bytes >= box["least_bytes"]
    ]


def _holds(box: Box, points: list[Point]) -> bool:
    """Rules 2 and 3."""
    inside = _inside(box, points)
    if not inside or any(p.is_slower for p in inside):
        return False
    faster = {
        shape
        for shape in MAIN[box["pattern"]]
        if (own := [p for p in inside if p.shape == shape])
        and all(p.is_faster for p in own)
    }
    smallest = min(p.bytes for p in inside)
    by_the_clock = max(p.wall_ratio for p in inside if p.bytes == smallest)
    return len(faster) >= 3 and by_the_clock <= BY_THE_CLOCK


def _one_of_two(found: list[Decision], jax: str) -> list[Decision]:
    """Without the boxes of the backend that the other is preferred to."""
    if not all(d.boxes for d in found):
        return found
    ratios = [{p.case: p.ratio for p in d.points} for d in found]
    common = ratios[0].keys() & ratios[1].keys()
    triton, mosaic = (sum(r[k] for k in common) for r in ratios)
    newer = tuple(map(int, jax.split(".")[:2])) >= (0, 13)
    chosen = "mosaic" if newer else "triton"
    if common and abs(triton - mosaic) > BACKEND_FASTER * min(triton, mosaic):
        chosen = "triton" if triton < mosaic else "mosaic"
    why = f"{chosen} is preferred"
    return [d if d.backend == chosen else d._replace(boxes=(), why=why) for d in found]
