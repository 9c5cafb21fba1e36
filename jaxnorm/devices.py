"""Where devices meet: moments pooled over named axes, with one collective each way."""

import collections
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from jaxnorm.arguments import as_integer, check_instance, shown
from jaxnorm.moments import Moments, joined_size, pool, size_parts

AxisName = str | tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]

# Up to this many bytes of slots, one collective is cheaper than two small ones.
MAX_SLOT_BYTES = 2**20


def axis_size(axis_name: AxisName) -> int:
    """Number of devices along `axis_name`; raises ValueError if it is not bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        pass
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
    name, groups = as_axis_name(axis_name), as_groups(axis_index_groups)
    if name is None:
        return m
    group_size(name, groups)
    known = isinstance(m.size, int) and groups is None
    pooled = _sync(name, groups, m)
    return pooled._replace(size=m.size * axis_size(name)) if known else pooled


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sync(name: AxisName, groups: Groups | None, m: Moments) -> Moments:
    own = jnp.broadcast_to(jnp.asarray(m.size), m.var.shape)
    residue = jnp.broadcast_to(jnp.asarray(m.residue, m.mean.dtype), m.mean.shape)
    m = Moments(m.mean, m.var, own, residue)
    slots = axis_size(name) * len(m) * m.mean.size * m.mean.dtype.itemsize
    if groups is None and slots > MAX_SLOT_BYTES:
        return pool(m, lambda v: lax.psum(v, name))
    return _pool_slots(m, name, groups)


@_sync.defjvp
def _sync_jvp(name, groups, primals, tangents):
    (own,), (dm,) = primals, tangents
    m = _sync(name, groups, own)
    apart = own.mean - m.mean
    dmean, dvar = sync_tangent(name, groups, apart, own.size, m.size, dm.mean, dm.var)
    return m, Moments(dmean, dvar, *(zero_from_primal(v) for v in m[2:]))


def sync_tangent(name, groups, apart, size, whole, dmean, dvar):
    """The tangents of the pooled moments, from those of each device's own, by one psum.

    `apart` is the device's mean less the pooled one, whose tangent drops out of the
    variance's, as these distances sum to zero when weighted.
    """
    size, whole = (jnp.asarray(v).astype(dvar.dtype) for v in (size, whole))
    weight = size / jnp.maximum(whole, 1)
    dvar = dvar + 2 * (apart.conj() * dmean).real
    shares = [weight.astype(v.dtype) * v for v in (dmean, dvar.astype(dmean.dtype))]
    dmean, dvar = group_sum(jnp.stack(shares), name, groups)
    return dmean, dvar.real


def _pool_slots(m: Moments, name: AxisName, groups: Groups | None) -> Moments:
    """Pools what every device of the group wrote into a slot of its own."""
    parts = (m.mean, m.residue, m.var, *size_parts(m.size))
    own = jnp.stack([v.astype(m.mean.dtype) for v in parts])
    slots = gather(own, name, groups)
    mean, residue, var, high, low = jnp.moveaxis(slots, 1, 0)
    each = Moments(mean, var.real, joined_size(high, low), residue)
    pooled = pool(each, lambda v: v.sum(0, keepdims=True))
    return Moments(*(v[0] for v in pooled))


def gather(
    v: Array, name: str | Sequence[str] | None, groups: Sequence[Sequence[int]] | None
) -> Array:
    """`v` of every device of the group, along a new leading axis, by one psum.

    Where groups differ in size, the smaller ones end with zeros.
    """
    name = as_axis_name(name)
    if name is None:
        return v[None]
    members, place = axis_size(name), lax.axis_index(name)
    if groups is not None:
        members, place = max(map(len, groups)), jnp.asarray(_places(groups))[place]
    slots = jnp.zeros((members, *v.shape), v.dtype)
    slots = lax.dynamic_update_index_in_dim(slots, v, place, 0)
    return group_sum(slots, name, groups)


def group_sum(
    v: Array, name: str | Sequence[str] | None, groups: Sequence[Sequence[int]] | None
) -> Array:
    """The sum of `v` over the devices of this device's group, by one psum.

    psum has groups of its own, but not under vmap, nor in shard_map with check_vma.
    """
    name = as_axis_name(name)
    if name is None:
        return v
    if groups is None:
        return lax.psum(v, name)
    group = jnp.asarray(_group_of(groups))[lax.axis_index(name)]
    slots = jnp.zeros((len(groups), *v.shape), v.dtype)
    slots = lax.dynamic_update_index_in_dim(slots, v, group, 0)
    slots = lax.psum(slots, name)
    return lax.dynamic_index_in_dim(slots, group, 0, keepdims=False)


def _group_of(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The group that each index along the axis belongs to."""
    table = {i: g for g, group in enumerate(groups) for i in group}
    return np.array([table[i] for i in range(len(table))])


def _places(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The place of each index along the axis within its group."""
    table = {i: place for group in groups for place, i in enumerate(group)}
    return np.array([table[i] for i in range(len(table))])


def vary_together(like: Array, *arrays: Array | None) -> list[Any]:
    """`arrays`, marked as varying over the mesh axes that `like` varies over.

    JAX marks them by itself where they meet `like` (in shard_map with check_vma), and
    each mark is a psum when transposed. Marked together, as one array, they cost one.
    """
    marked: list[Any] = list(arrays)
    alike = collections.defaultdict(list)
    for i, v in enumerate(arrays):
        missing = () if v is None else axes_gained(v, like)
        if v is not None and missing:
            alike[v.dtype, missing].append((i, v))
    for (_, missing), group in alike.items():
        flat = jnp.concatenate([v.ravel() for _, v in group])
        flat = lax.pcast(flat, missing, to="varying")
        ends = np.cumsum([v.size for _, v in group])[:-1]
        for (i, v), part in zip(group, jnp.split(flat, ends), strict=True):
            marked[i] = part.reshape(v.shape)
    return marked


def axes_gained(v: Array, like: Array) -> tuple[str, ...]:
    """The mesh axes that `like` varies over and `v` does not."""
    return tuple(sorted(_varying(like) - _varying(v)))


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
