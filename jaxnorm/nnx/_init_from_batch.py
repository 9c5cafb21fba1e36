"""Which kernels and biases standardize what the layers of an NNX model give?"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxnorm._arguments import check_function
from jaxnorm.models._init_from_batch import How, checked, initialized, is_affine, only
from jaxnorm.models._paths import Where, everywhere
from jaxnorm.nnx._graph import check_model, path_of
from jaxnorm.nnx._variables import update, variables


class _Seen(nnx.Variable[Any]):
    """What was seen of the output of a layer."""


def init_from_batch(
    model: nnx.Module,
    batch: Any,
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch),
    *,
    where: Where = everywhere,
    per_feature: bool = True,
    center: bool = True,
    mask: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> None:
    """Sets parameters by which the output of each layer has mean 0 and variance 1.

    As `jaxnorm.models.init_from_batch`. A layer is a module with a "kernel", or a
    `Norm` of scale and bias alone, `jaxnorm.ActNorm`.

    Args:
        model: the module, whose parameters are changed in place, at the end; its
            statistics and all else stay.
        batch: anything that `call` takes.
        call: `call(model, batch)` runs the model on the batch.
        where: whether to take the layer at a path, such as "layers/0".

    All else, and what is raised, is as in `jaxnorm.models.init_from_batch`.

    >>> import jax
    >>> from flax import nnx
    >>> import jaxnorm.nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(
    ...     nnx.Linear(3, 2, rngs=rngs), nnx.relu, nnx.Linear(2, 1, rngs=rngs)
    ... )
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> jaxnorm.nnx.init_from_batch(model, x)
    >>> print(f"{abs(model(x).mean()):.3f} {model(x).std():.3f}")
    0.000 1.000
    """
    check_model(model)
    check_function("call", call)
    how = checked(
        where=where,
        per_feature=per_feature,
        center=center,
        mask=mask,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
    )
    graphdef, state = nnx.split(model)

    def see(arrays: Any, batch: Any) -> dict[str, Array]:
        twin = nnx.merge(graphdef, arrays["state"])
        update(twin, {"params": arrays["params"]})
        modules = [(path_of(path), module) for path, module in nnx.iter_modules(twin)]
        watched = {p: m for p, m in modules if _is_layer(m) and how.where(p)}
        for path, module in watched.items():
            _watch(path, module, how)
        call(twin, batch)
        seen = {p: vars(m)["seen"].get_value() for p, m in watched.items()}
        return {p: only(p, calls) for p, calls in seen.items() if calls}

    arrays = variables(model) | {"state": state}
    update(model, {"params": initialized(see, arrays, batch, how)})


def _is_layer(module: Any) -> bool:
    name = "scale" if is_affine(module) else "kernel"
    return isinstance(getattr(module, name, None), nnx.Param)


def _watch(path: str, layer: Any, how: How) -> None:
    """Makes `layer` give standardized outputs, and note what they were.

    The notes are a variable, which goes through transforms of NNX as others do.
    """
    kind = type(layer)

    class Watched(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Array:
            y = super().__call__(*args, **kwargs)
            own_mask = kwargs.get("mask") if is_affine(self) else None
            has_bias = getattr(self, "bias", None) is not None
            y, seen = how.standardized(path, y, has_bias, own_mask)
            calls = vars(self)["seen"]
            calls.set_value((*calls.get_value(), seen))
            return y

    object.__setattr__(layer, "__class__", Watched)
    setattr(layer, "seen", _Seen(()))  # noqa: B010
