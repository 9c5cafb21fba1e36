"""Which arrays are checked and timed: on a GPU, and in a dry run on a CPU."""

from typing import NamedTuple

Shape = tuple[int, ...]


class Plan(NamedTuple):
    """Shapes are (rows, features) and (batch, *space, features)."""

    check_rows: tuple[Shape, ...]
    check_columns: tuple[Shape, ...]
    special_rows: Shape  # for unusual values and ways, which every kernel takes
    special_columns: Shape
    check_values: tuple[str, ...]
    many_rows: Shape  # more than 2**31 elements
    main_rows: tuple[Shape, ...]  # those that decide
    more_rows: tuple[Shape, ...]
    wide_rows: tuple[Shape, ...]
    maps: tuple[Shape, ...]  # of group norm; the first four decide
    instances: tuple[Shape, ...]
    images: tuple[Shape, ...]  # of batch norm
    tokens: Shape  # (batch, sequence, width) of transformers
    blocks: int
    stacks: tuple[tuple[str, str], ...]  # of blocks: their norm, and how they are run
    bottlenecks: tuple[Shape, ...]
    levels: tuple[Shape, ...]  # of a U-Net
    sweep_rows: tuple[Shape, ...]
    sweep_maps: tuple[Shape, ...]
    buffer: int  # bytes, for the ceilings
    cache: int  # bytes that inputs rotate over, so that none is in the cache
    repeats: int  # of a program, for the times of its kernels
    seconds_queued: float  # of calls, for the time by the clock
    steps: int  # in each of three repeats


FULL = Plan(
    check_rows=(
        (1, 7),
        (5, 3),
        (33, 127),
        (513, 5120),
        (31, 100),
        (127, 768),
        (257, 1000),
        (2048, 4096),
        (64, 8192),
        (4096, 128),
    ),
    check_columns=(
        (2, 49, 64),
        (3, 1000, 3),
        (4, 4096, 320),
        (2, 256, 1280),
        (16, 4096, 128),
        (2, 16384, 64),
    ),
    special_rows=(127, 768),
    special_columns=(2, 256, 1280),
    check_values=("100 +- 1", "1e4 +- 1", "constant", "outlier", "nan", "inf"),
    many_rows=((2**31 + 2**20) // 4096, 4096),
    main_rows=((8192, 4096), (16384, 4096), (8192, 8192), (65536, 768)),
    more_rows=(
        (2048, 4096),
        (4096, 8192),
        (512, 4096),
        (32768, 1024),
        (8192, 5120),
        (262144, 128),
        (8192, 2048),
    ),
    wide_rows=((4096, 12288), (2048, 16384)),
    maps=(
        (16, 64, 64, 320),
        (16, 32, 32, 640),
        (16, 64, 64, 128),
        (8, 128, 128, 320),
        (64, 16, 16, 512),
        (8, 16, 16, 1280),
    ),
    instances=((16, 128, 128, 64),),
    images=(
        (256, 28, 28, 512),
        (256, 56, 56, 256),
        (256, 28, 28, 128),
        (256, 14, 14, 256),
        (256, 7, 7, 2048),
        (32, 28, 28, 512),
    ),
    tokens=(8, 2048, 4096),
    blocks=4,
    stacks=(
        ("RMSNorm", "scan"),
        ("LayerNorm", "unrolled"),
        ("RMSNorm", "unrolled"),
        ("LayerNorm", "scan"),
        ("RMSNorm", "scan, remat"),
        ("LayerNorm", "scan, remat"),
    ),
    bottlenecks=(
        (128, 56, 56, 256),
        (128, 28, 28, 512),
        (128, 14, 14, 1024),
        (128, 7, 7, 2048),
    ),
    levels=((16, 64, 64, 320), (16, 32, 32, 640)),
    sweep_rows=((8192, 4096), (8192, 8192), (2048, 4096), (65536, 768)),
    sweep_maps=((16, 64, 64, 320), (16, 64, 64, 128)),
    buffer=2**31,
    cache=240 * 2**20,
    repeats=10,
    seconds_queued=0.1,
    steps=8,
)

# What the same code walks through where kernels are interpreted.
TINY = Plan(
    check_rows=((5, 3),),
    check_columns=((2, 9, 32),),
    special_rows=(16, 128),
    special_columns=(2, 16, 128),
    check_values=("constant", "outlier", "nan"),
    many_rows=(40, 128),
    main_rows=((16, 128),),
    more_rows=(),
    wide_rows=(),
    maps=((2, 4, 4, 32),),
    instances=(),
    images=((4, 2, 2, 8),),
    tokens=(1, 8, 128),
    blocks=2,
    stacks=(("RMSNorm", "unrolled"), ("LayerNorm", "scan, remat")),
    bottlenecks=((2, 2, 2, 16),),
    levels=((1, 4, 4, 32),),
    sweep_rows=((16, 128),),
    sweep_maps=((2, 4, 4, 32),),
    buffer=2**12,
    cache=0,
    repeats=1,
    seconds_queued=0.0,
    steps=1,
)


class Settings(NamedTuple):
    """What the phases are told."""

    dry_run: bool
    backends: tuple[str, ...]  # of kernels that are to be checked or timed

    @property
    def plan(self) -> Plan:
        return TINY if self.dry_run else FULL
