"""How one kernel call spreads over the devices of a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Results = tuple[Array, ...]
MeshAxes = tuple[str, ...]


class Signature(NamedTuple):
    """What each axis of each operand and result is, as one letter.

    The first operand has every letter, and all operands lead with the batch, "b". One
    that leads with "B" may have a batch of 1 there, which all of the batch shares.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    whole: str = ""  # letters of axes that no device may hold a part of


def needs_one_device(backend: str, interpret: Any) -> bool:
    """Whether a call cannot be parted: Mosaic's interpreter has effects."""
    return backend == "mosaic" and bool(interpret)


def call(
    kernel: Callable[..., Results],
    signature: Signature,
    operands: Sequence[Array],
    *,
    fits: Callable[[Sequence[int]], bool] = lambda shape: True,
    one_device: bool = False,
) -> Results:
    """`kernel(*operands)`, as fit for sharded arrays under jit.

    A sharded array stays where it is: each device calls the kernel on its part, and
    what is a sum over an axis that is sharded is added up. Where the shape of a part of
    the first operand does not fit the kernel, devices get whole examples instead. With
    `one_device`, nothing is parted.
    """
    if one_device:
        return kernel(*operands)
    lengths = dict(zip(signature.operands[0], operands[0].shape, strict=True))
    inputs = tuple(
        # "1" is a batch of one that all examples share.
        ("1" if k[0] == "B" and x.shape[0] != lengths["b"] else "b") + k[1:]
        for k, x in zip(signature.operands, operands, strict=True)
    )
    parted = _Parted(kernel, signature, fits, lengths, inputs)
    whole = [k for k in (*signature.whole, "1") if any(k in s for s in inputs)]
    partitioned = custom_partitioning(kernel)
    partitioned.def_partition(
        partition=parted.partition,
        sharding_rule=f"{_rule(inputs)} -> {_rule(signature.results)}",
        need_replication_factors=tuple(_factor(k) for k in whole),
    )
    return partitioned(*operands)


class _Parted(NamedTuple):
    """A call, and what is known of it before any device is."""

    kernel: Callable[..., Results]
    signature: Signature
    fits: Callable[[Sequence[int]], bool]
    lengths: dict[str, int]  # of each axis of the first operand, by its letter
    inputs: tuple[str, ...]  # the letters of the operands, "1" for a shared batch

    def partition(self, mesh: Mesh, parts: Any, _: Any):
        """What each device computes, and how what it takes and returns is sharded, as
        custom_partitioning wants them.

        Under `jax.set_mesh`, JAX does not name the axes of arrays that are older than
        the mesh. Of these every device gets all.
        """
        sharding = parts[0].sharding
        if not isinstance(sharding, NamedSharding):
            devices = sorted(sharding.device_set, key=lambda d: d.id)
            mesh = Mesh(np.array(devices), ("device",))
            sharding = NamedSharding(mesh, PartitionSpec())
        axes = _mesh_axes(mesh, sharding.spec, self.lengths, self.signature.whole)
        parts = {k: _devices(mesh, v) for k, v in axes.items()}
        if not self.fits([n // parts.get(k, 1) for k, n in self.lengths.items()]):
            axes = {k: v for k, v in axes.items() if k == "b"}
        missing = [
            tuple(a for k in axes if k not in letters for a in axes[k])
            for letters in self.signature.results
        ]
        taken, returned = (
            tuple(NamedSharding(mesh, PartitionSpec(*map(axes.get, k))) for k in side)
            for side in (self.inputs, self.signature.results)
        )
        return mesh, lambda *v: _added_up(self.kernel(*v), missing), returned, taken


def _added_up(results: Results, axes: Sequence[MeshAxes]) -> Results:
    """Adds up, over the mesh axes given for each, results of parts of the data."""
    return tuple(lax.psum(r, a) if a else r for r, a in zip(results, axes, strict=True))


def _mesh_axes(mesh: Mesh, spec, lengths: dict[str, int], whole: str):
    """The mesh axes over which each axis of the first operand stays sharded."""
    axes: dict[str, MeshAxes] = {}
    for letter, names in zip(lengths, spec, strict=False):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        # Uneven parts are padded with garbage, which would count in a sum.
        even = lengths[letter] % _devices(mesh, names) == 0
        if names and even and letter not in whole:
            axes[letter] = names
    return axes


def _devices(mesh: Mesh, axes: MeshAxes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _rule(letters: Sequence[str]) -> str:
    """One side of an einsum-like rule: "b r d, one d"."""
    return ", ".join(" ".join(map(_factor, k)) for k in letters)


def _factor(letter: str) -> str:
    return "one" if letter == "1" else letter
