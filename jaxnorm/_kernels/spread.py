"""How one kernel call spreads: over a vmapped axis, and over the devices of a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, reshard

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


def _added_up(results: Results, axes: Sequence[MeshAxes]) -> Results:
    """Adds up, over the mesh axes given for each, results of parts of the data."""
    return tuple(lax.psum(r, a) if a else r for r, a in zip(results, axes, strict=True))


def call(
    kernel: Callable[..., Results],
    signature: Signature,
    operands: Sequence[Array],
    *,
    fits: Callable[[Sequence[int]], bool] = lambda shape: True,
    one_device: bool = False,
) -> Results:
    """`kernel(*operands)`, as fit for vmap, shard_map and sharded arrays under jit.

    An axis that is mapped joins the batch. A sharded array stays where it is: each
    device calls the kernel on its part, and what is a sum over an axis that is sharded
    is added up. Where
    the shape of a part of the first operand does not fit the kernel, devices get whole
    examples instead. With `one_device`, nothing is parted.
    """

    @custom_vmap
    def spread(*operands):
        if one_device:
            return kernel(*operands)
        return _over_devices(kernel, signature, operands, fits)

    @spread.def_vmap
    def _(size, mapped, *operands):
        batch = operands[0].shape[int(mapped[0])]
        joined = [
            _join_batch(x, size, batch, is_mapped, letters)
            for x, is_mapped, letters in zip(
                operands, mapped, signature.operands, strict=True
            )
        ]
        results = call(kernel, signature, joined, fits=fits, one_device=one_device)
        return tuple(
            r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results
        ), (True,) * len(results)

    return spread(*operands)


def _join_batch(x: Array, size: int, batch: int, mapped: bool, letters: str) -> Array:
    """`x` with an axis of `size`, which leads if it is `mapped`, as part of the batch.

    What all of the batch shares stays as it is, unless it differs along that axis.
    """
    if not mapped:
        if letters[0] == "B" and x.shape[0] == 1:
            return x
        x = x[None]
    x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * batch, *x.shape[2:])


def _over_devices(kernel, signature, operands, fits) -> Results:
    """One call for each device of a mesh, if there is one."""
    first = jax.typeof(operands[0])
    lengths = dict(zip(signature.operands[0], first.shape, strict=True))
    inputs = tuple(
        # "1" is a batch of one that all examples share.
        ("1" if k[0] == "B" and x.shape[0] != lengths["b"] else "b") + k[1:]
        for k, x in zip(signature.operands, operands, strict=True)
    )
    varying = frozenset().union(*(_varying(x) for x in operands))
    parted = _Parted(kernel, signature, fits, lengths, inputs, varying)
    mesh = first.sharding.mesh
    # In a shard_map over other axes than these, JAX has no custom_partitioning.
    rest = mesh.auto_axes if mesh.manual_axes else ()
    if mesh.explicit_axes or rest:
        each, taken, returned = parted.plan(mesh, first.sharding.spec)
        if mesh.explicit_axes:
            operands = [reshard(x, s) for x, s in zip(operands, taken, strict=True)]
        taken, returned = (tuple(s.spec for s in side) for side in (taken, returned))
        specs = {"in_specs": taken, "out_specs": returned, "axis_names": {*rest}}
        return jax.shard_map(each, mesh=mesh, check_vma=False, **specs)(*operands)
    whole = [k for k in (*signature.whole, "1") if any(k in s for s in inputs)]
    partitioned = custom_partitioning(parted.each)
    partitioned.def_partition(
        partition=parted.partition,
        sharding_rule=f"{_rule(inputs)} -> {_rule(signature.results)}",
        need_replication_factors=tuple(_factor(k) for k in whole),
    )
    return partitioned(*(_vary_over(x, varying) for x in operands))


class _Parted(NamedTuple):
    """A call, and what is known of it before any device is."""

    kernel: Callable[..., Results]
    signature: Signature
    fits: Callable[[Sequence[int]], bool]
    lengths: dict[str, int]  # of each axis of the first operand, by its letter
    inputs: tuple[str, ...]  # the letters of the operands, "1" for a shared batch
    varying: frozenset[str]

    def each(self, *parts: Array) -> Results:
        """What a device computes of its parts."""
        return tuple(_vary_over(r, self.varying) for r in self.kernel(*parts))

    def plan(self, mesh: Mesh | AbstractMesh, spec: PartitionSpec):
        """`each` and its sums, and how what they take and return is sharded, where the
        first operand is sharded by `spec`."""
        axes = _mesh_axes(mesh, spec, self.lengths, self.signature.whole)
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
        return lambda *parts: _added_up(self.each(*parts), missing), taken, returned

    def partition(self, mesh: Mesh, parts: Any, _: Any):
        """`plan`, in the order that custom_partitioning has.

        Under `jax.set_mesh`, JAX does not name the axes of arrays that are older than
        the mesh. Of these every device gets all.
        """
        sharding = parts[0].sharding
        if not isinstance(sharding, NamedSharding):
            devices = sorted(sharding.device_set, key=lambda d: d.id)
            mesh = Mesh(np.array(devices), ("device",))
            sharding = NamedSharding(mesh, PartitionSpec())
        each, taken, returned = self.plan(mesh, sharding.spec)
        return mesh, each, returned, taken


def _mesh_axes(mesh, spec, lengths: dict[str, int], whole: str) -> dict[str, MeshAxes]:
    """The mesh axes over which each axis of the first operand stays sharded."""
    axes = {}
    for letter, names in zip(lengths, spec, strict=False):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        # Uneven parts are padded with garbage, which would count in a sum.
        even = lengths[letter] % _devices(mesh, names) == 0
        if names and even and letter not in whole:
            axes[letter] = names
    return axes


def _devices(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _rule(letters: Sequence[str]) -> str:
    """One side of an einsum-like rule: "b r d, one d"."""
    return ", ".join(" ".join(map(_factor, k)) for k in letters)


def _factor(letter: str) -> str:
    return "one" if letter == "1" else letter


def _varying(x: Array) -> frozenset[str]:
    """The mesh axes that `x` varies over, in a shard_map that keeps track of them."""
    return jax.typeof(x).manual_axis_type.varying


def _vary_over(x: Array, varying: frozenset[str]) -> Array:
    missing = tuple(sorted(varying - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x
