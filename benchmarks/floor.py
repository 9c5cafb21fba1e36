"""The least a norm can cost: its passes over memory, at the speed of a copy."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cases import BATCH, EVALUATION, GROUP, INSTANCE, LAYER, RMS, SYNCED

# Arrays of the input's size that are read or written: forward, gradient. Statistics
# over more than a cache holds need the input once for themselves and once to apply
# them; those of a row need it once. The gradient reads the cotangent, too.
PASSES = {
    BATCH: (2 + 1, 4 + 1),
    EVALUATION: (1 + 1, 2 + 1),
    SYNCED: (2 + 1, 4 + 1),
    LAYER: (1 + 1, 2 + 1),
    RMS: (1 + 1, 2 + 1),
    GROUP: (2 + 1, 4 + 1),
    INSTANCE: (2 + 1, 4 + 1),
}
COPIED = 1 << 25  # bytes


def cores() -> int:
    return len(os.sched_getaffinity(0))


def bytes_moved(case, work: str) -> int:
    forward, gradient = PASSES[case.op]
    return case.input_bytes * (forward if work == "forward" else forward + gradient)


class Copy:
    """Copies an array that no cache holds on all cores, into one that exists."""

    bytes_moved = 2 * COPIED  # read and written

    def __init__(self):
        source = np.ones(COPIED // 4, np.float32)
        self.sources = np.array_split(source, cores())
        self.targets = np.array_split(np.empty_like(source), cores())
        self.pool = ThreadPoolExecutor(cores())

    def __call__(self) -> None:
        list(self.pool.map(np.copyto, self.targets, self.sources))
