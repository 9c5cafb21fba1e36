"""Linear formulas, and their transposes, as pairs of primitives."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad

from jaxnorm._axes import Axes
from jaxnorm._primitives._operation import (
    Formula,
    Kernel,
    Operation,
    Place,
    Results,
    Struct,
    Tree,
    or_none,
)


class Adjoint(NamedTuple):
    """What is known of a transposed formula: of which, and what it returns."""

    static: Any
    tree: Any
    like: tuple[Struct, ...]

    @property
    def axes(self) -> Axes:
        return self.static.axes

    @property
    def implementation(self) -> str | None:
        return self.static.implementation

    @property
    def wanted(self) -> Any:
        """The shapes and dtypes of what it returns, in the tree of the change."""
        return jax.tree.unflatten(self.tree, self.like)

    def batched(self, size: int) -> "Adjoint":
        ones = (1,) * len(self.axes.working_shape)  # as scalars have, in a batch
        like = tuple(Struct((size, *(v.shape or ones)), v.dtype) for v in self.like)
        return Adjoint(self.static.batched(size), self.tree, like)


class _InSecond(Operation):
    """An operation that is linear in its second operand."""

    def tangent(
        self, static: Any, operands: Tree, changes: Tree, out: list[Array]
    ) -> list[Array]:
        """Along the second operand by the primitive itself, and along the first by the
        formula's derivative."""
        (fixed, change), (dfixed, dchange) = operands, changes
        parts = []
        if jax.tree.leaves(dchange):
            dchange = jax.tree.map(
                lambda v, t: jnp.zeros_like(v) if t is None else t, change, dchange
            )
            parts.append(self(static, fixed, dchange))
        moving, tree = jax.tree.flatten(dfixed)
        if moving:

            def along(*moving: Array) -> tuple[Any, ...]:
                moved = jax.tree.unflatten(tree, moving)
                both = jax.tree.map(lambda v, m: v if m is None else m, fixed, moved)
                return self.formula(static, both, change)

            at = jax.tree.map(lambda v, m: None if m is None else v, fixed, dfixed)
            again = jax.checkpoint(along, prevent_cse=False)
            parts.append(jax.jvp(again, (*jax.tree.leaves(at),), (*moving,))[1])
        return [functools.reduce(jnp.add, vs) for vs in zip(*parts, strict=True)]


class Linear(_InSecond):
    """A primitive of `formula(static, fixed, change)`, which is linear in `change`, and
    `adjoint`, the primitive that is its transpose.

        adjoint(Adjoint(static, ...), fixed, cotangents)

    gives the cotangents of those leaves of `change` that `Adjoint.like` describes. A
    cotangent that is None is 0. The first `whole_results` results are like x.
    """

    def __init__(
        self,
        name: str,
        transposed: str,
        formula: Formula,
        results: Results,
        whole_results: int = 1,
    ):
        super().__init__(name, formula, results)
        self.whole_results = whole_results
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
        adjoint = Adjoint(static, tree, tuple(Struct(v.shape, v.dtype) for v in leaves))
        return jax.tree.unflatten(tree, self.adjoint(adjoint, fixed, cotangents))

    def _transpose(
        self, cotangents: Sequence[Any], *leaves: Any, tree: Any, static: Any, **_: Any
    ) -> list[Any]:
        fixed, change = jax.tree.unflatten(tree, leaves)
        wanted = [ad.is_undefined_primal(v) for v in leaves]
        like = jax.tree.map(
            lambda v: v.aval if ad.is_undefined_primal(v) else None,
            change,
            is_leaf=ad.is_undefined_primal,
        )
        found = self.pull_back(static, fixed, [*map(or_none, cotangents)], like)
        rest = iter(jax.tree.leaves(found))
        return [next(rest) if w else None for w in wanted]


class _Transposed(_InSecond):
    """The transpose of a linear primitive, which is linear in the cotangents."""

    def __init__(self, name: str, of: Linear):
        super().__init__(name, transposed(of.formula), lambda static, *_: static.like)
        self.of = of
        ad.primitive_transposes[self.primitive] = self._transpose

    def _batch(
        self,
        leaves: Sequence[Array],
        dims: Sequence[Any],
        *,
        static: Any,
        **params: Any,
    ) -> tuple[Sequence[Array], list[int]]:
        out, dims = super()._batch(leaves, dims, static=static, **params)
        pairs = zip(out, static.like, strict=True)
        return [v if s.shape else v.reshape(-1) for v, s in pairs], dims

    def is_whole(self, place: Place) -> bool:
        """Of a cotangent as of the result that it is of."""
        if place[0] == 0:
            return super().is_whole(place)
        return place[1] < self.of.whole_results

    def _transpose(
        self, changes: Sequence[Any], *leaves: Any, tree: Any, static: Adjoint, **_: Any
    ) -> list[Any]:
        fixed, cotangents = jax.tree.unflatten(tree, leaves)
        change = jax.tree.unflatten(static.tree, [*map(or_none, changes)])
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
