"""How a formula becomes a primitive: derivatives, batches, a lowering per platform."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm._axes import Axes
from jaxnorm._sharding import vary_alike

Formula = Callable[..., tuple[Any, ...]]
Tree = Any
Struct = jax.ShapeDtypeStruct
Results = Callable[..., Sequence[Struct]]
Place = tuple[Any, ...]

WHOLE = "x", "mask", "array", "rest"  # what is like x in operands with names


class Reduction(NamedTuple):
    """What is known of a normalization before any array is."""

    axes: Axes
    center: bool
    dtype: jnp.dtype  # of the result
    implementation: str | None = None

    def batched(self, size: int) -> "Reduction":
        """The same for arrays with a new leading axis."""
        return self._replace(axes=self.axes.with_leading(size))


class Static(Protocol):
    """What a formula takes before its arrays; hashable."""

    @property
    def axes(self) -> Axes: ...
    @property
    def implementation(self) -> str | None: ...
    def batched(self, size: int) -> Any: ...


class Kernel(NamedTuple):
    """Code of ours for a formula, and why it does not serve arrays like these."""

    formula: Formula
    why_unfit: Callable[..., str | None]
    name: Callable[[], str]
    parted: Formula | None = None  # the same where XLA spreads it over devices


class Operation:
    """A primitive of `formula(static, *operands)`, which returns a tuple of arrays.

    Operands are trees in which None is no array. Of the shape of `static.axes.shape`
    are arrays like x; all others, but for scalars, have the rank of its working shape.
    """

    every: dict[Primitive, "Operation"] = {}
    is_small = False  # whether no result has x's size
    whole_operands: tuple[int, ...] = (0,)  # those like x, where they have no names

    def __init__(self, name: str, formula: Formula, results: Results):
        self.formula, self.results = formula, results
        self.formulas: dict[str, Formula] = {}
        self.kernels: dict[str, Kernel] = {}
        self.primitive = Primitive(f"jaxnorm_{name}")
        self.primitive.multiple_results = True
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._abstract)
        batching.primitive_batchers[self.primitive] = self._batch
        ad.primitive_jvps[self.primitive] = self._jvp
        self._lower_by(formula)
        self.every[self.primitive] = self

    def __call__(self, static: Static, *operands: Tree) -> list[Array]:
        leaves, tree = jax.tree.flatten(vary_alike(*operands))
        return self._bind(leaves, tree, static)

    def _bind(self, leaves: Sequence[Any], tree: Tree, static: Any) -> list[Array]:
        """With what makes JAX name the devices, where a kernel may be parted."""
        devices = needs_devices() if asks_for_gpu_kernels(static) else None
        params = {"tree": tree, "static": static, "devices": devices}
        return self.primitive.bind(*leaves, **params)

    def lower(
        self,
        *platforms: str,
        formula: Formula | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        """What these platforms compute instead of the formula; a kernel, where it
        serves, before that."""
        formula = formula or self.formula
        for platform in platforms:
            self.formulas[platform] = formula
            self.kernels.pop(platform, None)
            if kernel is not None:
                self.kernels[platform] = kernel
            self._lower_by(formula, platform, kernel)

    def _lower_by(
        self,
        formula: Formula,
        platform: str | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        def lowered(formula: Formula) -> Any:
            return mlir.lower_fun(_flat(formula, self.primitive.name))

        plain = lowered(formula)
        ours = {}
        if kernel is not None:
            ours = {"one": lowered(kernel.formula)}
        if kernel is not None and kernel.parted is not None:
            ours["all"] = lowered(kernel.parted)

        def rule(ctx: Any, *operands: Any, tree: Any, static: Static, **_: Any) -> Any:
            # Bare, as within a kernel nothing is mapped over a mesh.
            avals = [ShapedArray(v.shape, v.dtype) for v in ctx.avals_in]
            ctx = ctx.replace(avals_in=avals)
            chosen = ours.get(mapping_of(ctx))
            if (
                kernel is None
                or chosen is None
                or is_for_export(ctx)
                or why_unfit(kernel, static, *jax.tree.unflatten(tree, avals))
            ):
                chosen = plain
            return chosen(ctx, *operands, tree=tree, static=static)

        mlir.register_lowering(self.primitive, rule, platform=platform)

    def _run(self, *leaves: Array, **params: Any) -> Sequence[Array]:
        return _compiled(self.primitive, *params.items())(*leaves)

    def _abstract(self, *leaves: Any, tree: Any, static: Static, **_: Any) -> list[Any]:
        like = leaves[0]
        made = self.results(static, *jax.tree.unflatten(tree, leaves))
        return [
            like.update(
                shape=v.shape,
                dtype=v.dtype,
                weak_type=False,
                sharding=NamedSharding(
                    like.sharding.mesh, PartitionSpec(*[None] * len(v.shape))
                ),
            )
            for v in made
        ]

    def _batch(
        self,
        leaves: Sequence[Array],
        dims: Sequence[Any],
        *,
        tree: Any,
        static: Static,
        **_: Any,
    ) -> tuple[Sequence[Array], list[int]]:
        pairs = [*zip(leaves, dims, strict=True)]
        size = next(v.shape[d] for v, d in pairs if d is not None)
        places = _places(tree)
        leaves = [
            _leading(v, d, size, static.axes, self.is_whole(place))
            for (v, d), place in zip(pairs, places, strict=True)
        ]
        out = self._bind(leaves, tree, static.batched(size))
        return out, [0] * len(out)

    def is_whole(self, place: Place) -> bool:
        """Whether an operand is like x, by its place among them; its shape does not
        tell where an example is one row, which parameters have the shape of."""
        return place[-1] in (WHOLE if len(place) > 1 else self.whole_operands)

    def _jvp(
        self,
        primals: Sequence[Any],
        tangents: Sequence[Any],
        *,
        tree: Any,
        static: Any,
        **_: Any,
    ) -> tuple[list[Array], list[Any]]:
        out = self._bind(primals, tree, static)
        operands = jax.tree.unflatten(tree, primals)
        changes = jax.tree.unflatten(tree, [or_none(t) for t in tangents])
        return out, self.tangent(static, operands, changes, out)

    def tangent(
        self, static: Any, operands: Tree, changes: Tree, out: list[Array]
    ) -> list[Array]:
        """The tangents of `out`, where a change that is None is no change."""
        raise NotImplementedError


def formula_of(eqn: Any) -> Any:
    """The formula that an equation stands for, as a jaxpr; None if it is no operation
    of ours."""
    op = Operation.every.get(eqn.primitive)
    if op is None:
        return None
    structs = [Struct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    flat = _flat(op.formula, op.primitive.name)
    known = {k: eqn.params[k] for k in ("tree", "static")}
    return jax.make_jaxpr(functools.partial(flat, **known))(*structs)


def asks_for_gpu_kernels(static: Any) -> bool:
    return static.implementation not in (None, "xla")


@functools.cache
def needs_devices() -> Any:
    """A jaxpr that needs to know the devices when it is lowered.

    JAX looks for such in the parameters of equations, and names the devices then.
    """
    nothing = custom_partitioning(lambda x: x)
    nothing.def_partition(lambda mesh, *_: (mesh, lambda x: x, None, (None,)))
    return jax.make_jaxpr(nothing)(0.0)


def is_for_export(ctx: Any) -> bool:
    """Whether what `ctx` lowers must run where jaxnorm is not installed."""
    return ctx.module_context.lowering_parameters.for_export


def mapping_of(ctx: Any) -> str:
    """How what `ctx` lowers is mapped to devices: "one" computes it, or XLA spreads it,
    over "all", or over "some" axes of a mesh of which others are manual or explicit."""
    axes = ctx.module_context.axis_context
    mesh, manual = getattr(axes, "mesh", None), getattr(axes, "manual_axes", ())
    whole = getattr(axes, "abstract_mesh", None)
    if whole is not None and whole.explicit_axes and whole.size > 1:
        return "some"  # where JAX does not lower custom_partitioning
    if mesh is None:
        return "all" if (getattr(axes, "num_devices", None) or 1) > 1 else "one"
    if mesh.size == 1 or set(manual) == set(mesh.axis_names):
        return "one"
    return "some" if manual else "all"


def why_unfit(kernel: Kernel, static: Any, *avals: Any) -> str | None:
    """Why `kernel` does not serve arrays like these; None if it does."""
    if static.implementation == "xla":
        return 'implementation="xla" asks for XLA\'s formula'
    return kernel.why_unfit(static, *avals)


def _flat(formula: Formula, name: str) -> Callable[..., Sequence[Array]]:
    """`formula` of leaves, traced and lowered once for all calls alike."""

    def flat(*leaves: Array, tree: Any, static: Any) -> list[Array]:
        return [*jax.tree.leaves(formula(static, *jax.tree.unflatten(tree, leaves)))]

    flat.__name__ = name
    return jax.jit(flat, static_argnames=("tree", "static"))


@functools.lru_cache(maxsize=4096)
def _compiled(primitive: Primitive, *params: Any) -> Callable[..., Any]:
    """The primitive as a program of its own, for calls that nothing compiles."""
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


def _places(tree: Tree) -> list[Place]:
    """The indices and names that lead to each of the operands."""
    numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
    found, _ = jax.tree_util.tree_flatten_with_path(numbered)
    return [tuple(getattr(k, "name", None) or k.idx for k in path) for path, _ in found]


def _leading(v: Array, dim: int | None, size: int, axes: Axes, whole: bool) -> Array:
    """`v` with its batch as the leading axis, of 1 where it has none and broadcasts."""
    if dim is None and not v.ndim:
        return v
    if dim is None:
        whole = whole and v.shape == axes.shape
        return jnp.broadcast_to(v, (size, *v.shape)) if whole else v[None]
    v = jnp.moveaxis(v, dim, 0)
    return v.reshape(size, *[1] * len(axes.working_shape)) if v.ndim == 1 else v


def or_none(tangent: Any) -> Any:
    return None if isinstance(tangent, ad.Zero) else tangent
