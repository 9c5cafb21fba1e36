"""How long the kernels of norms take, beside Flax's and JAX's own kernels.

Of programs as inside networks (`norm_programs`): what products take is left out.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from compiled import kernels
from norm_programs import (
    Layer,
    Library,
    Program,
    inference,
    sandwich,
    skipping,
    split,
)

from gpu import clock
from gpu.checks import KERNEL
from gpu.interpreted import interpret_kernels
from gpu.libraries import libraries
from gpu.plan import Plan, Settings, Shape
from gpu.work import Item, Row, said
from jaxnorm import models

BACKWARD = "backward"
DECIDE = "xla", "triton", "mosaic"
PROGRAMS: dict[str, Callable[..., list[Program]]] = {
    "both": lambda make, shape, library: sandwich(make, shape, False, library),
    "both, add": lambda make, shape, library: sandwich(make, shape, True, library),
    "both, skip": skipping,
    "inference": inference,
    BACKWARD: split,
}
NORMS = {
    "LN": ("LayerNorm", {}),
    "RMS": ("RMSNorm", {}),
    "GN": ("GroupNorm", {"num_groups": 32}),
    "GN + SiLU": ("GroupNorm", {"num_groups": 32, "activation": "silu"}),
    "IN + SiLU": ("InstanceNorm", {"activation": "silu"}),
    "BN": ("BatchNorm", {"use_running_average": False}),
    "BN + ReLU": ("BatchNorm", {"use_running_average": False, "activation": "relu"}),
}


class Case(NamedTuple):
    norm: str
    mode: str
    shape: Shape
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        return f"{self.norm}, {self.mode}, {self.dtype} {self.shape}"


def cases(plan: Plan) -> Iterator[Case]:
    """In order of value: what decides about a default comes first."""
    both, skip, add = "both", "both, skip", "both, add"
    for shape, of_maps in itertools.zip_longest(plan.main_rows, plan.maps):
        if shape is not None:
            yield from _of_rows(both, [shape])
        if of_maps is not None:
            yield Case("GN + SiLU", both, of_maps)
    yield from _of_rows(skip, plan.main_rows)
    yield from _of_rows(both, plan.more_rows)
    for dtype in ("float32", "float16"):
        yield Case("LN", both, plan.main_rows[0], dtype)
        yield Case("GN + SiLU", both, plan.maps[0], dtype)
    for mode in (BACKWARD, "inference"):
        yield from _of_rows(mode, plan.main_rows)
    for shape in plan.images:
        yield Case("BN + ReLU", both, shape)
        yield Case("BN + ReLU", add, shape)
        yield Case("BN", both, shape)
    for shape in plan.wide_rows:
        yield Case("LN", both, shape)
        yield Case("LN", "inference", shape)
    for shape in plan.instances:
        yield Case("IN + SiLU", both, shape)
    for shape in plan.maps:
        yield Case("GN", both, shape)


def _of_rows(mode: str, shapes: Iterable[Shape]) -> Iterator[Case]:
    for shape in shapes:
        yield Case("LN", mode, shape)
        yield Case("RMS", mode, shape)


def items(settings: Settings) -> Iterator[Item]:
    if settings.dry_run:
        interpret_kernels()
    for case in cases(settings.plan):
        chosen = libraries(NORMS[case.norm][0], settings.backends)
        if case.mode != "both" or case.shape not in settings.plan.main_rows:
            chosen = [v for v in chosen if v.name != "jax.pallas"]  # slow elsewhere
        builds = [functools.partial(build, case, library) for library in chosen]
        names = [library.name for library in chosen]
        run = functools.partial(timed, settings, case, names)
        yield Item(case.name, run, tuple(builds))


class Built(NamedTuple):
    """A compiled program and its arguments, or why there is none."""

    compiled: Any
    args: tuple[Any, ...]
    by_kernel: bool = False
    problem: str = ""


def build(case: Case, library: Library) -> Built:
    """What fails to compile is a result, too: the others are timed all the same."""
    try:
        f, args, _ = _program(case, library)
        compiled = jax.jit(f).lower(*args).compile()
        by_kernel = KERNEL in str(models.implementations(f, *args))
    except Exception as error:  # whatever a library or a compiler raises
        return Built(None, (), problem=said(error))
    return Built(compiled, args, by_kernel)


def _program(case: Case, library: Library) -> Program:
    """With arrays for the arguments."""
    kind, options = NORMS[case.norm]
    make = functools.partial(Layer, kind=kind, dtype=jnp.dtype(case.dtype), **options)
    programs = PROGRAMS[case.mode](make, case.shape, library)
    f, args, _ = programs[0]
    args = arrays(args)
    if case.mode != BACKWARD:
        return Program(f, args)
    pull = jax.jit(f)(*args)[0]
    return Program(programs[1].f, (pull, arrays(programs[1].args[1])))


def arrays(structs: Any, seed: int = 0) -> Any:
    """Random ones: of parameters and statistics, which are float32 vectors, about 1;
    of the weights of products so that results are as large as what is multiplied."""
    leaves, tree = jax.tree.flatten(structs)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def one(key: Any, v: Any) -> Any:
        if v.ndim == 1:
            return jax.random.uniform(key, v.shape, v.dtype, 0.5, 1.5)
        square = v.ndim == 2 and v.shape[0] == v.shape[1]
        scale = v.shape[0] ** -0.5 if square else 1.0
        return (scale * jax.random.normal(key, v.shape, jnp.float32)).astype(v.dtype)

    return jax.tree.unflatten(tree, map(one, keys, leaves))


def timed(
    settings: Settings, case: Case, names: list[str], *built: Built
) -> Iterator[Row]:
    """A row for each library: two rounds in turn, so that all see the same device."""
    plan = settings.plan
    row = {"norm": case.norm, "mode": case.mode, "dtype": case.dtype}
    row |= {"shape": list(case.shape)}
    calls = {}
    for name, program in zip(names, built, strict=True):
        if program.problem:
            yield row | {"impl": name, "problem": program.problem}
        else:
            call = clock.rotating(program.compiled, program.args, plan.cache)
            calls[name] = (program, call)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(2):
        for name, (_, call) in calls.items():
            times = clock.kernel_times(call, plan)
            rounds[name].append(times or {"by the clock": clock.by_clock(call, plan)})
    for name, (program, call) in calls.items():
        norms = [clock.without_products(times) for times in rounds[name]]
        yield row | {
            "impl": name,
            "us": [sum(times.values()) for times in norms],
            "kernels": norms[0],
            "with_products_us": sum(rounds[name][0].values()),
            "bytes": _counted(program.compiled),
            "by_kernel": program.by_kernel,
            "wall_us": clock.by_clock(call, plan) if name in DECIDE else None,
        }


def _counted(compiled: Any) -> int | None:
    """The bytes that all kernels but products move, by the program's HLO."""
    if jax.default_backend() != "gpu":
        return None  # the counter reads programs for GPUs and TPUs
    try:
        return sum(k.bytes for k in kernels(compiled) if not k.product)
    except Exception:  # of another version's HLO; the times are there all the same
        return None
