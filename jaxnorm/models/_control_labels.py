"""Which parameters does the backward pass renew, and which does an optimizer train?"""

from typing import Any

import jax

from jaxnorm._methods._control import NAMES
from jaxnorm.models._paths import Tree


def control_labels(params: Tree) -> Tree:
    """A tree like `params`, of "control" for each control and "parameter" for all else.

    For `optax.multi_transform`: gradients renew controls by being subtracted as they
    are. Nothing else may change these: clip, unscale or accumulate the gradients of the
    parameters within their own optimizer.

    >>> from jaxnorm import models
    >>> models.control_labels({"conv": {"kernel": 1.0}, "norm": {"control": 0.0}})
    {'conv': {'kernel': 'parameter'}, 'norm': {'control': 'control'}}
    """

    def label(path: tuple[Any, ...], _: Any) -> str:
        names = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        # NNX keeps the array of a variable below its name.
        names = [k for k in names if k not in ("value", "raw_value")]
        return "control" if names[-1:] and names[-1] in NAMES else "parameter"

    return jax.tree_util.tree_map_with_path(label, params)
