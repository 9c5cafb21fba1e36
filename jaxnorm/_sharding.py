"""How arrays are spread over a mesh: axes that vary, and axes that are explicit."""

import collections
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    reshard,
    use_abstract_mesh,
)

F = TypeVar("F", bound=Callable[..., Any])


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


def vary_alike(*trees: Any) -> Any:
    """`trees`, with their arrays marked as varying over all mesh axes that one of them
    varies over; those of each tree together, so that none depends on another tree."""
    varying = [_varying(v) for v in jax.tree.leaves(trees)]
    union = frozenset().union(*varying)
    if all(names == union for names in varying):
        return trees
    like = lax.pcast(jnp.zeros(()), tuple(union), to="varying")

    def marked(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, vary_together(like, *leaves))

    return tuple(map(marked, trees))


def axes_gained(v: Array, like: Array) -> tuple[str, ...]:
    """The mesh axes that `like` varies over and `v` does not."""
    return tuple(sorted(_varying(like) - _varying(v)))


def _varying(x: Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def automatically(f: Callable[..., Any], *args: Any, like: Any) -> Any:
    """`f(*args)`, whose results are sharded as the arrays of `like`, a tree alike, or
    one with an array for several.

    On a mesh of explicit axes JAX takes many operations only where their operands are
    sharded alike, and some not at all, such as a scan along a sharded axis. So these
    axes are automatic within `f`: what is sharded there, and how, is for the compiler
    to choose, and only both ends are given, for gradients, too. Elsewhere this is
    `f(*args)`.

    `like` may hold the PartitionSpec of a result. A function among `args` is called
    with the axes as they were; what it is given is sharded as the first array of the
    same shape among `args`.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return f(*args)
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: v for i, v in enumerate(leaves) if isinstance(v, Array)}
    border = _Border(mesh, list(arrays.values()))

    def run(arrays: dict[int, Array]) -> Any:
        with use_abstract_mesh(border.automatic):
            inside = [border.enter(arrays.get(i, v)) for i, v in enumerate(leaves)]
            out = f(*jax.tree.unflatten(tree, inside))
        return jax.tree.map(border.leave_all, like, out)

    # What a shard_map over some of the axes keeps for its backward pass, such as these
    # arrays, must have the axes that it has itself.
    return jax.checkpoint(run)(arrays) if mesh.manual_axes else run(arrays)


class _Border:
    """What passes between a mesh of explicit axes and one where these are automatic."""

    def __init__(self, mesh: AbstractMesh, arrays: list[Array]):
        self.mesh = mesh
        types = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
        self.automatic = mesh.update_axis_types(types)
        self.free = NamedSharding(self.automatic, PartitionSpec())
        self.specs = {v.shape: spec_of(v) for v in reversed(arrays)}

    def enter(self, v: Any) -> Any:
        """An array without the explicit axes; a function of such arrays for one of
        arrays with them."""
        if _mesh(v).explicit_axes:
            return reshard(v, self.free)
        is_function = callable(v) and not isinstance(v, type)
        return self._called_outside(v) if is_function else v

    def leave(self, like: Any, v: Any) -> Any:
        """An array that is sharded as `like`; what is known while tracing stays so."""
        if not isinstance(v, Array):
            return v
        spec = spec_of(like) if v.ndim else PartitionSpec()
        return reshard(v, NamedSharding(self.mesh, spec))

    def leave_all(self, like: Any, several: Any) -> Any:
        return jax.tree.map(functools.partial(self.leave, like), several)

    def _called_outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arrays: Array) -> Any:
            with use_abstract_mesh(self.mesh):
                out = function(*map(self._as_before, arrays))
            return reshard(out, self.free)

        return call

    def _as_before(self, v: Array) -> Array:
        spec = self.specs.get(v.shape, PartitionSpec())
        return reshard(v, NamedSharding(self.mesh, spec))


def sharded_as(first: str) -> Callable[[F], F]:
    """A decorator of functions whose results are sharded as their first argument, which
    has this name; see `automatically`."""

    def decorated(f: Any) -> Any:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            like = args[0] if args else kwargs.get(first)
            return automatically(
                lambda args, kwargs: f(*args, **kwargs), args, kwargs, like=like
            )

        return call

    return decorated


def on_explicit_mesh(*args: Any) -> bool:
    """Whether one of the arrays in `args` is on a mesh with explicit axes."""
    return _explicit_mesh(args) is not None


def _explicit_mesh(args: Any) -> AbstractMesh | None:
    meshes = map(_mesh, jax.tree.leaves(args))
    return next((m for m in meshes if m.explicit_axes), None)


def _mesh(v: Any) -> AbstractMesh:
    """The mesh that `v` is an array on; one of no axes, if it is on none."""
    return jax.typeof(v).sharding.mesh if isinstance(v, Array) else AbstractMesh((), ())


def spec_of(v: Any) -> PartitionSpec:
    """Which explicit axes of a mesh each axis of `v` is sharded over."""
    return v if isinstance(v, PartitionSpec) else jax.typeof(v).sharding.spec
