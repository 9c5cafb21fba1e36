"""Which arrays of a model belong to a wrapper, such as WeightNorm, of which kernel?"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxnorm.models._paths import path_name

Parts = tuple[str, ...]  # of a path, with the collection
LAYER = "layer_instance"  # under which a wrapper of Flax holds its layer
_ROLES = ("scale", "u", "sigma")


class Own(NamedTuple):
    """An array of a wrapper, by its role: "scale", "u" or "sigma" of a kernel."""

    kernel: Parts
    role: str


def parts_of(path: tuple[Any, ...]) -> Parts:
    """The names of the keys of a path of JAX's."""
    return tuple(path_name((key,)) for key in path)


def own_arrays(paths: Iterable[tuple[Any, ...]]) -> dict[Parts, Own]:
    """The arrays of wrappers among those at paths of JAX's, by their own paths.

    In Linen they are named "layer/kernel/scale", beside the layer or around it. In NNX
    they are in `scales` and `batch_stats` beside it, by tuples of keys.
    """
    by_parts = {parts_of(path): path for path in paths}
    found = {}
    for parts, path in by_parts.items():
        for own in _candidates(parts, getattr(path[-1], "key", None) if path else None):
            if own.kernel in by_parts and own.role in _ROLES:
                found[parts] = own
                break
    return found


def _candidates(parts: Parts, key: Any) -> list[Own]:
    """Where the kernel may be, if the array at `parts`, under `key`, is a wrapper's."""
    if isinstance(key, tuple):
        names = tuple(map(str, key))
        names = (*names, "scale") if parts[-2] == "scales" else names
        around = ("params", *parts[1:-2], LAYER)
        return [Own((*around, *names[:-1]), names[-1])]
    *names, role = parts[-1].split("/") if parts else [""]
    around = ("params", *parts[1:-1])
    return [Own((*around[:n], *names), role) for n in (len(around), len(around) - 1)]
