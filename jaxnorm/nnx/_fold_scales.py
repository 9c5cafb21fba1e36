"""How do scales and biases of norms disappear into the layers of an NNX model?"""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxnorm import models
from jaxnorm.models._paths import Where, everywhere
from jaxnorm.nnx._convert import NORMS
from jaxnorm.nnx._fold import functional, set_bias
from jaxnorm.nnx._graph import check_model, class_of, copy_of, flattened, path_of
from jaxnorm.nnx._variables import update, variables


def fold_scales(
    model: nnx.Module, *args: Any, where: Where = everywhere, **kwargs: Any
) -> Any:
    """A copy of `model` for inference, with the scales and biases of norms in the
    layers after them.

    These norms stay and have no parameters; layers after a norm with a bias have one.

    Args:
        model: the module, which stays as it is.
        args, kwargs: what it is called with; arrays, or `jax.ShapeDtypeStruct`.
        where: whether to fold the norm at a path, such as "layers/1"; by default all
            that have a scale and no running statistics.

    Returns:
        The copy, in buffers of its own.

    Raises:
        ValueError, TypeError: as `jaxnorm.models.fold_scales` does, and for a layer
            that has no attribute "bias" to hold what was that of a norm.

    >>> import jax, jax.numpy as jnp, jaxnorm.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(jaxnorm.nnx.RMSNorm(2, rngs=rngs),
    ...                        nnx.Linear(2, 3, rngs=rngs))
    >>> x = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    >>> folded = jaxnorm.nnx.fold_scales(model, x)
    >>> print(folded.layers[0].scale)
    None
    """
    check_model(model)
    copy = copy_of(model)
    copy.eval()

    def folded() -> dict[str, Any]:
        apply, given = functional(copy), variables(copy)
        return models.fold_scales(apply, given, *args, where=where, **kwargs)

    old, new = (flattened(tree["params"]) for tree in (variables(copy), folded()))
    modules = dict(nnx.iter_modules(copy))
    added, removed = new.keys() - old.keys(), old.keys() - new.keys()
    for path in removed:
        _check_norm(path_of(path[:-1]), modules[path[:-1]])
    for path in added:
        set_bias(path_of(path[:-1]), modules[path[:-1]], jnp.zeros_like(new[path]))
    values = folded()  # which raises where a layer does not add its new bias
    for path in removed:
        norm, name = modules[path[:-1]], path[-1]
        setattr(norm, name, None)
        if hasattr(norm, f"use_{name}"):
            setattr(norm, f"use_{name}", False)
    update(copy, values)
    return copy


def _check_norm(path: str, norm: Any) -> None:
    """Raises ValueError unless `norm` is a norm that can do without parameters."""
    if not isinstance(norm, NORMS):
        raise ValueError(
            f"the norm at {path!r} is {class_of(norm)}, which may need its parameters: "
            "leave it out, with `where`"
        )
