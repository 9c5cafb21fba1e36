"""What a program's kernels read and write, compiled for an H100 or a TPU v5e.

Neither need be present: XLA compiles for a described device. It needs the compiler of
that device, which is in jax's plugin (`pip install -e '.[passes-h100]'` or
`'.[passes-v5e]'`), but never starts the plugin: set `jax_platforms` to `cpu` before
anything runs, or jax will look for the device.

How bytes are counted, from the optimized HLO:

- A kernel reads each of its operands once and writes each of its results once.
- Where a kernel reads an operand only through slices, directly or behind bitcasts,
  reshapes, transposes, copies and conversions, it reads what the slices hold.
- An update of a slice in place reads and writes that slice, not the whole array.
- A loop counts as often as it runs, and a condition as its most expensive branch.
- On a TPU what stays in on-chip memory counts nothing, and moves between that and the
  main memory count on the side of the main memory.

What this leaves out: which reads the caches serve; the granularity of memory (a slice
with rows of less than 32 bytes moves more than it holds); padding to tiles on a TPU; an
operand that one kernel reads more than once; what products and convolutions read again
for each of their blocks. Autotuning, which needs the device, is off.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from hlo_kernels import Kernel, Program
from jax.experimental import topologies

_OPTIONS = {
    "h100": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
    "v5e": {},
}
TARGETS = tuple(_OPTIONS)


@functools.cache
def described_device(target: str) -> Any:
    """A device to compile for, which need not exist; `target` is one of TARGETS."""
    if target == "h100":
        spec = Path(__file__).with_name("h100.textproto").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x1", target_config=spec
        )
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no look for one in a cloud
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target}:2x2"
        )
    return topology.devices[0]


def compile_for(
    target: str, f: Callable, *args: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`jax.jit(f)` compiled for one device, for `args` of arrays or their shapes."""
    sharding = jax.sharding.SingleDeviceSharding(described_device(target))

    def placed(v):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)

    lowered = jax.jit(f, donate_argnums=donate).lower(*jax.tree.map(placed, args))
    return lowered.compile(compiler_options=_OPTIONS[target])


def kernels(compiled: jax.stages.Compiled | str) -> list[Kernel]:
    """The kernels of a compiled program, or of its optimized HLO, in their order."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    program = Program(str(text))
    return list(program.kernels(program.entry))
