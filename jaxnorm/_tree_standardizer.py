"""How are inputs standardized that are trees of arrays, such as dicts?"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.export import is_symbolic_dim
from jax.tree_util import keystr
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._arguments import as_share, check_instance, optional
from jaxnorm._samples import as_sample
from jaxnorm._standardizer import Standardizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TreeStandardizer:
    """A `Standardizer` for each array of a tree, such as a dict of observations.

        parts = jax.tree.map(Standardizer.fit, x)
        y = jax.tree.map(lambda x, part: part.apply(x), x, parts)

    Its methods are those of `Standardizer`, of trees instead of arrays: dicts, tuples
    and whatever is a pytree, nested or not. All arrays together are synchronized by one
    collective.

    Attributes:
        parts: a tree like the data, of Standardizers.

    >>> import jax.numpy as jnp, jaxnorm
    >>> x = {"position": jnp.array([[1.0, 10.0], [3.0, 30.0]]), "time": jnp.arange(2.0)}
    >>> inputs = jaxnorm.TreeStandardizer.fit(x, axis={"position": -1, "time": ()})
    >>> print(inputs.parts["position"].mean, inputs.parts["time"].mean)
    [ 2. 20.] 0.5
    >>> print(inputs.apply(x)["time"])
    [-1.  1.]
    """

    parts: Any

    @classmethod
    def init(
        cls, feature_shape: Any, *, axis: Any = -1, dtype: DTypeLike = jnp.float32
    ) -> Self:
        """The moments of no data, to `update` with batches.

        Args:
            feature_shape: a tree like the data, of numbers of features, or of shapes
                where there are several feature axes.
            axis: as in `Standardizer.init`, one for all arrays, or a tree like them.
            dtype: of all moments.

        Returns:
            A TreeStandardizer that leaves everything as it is.

        Raises:
            ValueError, TypeError: as `Standardizer.init` does, and for another tree of
                axes.

        >>> import jaxnorm
        >>> inputs = jaxnorm.TreeStandardizer.init(
        ...     {"image": (8, 8), "speed": 3}, axis={"image": (1, 2), "speed": -1})
        >>> print(inputs.parts["image"].mean.shape)
        (8, 8)
        """
        tree = _Tree(feature_shape, _is_shape)
        axes = tree.each("axis", axis, _is_shape)
        return cls(
            parts=tree.map(
                lambda shape, axis: Standardizer.init(shape, axis=axis, dtype=dtype),
                tree.leaves,
                axes,
            )
        )

    @classmethod
    def fit(
        cls,
        x: Any,
        *,
        axis: Any = -1,
        mask: Any = None,
        weights: Any = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of each array of `x`.

        Args:
            x: a tree of arrays; a list is a tree, too.
            axis: as in `Standardizer.fit`, one for all arrays, or a tree like x; () for
                an array of one number an example.
            mask, weights: a tree like x, of what `Standardizer.fit` takes; or one array
                for all, of the axes that they begin with: one value for each example.
            axis_name: as in `Standardizer.fit`.

        Returns:
            A TreeStandardizer.

        Raises:
            ValueError, TypeError: as `Standardizer.fit` does, with a note which array
                it is; and for another tree of axes, masks or weights.

        >>> import jax.numpy as jnp, jaxnorm
        >>> x = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4, 1))}
        >>> inputs = jaxnorm.TreeStandardizer.fit(x, mask=jnp.array([1, 1, 0]))
        >>> print(inputs.parts["a"].size, inputs.parts["b"].size)
        [2. 2.] [8.]
        """
        tree = _Tree(x)
        axes = tree.each("axis", axis, _is_shape)
        masks = tree.each_of_examples("mask", mask, tree.leaves)
        weighed = tree.each_of_examples("weights", weights, tree.leaves)
        samples = tree.call(as_sample, tree.leaves, axes, masks, weighed)
        parts = Standardizer._fit_samples(samples, axes, axis_name)
        return cls(parts=tree.structure.unflatten(parts))

    def update(
        self,
        x: Any,
        *,
        mask: Any = None,
        weights: Any = None,
        decay: ArrayLike | None = None,
        axis_name: str | Sequence[str] | None = None,
    ) -> Self:
        """The moments of all data seen so far and of `x`.

        Args:
            x, mask, weights, axis_name: as in `fit`.
            decay: as in `Standardizer.update`, for all arrays.

        Returns:
            A new TreeStandardizer.

        Raises:
            ValueError, TypeError: as `Standardizer.update` does, with a note which
                array it is; and for other trees than those of self.
        """
        decay = optional(as_share)("decay", decay)
        tree = self._tree
        arrays = tree.each("x", x)
        masks = tree.each_of_examples("mask", mask, arrays)
        weighed = tree.each_of_examples("weights", weights, arrays)
        samples = tree.call(
            Standardizer._as_sample, tree.leaves, arrays, masks, weighed
        )
        axes = [part.axis for part in tree.leaves]
        seen = Standardizer._fit_samples(samples, axes, axis_name)
        decays = [decay] * len(seen)
        return type(self)(
            parts=tree.map(Standardizer._merge_newer, tree.leaves, seen, decays)
        )

    def merge(self, other: "TreeStandardizer") -> Self:
        """The moments of the union of two disjoint parts of the data.

        Args:
            other: of a tree like that of self.

        Returns:
            A new TreeStandardizer.

        Raises:
            ValueError, TypeError: as `Standardizer.merge` does, and for another tree.
        """
        check_instance("other", other, TreeStandardizer, "jaxnorm.TreeStandardizer.fit")
        tree = self._tree
        others = tree.each("other", other.parts)
        return type(self)(parts=tree.map(Standardizer.merge, tree.leaves, others))

    def apply(
        self,
        x: Any,
        *,
        mask: Any = None,
        clip: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> Any:
        """Standardizes each feature of each array of `x`.

        Args:
            x: a tree like that of self.
            mask: as in `fit`.
            clip, dtype: as in `Standardizer.apply`, for all arrays.

        Returns:
            A tree like x.

        Raises:
            ValueError, TypeError: as `Standardizer.apply` does, with a note which array
                it is; and for other trees than that of self.
        """
        tree = self._tree
        arrays = tree.each("x", x)
        masks = tree.each_of_examples("mask", mask, arrays)
        return tree.map(
            lambda part, x, mask: part.apply(x, mask=mask, clip=clip, dtype=dtype),
            tree.leaves,
            arrays,
            masks,
        )

    def invert(self, y: Any, *, dtype: DTypeLike | None = None) -> Any:
        """The `x` that `apply` maps to `y`.

        Args:
            y: a tree like that of self.
            dtype: as in `Standardizer.invert`, for all arrays.

        Returns:
            A tree like y.

        Raises:
            ValueError, TypeError: as `Standardizer.invert` does, with a note which
                array it is; and for another tree than that of self.
        """
        tree = self._tree
        return tree.map(
            lambda part, y: part.invert(y, dtype=dtype), tree.leaves, tree.each("y", y)
        )

    @property
    def _tree(self) -> "_Tree":
        return _Tree(self.parts, lambda v: isinstance(v, Standardizer))


class _Tree:
    """The leaves of a tree, and what is given for each of them."""

    def __init__(self, tree: Any, is_leaf: Callable[[Any], bool] | None = None):
        found, self.structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
        self.paths = [keystr(path) for path, _ in found]
        self.leaves = [leaf for _, leaf in found]

    def each(
        self, name: str, value: Any, is_one: Callable[[Any], bool] = lambda v: False
    ) -> list[Any]:
        """What `value` holds for each leaf: itself where it is one for all."""
        several = isinstance(value, tuple | list) and len(value) > 0
        if several and is_one(value) and self._is_like(value):
            raise ValueError(
                f"{name}={value} may be one for all arrays, or one for each of "
                f"{', '.join(self.paths)}: write {tuple((v,) for v in value)} for each"
            )
        if is_one(value):
            return [value] * len(self.leaves)
        try:
            return self.structure.flatten_up_to(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must be a tree with {', '.join(self.paths) or 'no leaves'}, "
                f"got {jax.tree.structure(value)}: pass the same keys, in the same "
                "containers"
            ) from None

    def _is_like(self, value: Any) -> bool:
        return jax.tree.structure(value) == self.structure

    def each_of_examples(
        self, name: str, value: Any, arrays: Sequence[Any]
    ) -> list[Any]:
        """As `each`; one array for all is of the axes that they begin with."""
        is_tree = jax.tree.structure(0) != self.structure
        shared = is_tree and isinstance(value, Array | np.ndarray)
        each = self.each(name, value, lambda v: v is None or shared)
        if not shared:
            return each
        return [
            v.reshape(v.shape + (1,) * (np.ndim(x) - v.ndim))
            for v, x in zip(each, arrays, strict=True)
        ]

    def call(self, f: Callable[..., Any], *values: Sequence[Any]) -> list[Any]:
        """What `f` makes of what each leaf has; errors name the leaf."""
        made = []
        for path, *args in zip(self.paths, *values, strict=True):
            try:
                made.append(f(*args))
            except (TypeError, ValueError) as error:
                error.add_note(f"This is of the array at {path or 'the root'}.")
                raise
        return made

    def map(self, f: Callable[..., Any], *values: Sequence[Any]) -> Any:
        """As `call`, as a tree."""
        return self.structure.unflatten(self.call(f, *values))


def _is_shape(value: Any) -> bool:
    """Whether `value` is one shape or axis, and no tree of them."""
    several = type(value) in (tuple, list) and all(map(_is_size, value))
    return several or _is_size(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) or is_symbolic_dim(value)
