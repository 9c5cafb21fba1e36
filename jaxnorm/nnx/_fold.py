"""How do the norms of an NNX model disappear into the layers beside them?"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import models
from jaxnorm._activation import add_and_activate, without_masked
from jaxnorm._dtypes import promote
from jaxnorm._working import as_mask
from jaxnorm.models._folding.pair import Pair, as_pairs
from jaxnorm.nnx._graph import (
    KINDS,
    activation_of,
    become,
    check_model,
    class_of,
    copy_of,
    flattened,
    path_of,
)
from jaxnorm.nnx._norm import Norm
from jaxnorm.nnx._norms import BatchNorm
from jaxnorm.nnx._variables import update, variables


class Identity(nnx.Module):
    """What is left of a norm after `fold`: the residual and activation of its call.

        activation(x + residual)

    Args:
        path: where it is in the model.
        activation: that of the norm, such as "relu"; None is none.
        dtype: of the result; by default that of `x` and `dtypes` together.
        dtypes: of the parameters that were.
        before: whether the layer it is folded into takes its result, and does not give
            its input.
    """

    def __init__(
        self,
        path: str,
        *,
        activation: str | None = None,
        dtype: DTypeLike | None = None,
        dtypes: Sequence[DTypeLike] = (),
        before: bool = False,
    ):
        self.path = path
        self.activation = activation
        self.dtype = dtype
        self.dtypes = tuple(dtypes)
        self.before = before

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Adds the residual and activates as after the norm; 0 where `mask` is false.

        Other inputs of the norm count for nothing. Raises ValueError for the statistics
        of a batch, and for what cannot come between a norm and the layer after it.
        """
        known = not isinstance(use_running_average, Tracer | None)
        if known and not use_running_average:
            raise ValueError(
                f"the norm at {self.path!r} is folded, and normalizes by no batch: "
                "call it with use_running_average=True, or train the model that was "
                "folded"
            )
        if self.before and (mask is not None or residual is not None):
            raise ValueError(
                f"the norm at {self.path!r} is folded into the layer after it, and its "
                "mask or residual would come between: leave this pair out"
            )
        x = jnp.asarray(x)
        dtype = promote(x.dtype, *self.dtypes) if self.dtype is None else self.dtype
        mask = as_mask(mask, x.shape)
        return add_and_activate(
            without_masked(x.astype(dtype), mask), self.activation, residual, mask
        )


def fold(
    model: nnx.Module,
    *args: Any,
    pairs: Mapping[str, str] | Iterable[Sequence[Any]] | None = None,
    epsilon: float | None = None,
    **kwargs: Any,
) -> Any:
    """A copy of `model` for inference, with norms folded into the layers beside them.

    An `Identity` is in the place of each of these norms, which does what follows the
    norm in its call, `activation(x + residual)`, and the layers have a bias.

    Args:
        model: the module, which stays as it is.
        args, kwargs: what it is called with, or `jax.ShapeDtypeStruct`s; for
            `find_pairs`.
        pairs: as in `jaxnorm.models.fold`, and taken as they are; by default those that
            `jaxnorm.models.find_pairs` finds.
        epsilon: as in `jaxnorm.models.fold`.

    Returns:
        The copy, in buffers of its own.

    Raises:
        ValueError, TypeError: as `jaxnorm.models.fold` does, also where there are no
            pairs, for a layer that has no attribute "bias", or does not add it, and for
            norms that compute something of their own.

    >>> import jax, jax.numpy as jnp, jaxnorm.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs),
    ...                        jaxnorm.nnx.BatchNorm(3, rngs=rngs), nnx.relu)
    >>> x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    >>> folded = jaxnorm.nnx.fold(model, x)
    >>> print(type(folded.layers[1]).__name__, folded.layers[0].bias.shape)
    Identity (3,)
    """
    check_model(model)
    copy = copy_of(model)
    copy.eval()

    def found() -> list[Pair]:
        return models.find_pairs(functional(copy), variables(copy), *args, **kwargs)

    folding = found() if pairs is None else as_pairs(pairs)
    folded = models.fold(variables(copy), folding, epsilon=epsilon)
    modules = {path_of(path): module for path, module in nnx.iter_modules(copy)}
    for path in (path for pair in folding for path in pair[:2] if path not in modules):
        raise ValueError(
            f"the variables at {path!r} are not those of a module, so that nothing can "
            "take its place: leave this pair out, with pairs= of the others"
        )
    left = {pair: _left(pair, modules[pair.norm]) for pair in folding}
    flat = {path_of(path): v for path, v in flattened(folded["params"]).items()}
    for pair in folding:
        set_bias(pair.layer, modules[pair.layer], flat[f"{pair.layer}/bias"])
    for pair in {*folding} - {*found()} if pairs is None else ():
        raise ValueError(
            f"the layer at {pair.layer!r}, {class_of(modules[pair.layer])}, does not "
            "add its attribute 'bias' to its result, which is to hold what is left of "
            "the norm: leave this pair out"
        )
    for pair in folding:
        become(modules[pair.norm], left[pair])
    update(copy, folded)
    return copy


def _left(pair: Pair, norm: Any) -> Identity:
    """What takes the place of the `norm` of `pair`."""
    ours = type(norm).__call__ in {
        kind.__call__ for kind in (Norm, BatchNorm, nnx.BatchNorm)
    }
    if ours and isinstance(norm, Norm):
        ours = cast(Any, norm.norm).evaluate.__module__.startswith("jaxnorm.")
    if not ours:
        raise ValueError(
            f"the norm at {pair.norm!r}, {class_of(norm)}, computes something of its "
            "own, which might be lost: leave this pair out, with pairs= of the others"
        )
    activation = activation_of(norm)
    if pair.norm_first and activation is not None:
        raise ValueError(
            f"the norm at {pair.norm!r} applies activation={activation!r} before the "
            f"layer at {pair.layer!r}, so that it cannot be folded into it: leave this "
            "pair out"
        )
    names = ["scale", "bias", *(["mean", "var"] * hasattr(norm, "promote_dtype"))]
    arrays = [getattr(norm, k, None) for k in names]
    dtypes = [v.dtype for v in arrays if v is not None]
    return Identity(
        pair.norm,
        activation=activation,
        dtype=norm.dtype,
        dtypes=dtypes,
        before=pair.norm_first,
    )


def functional(model: nnx.Module) -> Callable[..., Any]:
    """The function `apply(variables, ...)` that calls `model` with these variables."""
    graph, state = nnx.split(model)

    def apply(variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        flat = {k: flattened(variables[k]) for k in KINDS}
        new = {path: value for tree in flat.values() for path, value in tree.items()}
        called = [
            (path, v.replace(new[path]) if path in new else v)
            for path, v in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(called))(*args, **kwargs)

    return apply


def set_bias(path: str, layer: Any, bias: Array) -> None:
    """Gives `layer` the bias, unless it has one, which `update` sets."""
    if not hasattr(layer, "bias"):
        raise ValueError(
            f"the layer at {path!r}, {type(layer).__name__}, has no attribute 'bias' "
            "to hold what is left of the norm: leave this pair out"
        )
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True
