"""Which layer and which norm become one?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from jaxnorm._arguments import shown


class Pair(NamedTuple):
    """A layer and the norm beside it, by their paths, such as "Block_0/Conv_1".

    `find_pairs` fills in all of it; on its own, `(layer, norm)` says enough where the
    norm takes the output of one of Flax's layers.

    Args:
        layer: path of the layer, whose parameters are "kernel" and maybe "bias".
        norm: path of the norm, whose statistics are "var" and maybe "mean".
        epsilon: what the norm adds to the variance.
        norm_first: the layer takes the output of the norm, not the norm the layer's.
        axis: of the kernel, for the features of the norm; by default -1 for outputs and
            -2 for inputs, as in Flax. With `transpose_kernel=True` it is the other one.
        groups: `feature_group_count` of the layer; counts where the norm is first.
        padded: whether the layer reads zeros beside its input, see `fold_input`.
    """

    layer: str
    norm: str
    epsilon: float | None = None
    norm_first: bool = False
    axis: int | None = None
    groups: int = 1
    padded: bool | None = None


def as_pairs(pairs: Mapping[str, str] | Iterable[Sequence[Any]]) -> list[Pair]:
    """The argument `pairs` of `fold` as a list; raises TypeError for another kind."""
    if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes | Pair):
        raise TypeError(
            f"pairs must be a list of pairs or a mapping, got {shown(pairs)}: "
            '[("Conv_0", "BatchNorm_0")], or what find_pairs returns'
        )
    named = pairs.items() if isinstance(pairs, Mapping) else pairs
    return [_as_pair(pair) for pair in named]


def _as_pair(pair: Any) -> Pair:
    """One of `pairs` as a `Pair`; raises TypeError for another kind."""
    listed = isinstance(pair, Sequence) and not isinstance(pair, str | bytes)
    if listed and 2 <= len(pair) <= len(Pair._fields):
        made = Pair(*cast(Iterable[Any], pair))
        paths = isinstance(made.layer, str) and isinstance(made.norm, str)
        if paths and isinstance(made.norm_first, bool):
            return made
    raise TypeError(
        "each of pairs must be the path of a layer and that of its norm, and maybe "
        f"what a Pair says more, got {pair!r}"
    )
