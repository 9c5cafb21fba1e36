"""The cases whose passes over memory are counted."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
from model_programs import bottleneck, scanned, transformer
from norm_programs import (
    DTYPE,
    LAYERS,
    Layer,
    Library,
    Program,
    alone,
    inference,
    sandwich,
    split,
    to_float8,
)

# Of which XLA makes programs for GPUs that differ: by the bytes of the array, and of a
# row. On a TPU the first ones stand for all.
ROWS = (
    (8192, 4096),
    (2048, 4096),
    (4096, 8192),
    (131072, 128),
    (4096, 12288),
    (2048, 32768),
)
MAPS = (
    (16, 64, 64, 320),
    (16, 64, 64, 128),
    (16, 64, 64, 960),
    (16, 32, 32, 640),
    (8, 128, 128, 320),
    (64, 16, 16, 512),
    (8, 16, 16, 1280),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled and counted, and the passes over `x` that it needs at least.

    `quantity` is "passes" over an array of `shape`, the "kept" residuals of the forward
    pass, or the "temporaries" of a program, all in units of that array, and of each of
    its layers. Where
    there are `products`, the floor holds if these are kernels of their own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    floor: float | None
    programs: Callable[[Library], list[Program]]
    quantity: str = "passes"
    products: bool = True
    layers: int = 1

    @property
    def unit(self) -> int:
        return math.prod(self.shape) * DTYPE.dtype.itemsize * self.layers

    @property
    def key(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


def cases(target: str) -> Iterator[Case]:
    """All cases of a target, in the order of the table."""
    all_rows, all_maps = (ROWS, MAPS) if target == "h100" else (ROWS[:1], MAPS[:1])

    def norm(kind, activation=None, **options):
        return lambda library: Layer(library, kind, activation, **options)

    training = {"use_running_average": False, "momentum": 0.9}
    batch = norm("BatchNorm", **training)
    batch_relu = norm("BatchNorm", "relu", **training)
    layer, rms = norm("LayerNorm"), norm("RMSNorm")
    group = norm("GroupNorm", num_groups=32)
    group_silu = norm("GroupNorm", "silu", num_groups=32)
    images, rows, wide, maps = (256, 28, 28, 512), ROWS[0], all_rows[-1], MAPS[0]

    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", batch, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, (256, 28, 28, 128), 8),
        ("BN + ReLU", "BatchNorm", batch_relu, (256, 14, 14, 256), 8),
        ("BN + ReLU", "BatchNorm", batch_relu, (32, 7, 7, 2048), 8),
        # Forward x twice and r; backward x, dy twice, dx, dr; a bit per element thrice.
        ("BN + add + ReLU", "BatchNorm", batch_relu, images, 10 + 3 / 16),
        *(("LN", "LayerNorm", layer, shape, 5) for shape in all_rows),
        *(("RMS", "RMSNorm", rms, shape, 5) for shape in all_rows),
        ("GN", "GroupNorm", group, maps, 8),
        ("GN", "GroupNorm", group, MAPS[1], 8),
        *(("GN + SiLU", "GroupNorm", group_silu, shape, 8) for shape in all_maps),
    ):
        programs = functools.partial(sandwich, make, shape, "add" in name)
        yield Case(f"{name}, train", kind, shape, floor, programs)

    # The cotangent is there from the start, so that one kernel can write y and dx.
    first = (256, 512, 28, 28)
    programs = functools.partial(alone, norm("BatchNorm", axis=1, **training), first)
    name = "BN channels first, train"
    yield Case(name, "BatchNorm", first, 7, programs, products=False)

    running = norm("BatchNorm", use_running_average=True)
    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", running, images, 2),
        *(("LN", "LayerNorm", layer, shape, 2) for shape in {rows: 0, wide: 0}),
        ("RMS", "RMSNorm", rms, rows, 2),
        ("GN", "GroupNorm", group, maps, 3),
    ):
        programs = functools.partial(inference, make, shape)
        name = f"{name}, inference"
        yield Case(name, kind, shape, floor, programs, products=False)

    for name, kind in (("LN", "LayerNorm"), ("RMS", "RMSNorm")):
        make = norm(kind, dtype=jnp.float32)
        for with_largest in (False, True):
            programs = functools.partial(to_float8, make, rows, with_largest)
            title = f"{name} to float8" + " and amax" * with_largest
            yield Case(title, kind, rows, 1.5, programs, products=False)

    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", batch, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, images, 8),
        ("LN", "LayerNorm", layer, rows, 5),
        ("RMS", "RMSNorm", rms, rows, 5),
        ("GN", "GroupNorm", group, maps, 8),
        ("GN + SiLU", "GroupNorm", group_silu, maps, 8),
    ):
        programs = functools.partial(split, make, shape)
        yield Case(f"{name}, split", kind, shape, floor, programs, products=False)
        yield Case(f"{name}, kept", kind, shape, 1, programs, "kept", False)

    for shape in ((32, 56, 56, 256), (32, 28, 28, 512)):
        programs = functools.partial(bottleneck, shape)
        yield Case("ResNet bottleneck, train", "BatchNorm", shape, None, programs)

    for name, kind in (("LN", "LayerNorm"), ("RMS", "RMSNorm")):
        # Sequences so short that XLA's attention, which writes its scores to memory,
        # does not outweigh all else.
        shape = (64, 128, 2048)
        programs = functools.partial(transformer, kind, shape)
        name = f"transformer block, {name}, train"
        yield Case(name, kind, shape, None, programs)

    for name, kind in (("LN", "LayerNorm"), ("RMS", "RMSNorm")):
        shape = (8192, 2048)
        programs = functools.partial(scanned, kind, shape)
        for quantity in ("passes", "temporaries"):
            title = f"scan, {name}, {quantity} per layer"
            yield Case(title, kind, shape, None, programs, quantity, layers=LAYERS)
