"""How do wrappers of layers disappear from the variables of a Linen model?"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxnorm.linen._weights import SpectralNorm, WeightNorm, WeightStandardization
from jaxnorm.models._call import by_arrays, check_apply
from jaxnorm.models._paths import Tree, check_variables, copied, node_at, put_at

_WRAPPERS = (WeightNorm, SpectralNorm, WeightStandardization)
Path = tuple[str, ...]  # of a module, in every collection


def bake(
    apply: Callable[..., Any], variables: Mapping[str, Tree], *args: Any, **kwargs: Any
) -> dict[str, Tree]:
    """The variables of the model without its WeightNorm, SpectralNorm and
    WeightStandardization, for inference.

    Each layer gets the kernels that its wrapper calls it with, in their dtype, and
    scales, `u` and `sigma` are gone. So the result fits the same model with
    `nn.Dense(8)` where it had `WeightNorm(nn.Dense(8))`, whose output is the same, and
    which `jaxnorm.models.fold` may go on with. A layer that its wrapper holds, under
    the name "layer_instance", as of wrappers made in `setup` or in `nn.Sequential`,
    moves up to the wrapper's place, as in that model.

    Args:
        apply: the model in evaluation, `apply(variables, *args, **kwargs)`. It is
            traced, to see which layers are wrapped, and with which settings.
        variables: {"params", "batch_stats"} of the model, others are kept.
        args, kwargs: what else it takes, `update_stats=False` say. Of arrays only
            shapes and dtypes count, so that `jax.ShapeDtypeStruct` will do.

    Returns:
        New variables, in buffers of their own. A collection of which nothing is left is
        gone, too.

    Raises:
        TypeError: for an `apply` that is no function, and variables that are no arrays.
        ValueError: where nothing is wrapped; for a wrapper of Flax's own, or in another
            one; for a layer that is also called without its wrapper, or by two; for
            layers stacked by `nn.scan` or `nn.vmap`; and for wrappers that the call
            does not reach. A kernel that is read without a call of its layer, such as a
            tied one, is not noticed: it is the baked one then.

    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from jaxnorm.linen import WeightNorm, bake
    >>> class Net(nn.Module):
    ...     wrap: type = WeightNorm
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return self.wrap(nn.Dense(3))(x)
    >>> x = jnp.ones((1, 2))
    >>> variables = Net().init(jax.random.key(0), x)
    >>> baked = bake(Net().apply, variables, x)
    >>> print(list(variables["params"]), list(baked["params"]))
    ['Dense_0', 'WeightNorm_0'] ['Dense_0']
    >>> plain = Net(wrap=lambda layer: layer)
    >>> assert jnp.allclose(plain.apply(baked, x), Net().apply(variables, x))
    """
    check_apply(apply, "bake", "jaxnorm.nnx.bake(model) bakes its kernels")
    check_variables(variables)
    calls, (call, arrays) = _Calls(), by_arrays(apply, args, kwargs)
    with nn.intercept_methods(calls):
        jax.eval_shape(call, variables, arrays)
    calls.check()
    new = {name: tree for name, tree in variables.items()}
    for layer, wrapper in calls.wrapped.items():
        new = _without(new, wrapper, layer)
    _check_reached(new)
    return copied({k: tree for k, tree in new.items() if tree or not variables[k]})


class _Wrapper(NamedTuple):
    """A wrapper, by its path, and the shapes of the parameters of its layer."""

    path: Path
    module: nn.Module
    shapes: list[tuple[int, ...]]


class _Calls:
    """Notes which layers a model calls in a wrapper; an interceptor of Flax."""

    def __init__(self) -> None:
        self.wrapped: dict[Path, _Wrapper] = {}
        self.plain: set[Path] = set()
        self.within: Path | None = None

    def __call__(
        self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        if context.method_name == "__call__" and _is_wrapper(module):
            return self.of_wrapper(module, call, args, kwargs)
        if self.within is None and context.method_name != "setup":
            self.plain.add(module.path)
        return call(*args, **kwargs)

    def of_wrapper(
        self, module: Any, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if self.within is not None:
            raise ValueError(
                f"the wrapper at {_name(module.path)} is called within that at "
                f"{_name(self.within)}, which cannot be baked: one kernel, one wrapper"
            )
        self.within = module.path
        try:
            y = call(*args, **kwargs)
        finally:
            self.within = None
        self.note(module, module.layer_instance)
        return y

    def note(self, module: Any, layer: Any) -> None:
        shapes = _shapes(layer.variables.get("params", {}))
        unbound = module.clone(parent=None, layer_instance=_Parameters())
        wrapper = _Wrapper(module.path, unbound, shapes)
        other = self.wrapped.setdefault(layer.path, wrapper)
        if other.path != wrapper.path:
            raise ValueError(
                f"the layer at {_name(layer.path)} is called by the wrappers at "
                f"{_name(other.path)} and {_name(wrapper.path)}, but can hold the "
                "kernel of one only: give each a layer of its own"
            )

    def check(self) -> None:
        """Raises ValueError unless layers were wrapped, in every call of them."""
        if not self.wrapped:
            raise ValueError(
                "the model called no WeightNorm, SpectralNorm or WeightStandardization "
                "of jaxnorm.linen, so that there is nothing to bake: its variables are "
                "those of plain layers already"
            )
        for path in self.wrapped:
            for plain in self.plain:
                if plain[: len(path)] == path:
                    raise ValueError(
                        f"the layer at {_name(plain)} is also called without its "
                        f"wrapper, that at {_name(self.wrapped[path].path)}, and needs "
                        "its own kernel for that: give each call a layer of its own"
                    )


def _is_wrapper(module: Any) -> bool:
    """Whether `module` is one of jaxnorm's wrappers; raises ValueError for others."""
    if not isinstance(module, (*_WRAPPERS, nn.WeightNorm, nn.SpectralNorm)):
        return False
    kind = next(c for c in type(module).__mro__ if "__call__" in vars(c))
    if kind in _WRAPPERS:
        return True
    raise ValueError(
        f"the wrapper at {_name(module.path)} is {kind.__module__}.{kind.__name__}, "
        "whose kernels jaxnorm does not know: take the class from jaxnorm.linen, whose "
        "variables are the same"
    )


class _Parameters(nn.Module):
    """A layer that returns its own parameters."""

    @nn.compact
    def __call__(self) -> Tree:
        return self.variables.get("params", {})


_OUTER = "wrapper of the layer"  # the name of no layer


class _Alone(nn.Module):
    """Returns the parameters that a wrapper calls its layer with.

    Both have the names that they have in the model, on which filters depend.
    """

    wrapper: Callable[..., Any]
    layer_name: str

    @nn.compact
    def __call__(self) -> Tree:
        name, layer = _OUTER, _Parameters(name=self.layer_name)
        wrapper = self.wrapper(parent=self, name=name, layer_instance=layer)
        flags = {"update_stats": False} if isinstance(wrapper, SpectralNorm) else {}
        return wrapper(**flags)


def _without(
    variables: Mapping[str, Tree], wrapper: _Wrapper, layer: Path
) -> dict[str, Tree]:
    """`variables` in which the layer does the work of its wrapper, which is gone."""
    params = node_at(variables.get("params", {}), layer)
    if _shapes(params) != wrapper.shapes:
        raise ValueError(
            f"the layer at {_name(layer)} is called with parameters of the shapes "
            f"{wrapper.shapes}, but they are stored as {_shapes(params)}, as nn.scan "
            "and nn.vmap stack them: bake the model within, by jax.vmap of a function "
            "of its variables"
        )
    own = {
        kind: {k: v for k, v in node_at(tree, wrapper.path).items() if "/" in k}
        for kind, tree in variables.items()
    }
    alone = _Alone(wrapper.module.clone, layer[-1])
    given = {kind: {_OUTER: node} for kind, node in own.items()}
    given["params"][layer[-1]] = params
    new = {**variables}
    new["params"] = put_at(new["params"], layer, alone.apply(given))
    for kind, tree in new.items():
        node = {
            k: v for k, v in node_at(tree, wrapper.path).items() if k not in own[kind]
        }
        if layer[:-1] == wrapper.path:
            node = node.get(layer[-1], {})
        new[kind] = put_at(tree, wrapper.path, node)
    return new


def _check_reached(variables: Mapping[str, Tree]) -> None:
    """Raises ValueError where variables of a wrapper are left."""
    left = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(variables)[0]
        if any("/" in str(getattr(key, "key", "")) for key in path)
    ]
    if left:
        raise ValueError(
            f"the call reaches no wrapper with the variables {left}: pass arguments "
            "with which the model calls all of its layers"
        )


def _shapes(tree: Tree) -> list[tuple[int, ...]]:
    return [jnp.shape(v) for v in jax.tree.leaves(tree)]


def _name(path: Path) -> str:
    return repr("/".join(path) or ".")
