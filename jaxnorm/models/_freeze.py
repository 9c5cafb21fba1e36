"""Which statistics does a layer normalize by, and do these and its parameters train?"""

from collections.abc import Mapping
from typing import Any

import jax

from jaxnorm._arguments import as_bool
from jaxnorm._marks import HELD, RUNNING, SWITCHES, marks, without
from jaxnorm.models._paths import (
    Tree,
    Where,
    everywhere,
    layers,
    map_layers,
    map_params,
    norm_params,
    select,
)


def freeze(
    batch_stats: Tree,
    where: Where = everywhere,
    *,
    use_running_average: bool = True,
    update: bool = False,
) -> Tree:
    """Statistics marked for how their layers use and update them in training.

    Each layer's statistics get marks: "running" if it normalizes by the running
    statistics also in training, "held" if it does not update them. They travel with the
    tree, through `jit` and checkpoints, so that no mode of a model undoes them;
    `unfreeze` takes them away. Norms of jaxnorm read them, those of Flax do not.
    Evaluation is as ever. Scale and bias go on training: `frozen_labels` stops those.

    | use_running_average | update | In training the layer |
    |---|---|---|
    | True | False | is frozen: the same function as in evaluation |
    | False | False | normalizes by the batch and keeps its statistics |
    | True | True | normalizes by the running statistics and updates them |
    | False | True | is as it was before any `freeze` |

    Args:
        batch_stats: statistics of the layers of a model, or of one layer.
        where: whether to take the layer at a path, such as "Block_0/BatchNorm_1".
        use_running_average: normalize by the running statistics, also in training.
        update: let training update the statistics.

    Returns:
        A new tree of copies of the arrays, with marks in the layers that `where`
        selects.

    Raises:
        ValueError: if `where` selects no layer.
        TypeError: for what is no tree of arrays, and switches that are no booleans.

    >>> import jax.numpy as jnp, jaxnorm
    >>> stats = jaxnorm.models.freeze(jaxnorm.init_stats(1))
    >>> x = jnp.array([[1.0], [3.0]])
    >>> y, stats = jaxnorm.batch_norm(
    ...     x, stats, use_running_average=False, epsilon=0.0
    ... )
    >>> print(y.tolist(), stats["mean"], sorted(stats))
    [[1.0], [3.0]] [0.] ['held', 'mean', 'running', 'var']
    """
    running = as_bool("use_running_average", use_running_average)
    switches = {RUNNING: running, HELD: not as_bool("update", update)}
    names = [k for k, on in switches.items() if on]
    return map_layers(
        lambda _, stats: without(stats, SWITCHES) | marks(stats, *names),
        batch_stats,
        where=where,
    )


def unfreeze(batch_stats: Tree, where: Where = everywhere) -> Tree:
    """Statistics without the marks that `freeze` gave their layers.

    Args, what is returned and what is raised are as in `freeze`.

    >>> import jaxnorm
    >>> sorted(jaxnorm.models.unfreeze(jaxnorm.models.freeze(jaxnorm.init_stats(1))))
    ['mean', 'var']
    """
    return map_layers(lambda _, v: without(v, SWITCHES), batch_stats, where=where)


def frozen(batch_stats: Tree) -> dict[str, dict[str, bool]]:
    """The two switches of `freeze` for each layer, by its path.

    Raises TypeError for what is no tree of arrays.

    >>> import jaxnorm
    >>> jaxnorm.models.frozen({"stem": jaxnorm.models.freeze(jaxnorm.init_stats(1))})
    {'stem': {'use_running_average': True, 'update': False}}
    """
    return {
        path: {"use_running_average": RUNNING in stats, "update": HELD not in stats}
        for path, stats in layers(batch_stats).items()
    }


def frozen_labels(params: Tree, where: Where = everywhere) -> Tree:
    """ "frozen" for the parameters of the norms that `where` selects, else "trainable".

    For `optax.multi_transform`, with `optax.set_to_zero()` for "frozen". A norm is
    known by its parameters, as `decay_mask` says. A partial function of `params`
    (`lambda params: frozen_labels(params, where)`) is what optax takes.

    Args:
        params: parameters of a model.
        where: whether to take the norm at a path, such as "Block_0/BatchNorm_1".

    Returns:
        A tree of strings, of the structure of `params`.

    Raises:
        ValueError: if `where` selects no norm.
        TypeError: for what is no tree of arrays.

    >>> import jax, jax.numpy as jnp, jaxnorm
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2))},
    ...           "BatchNorm_0": {"scale": jnp.ones(2)}}
    >>> print(jaxnorm.models.frozen_labels(params))
    {'BatchNorm_0': {'scale': 'frozen'}, 'Dense_0': {'kernel': 'trainable'}}
    """
    frozen = select(norm_params(params), where, "norms with parameters")

    def labels(path: str, node: Mapping[str, Any]) -> Any:
        label = "frozen" if path in frozen else "trainable"
        return jax.tree.map(lambda _: label, node)

    return map_params(labels, params, lambda _: "trainable")


def decay_mask(params: Tree) -> Tree:
    """False for the parameters of norms, True for all others, as optax's masks are.

    For `optax.adamw(..., mask=jaxnorm.models.decay_mask)`. A norm is a node of `params`
    that holds nothing but arrays under names of the parameters of jaxnorm's methods:
    "scale", "bias", "alpha", "slope", "sigma", "threshold", "extra_epsilon",
    "mean_scale", "mean_weight", "var_weight" and what `control_labels` labels. So a
    module of a lone bias counts as one, too, and a norm of your own with other
    parameters does not.

    Args:
        params: parameters of a model.

    Returns:
        A tree of booleans, of the structure of `params`.

    Raises:
        TypeError: for what is no tree of arrays, such as an NNX model.

    >>> import jax.numpy as jnp, jaxnorm
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    ...           "LayerNorm_0": {"scale": jnp.ones(2), "bias": jnp.ones(2)}}
    >>> print(jaxnorm.models.decay_mask(params)["LayerNorm_0"])
    {'bias': False, 'scale': False}
    """
    return map_params(
        lambda _, node: jax.tree.map(lambda _: False, node), params, lambda _: True
    )
