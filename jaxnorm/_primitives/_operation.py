"""How a formula becomes a primitive: derivatives, batches, a lowering per platform."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm._axes import Axes
from jaxnorm._sharding import vary_alike

Formula = Callable[..., tuple[Any, ...]]
Tree = Any
Results = Callable[..., Sequence[jax.ShapeDtypeStruct]]


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


class Operation:
    """A primitive of `formula(static, *operands)`, which returns a tuple of arrays.

    Operands are trees in which None is no array. Of the shape of `static.axes.shape`
    are arrays like x; all others, but for scalars, have the rank of its working shape.
    """

    every: dict[Primitive, "Operation"] = {}

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
        return self.primitive.bind(*leaves, tree=tree, static=static)

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
            if kernel is not None:
                self.kernels[platform] = kernel
            self._lower_by(formula, platform, kernel)

    def _lower_by(
        self,
        formula: Formula,
        platform: str | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        plain = mlir.lower_fun(_flat(formula, self.primitive.name))
        ours = plain
        if kernel is not None:
            ours = mlir.lower_fun(_flat(kernel.formula, self.primitive.name))

        def rule(ctx: Any, *operands: Any, tree: Any, static: Static) -> Any:
            # Bare, as within a kernel nothing is mapped over a mesh.
            avals = [ShapedArray(v.shape, v.dtype) for v in ctx.avals_in]
            ctx = ctx.replace(avals_in=avals)
            unfit = (
                kernel is None
                or why_not_here(ctx)
                or why_unfit(kernel, static, *jax.tree.unflatten(tree, avals))
            )
            return (plain if unfit else ours)(ctx, *operands, tree=tree, static=static)

        mlir.register_lowering(self.primitive, rule, platform=platform)

    def _run(self, *leaves: Array, **params: Any) -> Sequence[Array]:
        return _compiled(self.primitive, *params.items())(*leaves)

    def _abstract(self, *leaves: Any, tree: Any, static: Static) -> list[Any]:
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
        self, leaves: Sequence[Array], dims: Sequence[Any], *, tree: Any, static: Static
    ) -> tuple[Sequence[Array], list[int]]:
        pairs = [*zip(leaves, dims, strict=True)]
        size = next(v.shape[d] for v, d in pairs if d is not None)
        leaves = [_leading(v, d, size, static.axes) for v, d in pairs]
        out = self.primitive.bind(*leaves, tree=tree, static=static.batched(size))
        return out, [0] * len(out)

    def _jvp(
        self, primals: Sequence[Any], tangents: Sequence[Any], *, tree: Any, static: Any
    ) -> tuple[list[Array], list[Any]]:
        out = self.primitive.bind(*primals, tree=tree, static=static)
        operands = jax.tree.unflatten(tree, primals)
        changes = jax.tree.unflatten(tree, [_or_none(t) for t in tangents])
        return out, self.tangent(static, operands, changes, out)

    def tangent(
        self, static: Any, operands: Tree, changes: Tree, out: list[Array]
    ) -> list[Array]:
        """The tangents of `out`, where a change that is None is no change."""
        raise NotImplementedError


class Adjoint(NamedTuple):
    """What is known of a transposed formula: of which, and what it returns."""

    static: Any
    tree: Any
    like: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def axes(self) -> Axes:
        return self.static.axes

    @property
    def implementation(self) -> str | None:
        return self.static.implementation

    def batched(self, size: int) -> "Adjoint":
        ones = (1,) * len(self.axes.working_shape)  # as scalars have, in a batch
        like = tuple(_struct((size, *(v.shape or ones)), v.dtype) for v in self.like)
        return Adjoint(self.static.batched(size), self.tree, like)


class Linear(Operation):
    """A primitive of `formula(static, fixed, change)`, which is linear in `change`, and
    `adjoint`, the primitive that is its transpose.

        adjoint(Adjoint(static, ...), fixed, cotangents)

    gives the cotangents of those leaves of `change` that `Adjoint.like` describes. A
    cotangent that is None is 0.
    """

    def __init__(self, name: str, transposed: str, formula: Formula, results: Results):
        super().__init__(name, formula, results)
        self.adjoint = _Transposed(transposed, self)
        ad.primitive_transposes[self.primitive] = self._transpose

    def lower(
        self,
        *platforms: str,
        formula: Formula | None = None,
        kernel: Kernel | None = None,
        adjoint_kernel: Kernel | None = None,
    ) -> None:
        """As of any operation, and of its adjoint, too."""
        super().lower(*platforms, formula=formula, kernel=kernel)
        formula = transposed(formula or self.formula)
        self.adjoint.lower(*platforms, formula=formula, kernel=adjoint_kernel)

    def pull_back(self, static: Any, fixed: Tree, cotangents: Tree, like: Tree) -> Tree:
        """The cotangents of `change`, of the shapes and dtypes of the tree `like`."""
        leaves, tree = jax.tree.flatten(like)
        adjoint = Adjoint(
            static, tree, tuple(_struct(v.shape, v.dtype) for v in leaves)
        )
        return jax.tree.unflatten(tree, self.adjoint(adjoint, fixed, cotangents))

    def tangent(
        self, static: Any, operands: Tree, changes: Tree, out: list[Array]
    ) -> list[Array]:
        return _linear_tangent(self, static, operands, changes)

    def _transpose(
        self, cotangents: Sequence[Any], *leaves: Any, tree: Any, static: Any
    ) -> list[Any]:
        fixed, change = jax.tree.unflatten(tree, leaves)
        wanted = [ad.is_undefined_primal(v) for v in leaves]
        like = jax.tree.map(
            lambda v: v.aval if ad.is_undefined_primal(v) else None,
            change,
            is_leaf=ad.is_undefined_primal,
        )
        found = self.pull_back(static, fixed, [*map(_or_none, cotangents)], like)
        rest = iter(jax.tree.leaves(found))
        return [next(rest) if w else None for w in wanted]


class _Transposed(Operation):
    """The transpose of a linear primitive, which is linear in the cotangents."""

    def __init__(self, name: str, of: Linear):
        super().__init__(name, transposed(of.formula), lambda static, *_: static.like)
        self.of = of
        ad.primitive_transposes[self.primitive] = self._transpose

    def _batch(
        self, leaves: Sequence[Array], dims: Sequence[Any], *, tree: Any, static: Any
    ) -> tuple[Sequence[Array], list[int]]:
        out, dims = super()._batch(leaves, dims, tree=tree, static=static)
        pairs = zip(out, static.like, strict=True)
        return [v if s.shape else v.reshape(-1) for v, s in pairs], dims

    def tangent(
        self, static: Any, operands: Tree, changes: Tree, out: list[Array]
    ) -> list[Array]:
        return _linear_tangent(self, static, operands, changes)

    def _transpose(
        self, changes: Sequence[Any], *leaves: Any, tree: Any, static: Adjoint
    ) -> list[Any]:
        fixed, cotangents = jax.tree.unflatten(tree, leaves)
        change = jax.tree.unflatten(static.tree, [*map(_or_none, changes)])
        out = self.of(static.static, fixed, change)
        given = [v for v, c in zip(out, cotangents, strict=True) if c is not None]
        linear = leaves[-len(given) :]
        pairs = zip(given, linear, strict=True)
        found = [v if ad.is_undefined_primal(leaf) else None for v, leaf in pairs]
        return [None] * (len(leaves) - len(given)) + found


def transposed(formula: Formula) -> Formula:
    """The transpose of a linear formula, as a formula of its own."""

    def adjoint(static: Adjoint, fixed: Tree, cotangents: Sequence[Any]) -> Any:
        def along(*leaves: Array) -> tuple[Any, ...]:
            return formula(
                static.static, fixed, jax.tree.unflatten(static.tree, leaves)
            )

        out = jax.eval_shape(along, *static.like)
        given = tuple(
            jnp.zeros(v.shape, v.dtype) if c is None else c
            for v, c in zip(out, cotangents, strict=True)
        )
        return jax.linear_transpose(along, *static.like)(given)

    return adjoint


def _linear_tangent(
    op: Operation, static: Any, operands: Tree, changes: Tree
) -> list[Array]:
    """Of what is linear in its second operand: along that by the primitive itself, and
    along the first by the formula's derivative."""
    (fixed, change), (dfixed, dchange) = operands, changes
    parts = []
    if jax.tree.leaves(dchange):
        if jax.tree.structure(dchange) != jax.tree.structure(change):
            none = jax.tree.map(jnp.zeros_like, change)
            dchange = jax.tree.map(
                lambda t, z: z if t is None else t, dchange, none, is_leaf=_is_none
            )
        parts.append(op(static, fixed, dchange))
    moving, tree = jax.tree.flatten(dfixed)
    if moving:

        def along(*moving: Array) -> tuple[Any, ...]:
            moved = jax.tree.unflatten(tree, moving)
            both = jax.tree.map(
                lambda m, v: v if m is None else m, moved, fixed, is_leaf=_is_none
            )
            return op.formula(static, both, change)

        at = jax.tree.leaves(
            jax.tree.map(
                lambda m, v: None if m is None else v, dfixed, fixed, is_leaf=_is_none
            )
        )
        again = jax.checkpoint(along, prevent_cse=False)
        parts.append(jax.jvp(again, tuple(at), tuple(moving))[1])
    return [functools.reduce(jnp.add, vs) for vs in zip(*parts, strict=True)]


def formula_of(eqn: Any) -> Any:
    """The formula that an equation stands for, as a jaxpr; None if it is no operation
    of ours."""
    op = Operation.every.get(eqn.primitive)
    if op is None:
        return None
    structs = [_struct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    flat = _flat(op.formula, op.primitive.name)
    return jax.make_jaxpr(functools.partial(flat, **eqn.params))(*structs)


def why_not_here(ctx: Any) -> str | None:
    """Why no kernel can be called where `ctx` lowers to; None if it can."""
    module = ctx.module_context
    if module.lowering_parameters.for_export:
        return "an exported program must run where jaxnorm is not installed"
    axes = module.axis_context
    devices = getattr(axes, "num_devices", None) or 1
    mesh, manual = getattr(axes, "mesh", None), getattr(axes, "manual_axes", ())
    if mesh is not None:
        devices = mesh.size if set(manual) < set(mesh.axis_names) else 1
    if devices > 1:
        return f"XLA spreads the computation over {devices} devices"
    return None


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


def _leading(v: Array, dim: int | None, size: int, axes: Axes) -> Array:
    """`v` with its batch as the leading axis, of 1 where it has none and broadcasts."""
    if dim is None and not v.ndim:
        return v
    if dim is None:
        whole = v.shape == axes.shape
        return jnp.broadcast_to(v, (size, *v.shape)) if whole else v[None]
    v = jnp.moveaxis(v, dim, 0)
    return v.reshape(size, *[1] * len(axes.working_shape)) if v.ndim == 1 else v


def _or_none(tangent: Any) -> Any:
    return None if isinstance(tangent, ad.Zero) else tangent


def _is_none(v: Any) -> bool:
    return v is None


def _struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)
