"""How one kernel call spreads: over a vmapped axis, and over the devices of a mesh."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Results = Sequence[Array]
MeshAxes = tuple[str, ...]


class Signature(NamedTuple):
    """What each axis of each operand and result is, as one letter.

    The first operand has every letter, and all operands lead with the batch, "b". One
    that leads with "B" may have a batch of 1 there, which all of the batch shares.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]
    whole: str = ""  # letters of axes that no device may hold a part of


def sum_over_devices(results: Results, axes: Sequence[MeshAxes]) -> Results:
    """Adds up, over the mesh axes given for each, results of parts of the data."""
    return [lax.psum(r, a) if a else r for r, a in zip(results, axes, strict=True)]


def call(
    kernel: Callable[..., Results],
    signature: Signature,
    operands: Sequence[Array],
    merge: Callable[[Results, Sequence[MeshAxes]], Results] = sum_over_devices,
) -> Results:
    """`kernel(*operands)`, as fit for vmap, shard_map and sharded arrays under jit.

    An axis that is mapped joins the batch. A sharded array stays where it is: each
    device calls the kernel on its part, and what is a sum over an axis that is sharded
    is put together by `merge(results, axes)`, with the mesh axes for each result.
    """

    @custom_vmap
    def spread(*operands):
        return _over_devices(kernel, signature, operands, merge)

    @spread.def_vmap
    def _(size, mapped, *operands):
        joined = [
            _join_batch(x, size, is_mapped, letters)
            for x, is_mapped, letters in zip(
                operands, mapped, signature.operands, strict=True
            )
        ]
        results = call(kernel, signature, joined, merge)
        parted = [r.reshape(size, r.shape[0] // size, *r.shape[1:]) for r in results]
        return parted, [True] * len(parted)

    return spread(*operands)


def _join_batch(x: Array, size: int, mapped: bool, letters: str) -> Array:
    """`x` whose leading, mapped axis of `size` is part of its batch."""
    if not mapped:
        if letters[0] == "B" and x.shape[0] == 1:
            return x
        x = jax.numpy.broadcast_to(x, (size, *x.shape))
    return x.reshape(size * x.shape[1], *x.shape[2:])


def _over_devices(kernel, signature, operands, merge) -> Results:
    vma = frozenset().union(*(_varying(x) for x in operands))
    operands = [_vary_over(x, vma) for x in operands]
    lengths = dict(zip(signature.operands[0], operands[0].shape, strict=True))

    def factors(letters: str, shape: Sequence[int]) -> str:
        """The letters, but "1" where a batch of one is shared by many examples."""
        shared = letters[0] == "B" and shape[0] != lengths["b"]
        return ("1" if shared else "b") + letters[1:]

    inputs = [
        factors(k, x.shape) for k, x in zip(signature.operands, operands, strict=True)
    ]

    def on_each_device(*operands):
        return [_vary_over(r, vma) for r in kernel(*operands)]

    def partition(mesh: Mesh, parts: Any, _: Any):
        axes = _mesh_axes(mesh, parts[0].sharding.spec, inputs[0], lengths, signature)
        missing = [
            tuple(a for k in axes if k not in letters for a in axes[k])
            for letters in signature.results
        ]

        def placed(letters: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(axes.get(k) for k in letters)))

        return (
            mesh,
            lambda *parts: list(merge(on_each_device(*parts), missing)),
            [placed(k) for k in signature.results],
            tuple(placed(k) for k in inputs),
        )

    partitioned = custom_partitioning(on_each_device)
    partitioned.def_partition(
        partition=partition,
        sharding_rule=_rule(inputs, signature.results),
        need_replication_factors=tuple(
            k for k in (*signature.whole, "one") if k in _rule(inputs, ()).split()
        ),
    )
    return partitioned(*operands)


def _rule(inputs: Sequence[str], results: Sequence[str]) -> str:
    """The letters as an einsum-like rule: "b r d, one d -> b r d"."""
    return " -> ".join(
        ", ".join(" ".join("one" if k == "1" else k for k in letters) for letters in s)
        for s in (inputs, results)
    )


def _mesh_axes(mesh, spec, letters, lengths, signature) -> dict[str, MeshAxes]:
    """The mesh axes over which each axis of the first operand stays sharded."""
    axes = {}
    for letter, names in zip(letters, spec, strict=False):
        names = (names,) if isinstance(names, str) else tuple(names or ())
        devices = 1
        for name in names:
            devices *= mesh.shape[name]
        # Uneven parts are padded with garbage, which would count in a sum.
        if names and letter not in signature.whole and lengths[letter] % devices == 0:
            axes[letter] = names
    return axes


def _varying(x: Array) -> frozenset[str]:
    """The axes of a shard_map that `x` varies over, as far as JAX keeps track."""
    return getattr(jax.typeof(x), "vma", frozenset())


def _vary_over(x: Array, vma: frozenset[str]) -> Array:
    missing = tuple(vma - _varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x
