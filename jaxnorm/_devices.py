"""Statistics shared by devices, with one collective forward and one backward."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal
from jax.errors import InconclusiveDimensionOperation

from jaxnorm._arguments import as_integer, check_instance, shown
from jaxnorm._axes import is_known
from jaxnorm._axis_sum import AxisName, axis_sum
from jaxnorm._exact import join_size, not_zero, split_size
from jaxnorm._moments import Moments, pool

F = TypeVar("F", bound=Callable[..., Any])

Groups = tuple[tuple[int, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers:
    """The devices that share statistics, and the index of this one, `place`.

    Known before any derivative is taken: its rule may run where the axes of a vmap are
    gone, and only a psum over them can still be asked for.
    """

    name: AxisName = dataclasses.field(metadata={"static": True})
    groups: Groups | None = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})  # all along `name`
    place: Array


# Up to this many bytes of slots, one collective is cheaper than two small ones.
MAX_SLOT_BYTES = 2**20


def axis_size(axis_name: AxisName) -> int:
    """Number of devices along `axis_name`; raises ValueError if it is not bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        pass
    except InconclusiveDimensionOperation:
        raise ValueError(
            f"axis_name={axis_name!r} maps an axis whose size is open, over which JAX "
            "cannot sum: give it a number in the shapes for jax.export, or normalize "
            "the whole array, without jax.vmap"
        ) from None
    names = getattr(jax.extend.core, "unsafe_get_axis_names_DO_NOT_USE", tuple)()
    bound = ", ".join(repr(n) for n in names) or "none"
    raise ValueError(
        f"axis_name={axis_name!r} is not bound here (bound axes: {bound}). Either call "
        "inside jax.shard_map, jax.pmap or jax.vmap with an axis of that name; or, "
        "under plain jit, leave axis_name=None, where the statistics of sharded arrays "
        "are global already; or evaluate with use_running_average=True"
    )


def group_size(axis_name: AxisName | None, groups: Groups | None) -> int:
    """The least number of devices that any device shares statistics with."""
    if axis_name is None:
        return 1
    size = axis_size(axis_name)
    if groups is None:
        return size
    if sorted(i for g in groups for i in g) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={groups} must hold each index of axis_name="
            f"{axis_name!r}, 0 to {size - 1}, exactly once"
        )
    return min(len(g) for g in groups)


def peers(
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Peers | None:
    """The devices that share statistics; None for this device alone.

    Raises ValueError if `axis_name` is not bound, or the groups are no partition.
    """
    name, groups = as_axis_name(axis_name), as_groups(axis_index_groups)
    if name is None:
        return None
    group_size(name, groups)
    size, place = axis_size(name), lax.axis_index(name)
    return Peers(name=name, groups=groups, size=size, place=place)


def as_axis_name(axis_name: str | Sequence[str] | None) -> AxisName | None:
    """`axis_name` as a hashable value; an empty sequence means None."""
    if axis_name is None:
        return None
    several = isinstance(axis_name, tuple | list)
    names = tuple(axis_name) if several else (axis_name,)
    if not all(isinstance(n, str) for n in names):
        raise TypeError(
            "axis_name must be the name of a mapped axis, a string, or several, got "
            f"{shown(axis_name)}"
        )
    if "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"axis_name must name each axis once, and none is empty, got {axis_name!r}"
        )
    return cast(AxisName, (names or None) if several else axis_name)


def as_groups(groups: Sequence[Sequence[int]] | None) -> Groups | None:
    """`groups` as a hashable value; raises unless each index is in one of them."""
    if groups is None:
        return None
    try:
        known = tuple(tuple(as_integer("an index", i) for i in g) for g in groups)
    except TypeError:
        raise TypeError(
            f"axis_index_groups must be a list of lists of indices, got {shown(groups)}"
        ) from None
    indices = sorted(i for g in known for i in g)
    if indices != list(range(len(indices))) or not known or not all(known):
        raise ValueError(
            f"axis_index_groups={known} must hold each index of axis_name, from 0 on, "
            "exactly once, and no empty group"
        )
    return known


def sync(
    m: Moments,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Moments over every device along `axis_name`, whatever the size on each.

    `axis_name` is one name or several; with `axis_index_groups`, a partition of the
    indices along it, each device gets the moments of its own group. Works wherever
    `jax.lax.psum` does: shard_map (check_vma on and off), pmap, vmap.

    One collective forward and one backward: each device writes its moments into its
    own slot of an array of zeros, (devices, 5, statistics), and one psum of that gives
    every device all of them, to pool exactly. Past 1 MiB of slots (6553 statistics on
    8 devices, 204 on 256, 12 on 4096) two psums of (statistics, 4 and 2) replace it,
    as exact and smaller.

    Raises ValueError if `axis_name` is not bound, or the groups are no partition.
    """
    check_instance("m", m, Moments, "jaxnorm.moments")
    return pooled(m, peers(axis_name, axis_index_groups))


def pooled(m: Moments, peers: Peers | None) -> Moments:
    """The moments of all `peers` together; `m` itself where there are none."""
    if peers is None:
        return m
    union = _pooled(m, peers)
    known = isinstance(m.size, int) and peers.groups is None
    return union._replace(size=m.size * peers.size) if known else union


@jax.custom_jvp
def _pooled(m: Moments, peers: Peers) -> Moments:
    own = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)
    residue = jnp.broadcast_to(jnp.asarray(m.residue, m.mean.dtype), m.mean.shape)
    m = Moments(m.mean, m.var, own, residue)
    slots = peers.size * len(m) * m.mean.size * m.mean.dtype.itemsize
    large = is_known(slots) and slots > MAX_SLOT_BYTES
    if peers.groups is None and large:
        return pool(m, lambda v: axis_sum(v, peers.name))
    return _pool_slots(m, peers)


@_pooled.defjvp
def _pooled_jvp(
    primals: tuple[Moments, Peers], tangents: tuple[Moments, Any]
) -> tuple[Moments, Moments]:
    (own, peers), (dm, _) = primals, tangents
    m = _pooled(own, peers)
    offset = own.mean - m.mean
    dmean, dvar = pooled_tangent(peers, offset, own.size, m.size, dm.mean, dm.var)
    return m, Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))


# With  w = size / whole  as the device's weight:
#
#   dmean_pooled = sum(w dmean),   dvar_pooled = sum(w (dvar + 2 offset dmean))


def pooled_tangent(
    peers: Peers, offset: Array, size: Any, whole: Any, dmean: Array, dvar: Array
) -> tuple[Array, Array]:
    """The tangents of the pooled moments, from those of each device's own, by one psum.

    `offset` is the device's mean less the pooled one, whose tangent drops out of the
    variance's, as these distances sum to zero when weighted.
    """
    size, whole = jnp.asarray(size), not_zero(jnp.asarray(whole))
    weight = size.astype(dvar.dtype) / whole.astype(dvar.dtype)
    dvar = dvar + 2 * (offset.conj() * dmean).real
    shares = [weight.astype(v.dtype) * v for v in (dmean, dvar.astype(dmean.dtype))]
    dmean, dvar = group_sum(jnp.stack(shares), peers)
    return dmean, dvar.real


def _pool_slots(m: Moments, peers: Peers) -> Moments:
    """Pools what every device of the group wrote into a slot of its own."""
    parts = (m.mean, m.residue, m.var, *split_size(m.size))
    own = jnp.stack([v.astype(m.mean.dtype) for v in parts])
    slots = gather(own, peers)
    mean, residue, var, high, low = jnp.moveaxis(slots, 1, 0)
    each = Moments(mean, var.real, join_size(high, low, m.size.dtype), residue)
    pooled = pool(each, lambda v: v.sum(0, keepdims=True))
    return Moments(*(v[0] for v in pooled))


def gather(v: Array, peers: Peers | None) -> Array:
    """`v` of every device of the group, along a new leading axis, by one psum.

    Where groups differ in size, the smaller ones end with zeros.
    """
    if peers is None:
        return v[None]
    members, place = peers.size, peers.place
    if peers.groups is not None:
        members = max(map(len, peers.groups))
        place = jnp.asarray(_places(peers.groups))[place]
    slots = jnp.zeros((members, *v.shape), v.dtype)
    slots = lax.dynamic_update_index_in_dim(slots, v, place, 0)
    return group_sum(slots, peers)


def group_sum(v: Array, peers: Peers | None) -> Array:
    """The sum of `v` over the devices of this device's group, by one psum.

    psum has groups of its own, but not under vmap, nor in shard_map with check_vma.
    """
    if peers is None:
        return v
    if peers.groups is None:
        return axis_sum(v, peers.name)
    group = jnp.asarray(_group_of(peers.groups))[peers.place]
    slots = jnp.zeros((len(peers.groups), *v.shape), v.dtype)
    slots = lax.dynamic_update_index_in_dim(slots, v, group, 0)
    slots = axis_sum(slots, peers.name)
    return lax.dynamic_index_in_dim(slots, group, 0, keepdims=False)


def _group_of(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The group that each index along the axis belongs to."""
    table = {i: g for g, group in enumerate(groups) for i in group}
    return np.array([table[i] for i in range(len(table))])


def _places(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The place of each index along the axis within its group."""
    table = {i: place for group in groups for place, i in enumerate(group)}
    return np.array([table[i] for i in range(len(table))])
