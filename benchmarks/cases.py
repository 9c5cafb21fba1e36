"""What is timed: one norm, on one shape, or a step of one model."""

import re
from typing import NamedTuple

import numpy as np

EPSILON = 1e-5
MOMENTUM = 0.99  # the weight of the old running statistics
GROUPS = 32

BATCH, EVALUATION = "batch norm", "batch norm, evaluation"
SYNCED = "synchronized batch norm"
LAYER, RMS = "layer norm", "RMS norm"
GROUP, INSTANCE = "group norm", "instance norm"
NORMS = (BATCH, EVALUATION, SYNCED, LAYER, RMS, GROUP, INSTANCE)
RESNET, TRANSFORMER = "ResNet", "transformer block"


class Case(NamedTuple):
    """`shape` is (batch, ..., channels), wherever `layout` puts the channels."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "last"
    devices: int = 1
    sweep: str = ""  # what varies along the scaling curve this is a point of

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.array_shape))
        parts = [self.op, size, self.dtype]
        parts += ["channels first"] if self.layout == "first" else []
        parts += [f"{self.devices} devices"] if self.op == SYNCED else []
        parts += [f"by {self.sweep}"] if self.sweep else []
        return ", ".join(parts)

    @property
    def array_shape(self) -> tuple[int, ...]:
        batch, *space, channels = self.shape
        first = (batch, channels, *space)
        return first if self.layout == "first" else self.shape

    @property
    def axis(self) -> int:
        return 1 if self.layout == "first" else -1

    @property
    def channels(self) -> int:
        return self.shape[-1]

    @property
    def features(self) -> list[str]:
        """The parameters that the norm has."""
        return ["scale"] if self.op == RMS else ["scale", "bias"]

    @property
    def input_bytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.dtype == "float32" else 2)


IMAGES = ((16, 8, 8, 64), (32, 28, 28, 128), (32, 56, 56, 64))
FEW_IMAGES = ((4, 16, 16, 64), (8, 32, 32, 128), (8, 64, 64, 128))
ROWS = ((64, 256), (1024, 768), (4096, 1024))
SHAPES = {
    BATCH: ((8192, 256), *IMAGES),
    EVALUATION: ((8192, 256), *IMAGES),
    LAYER: ROWS,
    RMS: ROWS,
    GROUP: FEW_IMAGES,
    INSTANCE: FEW_IMAGES,
}


def norms() -> list[Case]:
    return [
        Case(op, shape, dtype, layout)
        for op, shapes in SHAPES.items()
        for shape in shapes
        for dtype in ("float32", "bfloat16")
        for layout in (("last", "first") if len(shape) > 2 else ("last",))
    ]


def synchronized() -> list[Case]:
    rows, images = (8192, 256), (32, 28, 28, 128)
    return [
        Case(SYNCED, rows, devices=8),
        Case(SYNCED, rows, "bfloat16", devices=8),
        Case(SYNCED, images, devices=8),
        Case(SYNCED, images, layout="first", devices=8),
    ]


def sweeps() -> list[Case]:
    batches, channels = (512, 1024, 2048, 4096, 8192, 16384), (32, 64, 128, 256, 512)
    return [
        *(Case(BATCH, (n, 256), sweep="batch") for n in batches),
        *(Case(LAYER, (n, 256), sweep="batch") for n in batches),
        *(Case(BATCH, (8192, n), sweep="channels") for n in channels),
        *(Case(GROUP, (8, 28, 28, n), sweep="channels") for n in channels),
        *(Case(SYNCED, (8192, 256), devices=n, sweep="devices") for n in (1, 2, 4, 8)),
    ]


def models() -> list[Case]:
    return [Case(RESNET, (16, 32, 32, 3)), Case(TRANSFORMER, (8, 128, 256))]


def quick() -> list[Case]:
    """A small case of everything, for a smoke test."""
    image, rows = (4, 4, 4, 32), (16, 32)
    small = [
        Case(op, shapes if len(shapes) == 2 else image, dtype, layout)
        for op, shapes in ((op, rows if op in (LAYER, RMS) else image) for op in SHAPES)
        for dtype in ("float32", "bfloat16")
        for layout in (("last", "first") if shapes is image else ("last",))
    ]
    return [
        *small,
        Case(BATCH, rows),
        *(Case(LAYER, (n, 32), sweep="batch") for n in (8, 16)),
        *(Case(SYNCED, (64, 32), devices=n, sweep="devices") for n in (1, 2)),
        Case(SYNCED, (64, 32), devices=8),
        Case(RESNET, (2, 8, 8, 3)),
        Case(TRANSFORMER, (2, 8, 32)),
    ]


def select(small: bool, only: str) -> list[Case]:
    """The cases whose name the regular expression `only` finds."""
    every = quick() if small else [*norms(), *synchronized(), *sweeps(), *models()]
    return [case for case in every if re.search(only, case.name)]
