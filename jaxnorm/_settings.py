"""Settings: frozen dataclasses of keywords, each checked when a value is made."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, dataclass_transform

from jaxnorm import _devices as devices
from jaxnorm._activation import as_activation
from jaxnorm._arguments import (
    as_bool,
    as_epsilon,
    as_integer,
    as_integers,
    as_momentum,
    as_name,
    as_real,
    as_shape,
    optional,
)
from jaxnorm._normalize import as_implementation

# By the name of a setting, or else by its type.
CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    "epsilon": as_epsilon,
    "momentum": as_momentum,
    "axis_name": lambda _, value: devices.as_axis_name(value),
    "axis_index_groups": lambda _, value: devices.as_groups(value),
    "activation": as_activation,
    "implementation": as_implementation,
    bool: as_bool,
    int: as_integer,
    int | None: optional(as_integer),
    float: as_real,
    float | None: optional(as_real),
    str | None: as_name,
    tuple[int, ...]: as_shape,
    int | Sequence[int]: as_integers,
    int | Sequence[int] | None: optional(as_integers),
}


@functools.cache
def _checks(kind: type) -> list[tuple[str, Callable[[str, Any], Any]]]:
    """The settings of `kind`, and what checks each."""
    fields = dataclasses.fields(kind)
    checks = {f.name: CHECKS.get(f.name) or CHECKS.get(f.type) for f in fields}
    return [(name, check) for name, check in checks.items() if check]


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Settings:
    """A value that is comparable, hashable, and safe as a static argument of `jit`.

    Each subclass is a frozen dataclass of keywords. A field of a known name or type is
    checked when a value is made, which raises TypeError or ValueError.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, check in _checks(type(self)):
            object.__setattr__(self, name, check(name, getattr(self, name)))
