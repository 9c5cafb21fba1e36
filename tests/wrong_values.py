"""Wrong values for each kind of argument, for tests that walk over what is public.

Each value is wrong for every argument of its kind, whatever the others are: `call`
must raise ValueError or TypeError of the package's own for it, while tracing.
"""

import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike, DTypeLike

import jaxnorm
from jaxnorm._axes import Axes

OBJECTS = (object(), {1, 2}, print)
WORDS = ("words", b"bytes")

# Where an array of numbers must be: None counts as a value of its own.
ARRAY = (
    *WORDS,
    *OBJECTS,
    {"a": 1.0},
    ["a", "b"],
    [[1.0, 2.0], [3.0]],
    np.array(["a", "b"]),
    np.array([None, 1.0], object),
    jax.ShapeDtypeStruct((4, 3), jnp.float32),
)
# One number. No array with axes, no flag, no complex number.
NUMBER = (
    *WORDS,
    *OBJECTS,
    "0.9",
    {},
    1j,
    True,
    float("nan"),
    [0.1, 0.2],
    (0.1,),
    np.array([0.1, 0.2]),
    np.complex64(1),
    float,
)
NOT_NEGATIVE = (*NUMBER, -1, -1e-6, np.float32(-1), float("inf"))
SHARE = (*NUMBER, -0.1, 1.1, 2, np.float32(1.5), float("-inf"))  # from 0 to 1
INTEGER = (*WORDS, *OBJECTS, "4", 2.5, 1j, {}, True, [2], np.float32(2), int)
COUNT = (*INTEGER, 0, -1)  # 1 or more
FLAG = (
    *WORDS,
    *OBJECTS,
    "False",
    {},
    2,
    0.5,
    [],
    [True, False],
    np.ones(2, bool),
    np.ones((1, 1), bool),
    bool,
)
MAPPING = (*WORDS, *OBJECTS, None, 3, 1.0, (), [], (1.0, 2.0), np.ones(3), dict)
DTYPE = (*WORDS, object(), "float33", int, "int32", bool, jnp.int8, str, 3, [], {})
# An axis of an array, or several; of one of up to four axes.
AXIS = (*WORDS, *OBJECTS, "1", 1.5, 1j, True, (0, 1.0), ("a",), {}, 9, -9, (0, 9), int)
AXIS_NAME = (*OBJECTS, b"bytes", "", 3, 1.5, True, ("",), ("data", 3), {}, [None], str)
GROUPS = (
    *WORDS,
    *OBJECTS,
    3,
    {},
    [0, 1],
    [[[0], [1]]],
    [["a"]],
    [[0.5]],
    [[0, 1], [1]],
    [[0], [-1]],
    [[0], []],
)
CHOICE = (*OBJECTS, "words", b"bytes", "", 3, True, [], ["relu"], jax.nn.relu, str)
FUNCTION = (*WORDS, None, 3, {}, [], np.ones(3))
SHAPE = (*WORDS, *OBJECTS, None, 1.5, (1.5,), ("a",), -1, (-1,), {}, True, np.ones(2))
# A settings value of a norm, such as jaxnorm.BatchNorm().
NORM = (*WORDS, *OBJECTS, None, 3, {}, jaxnorm.BatchNorm, jaxnorm.batch_norm)
# Variables: nested dicts or other trees of arrays.
TREE = (*WORDS, *OBJECTS, None, 3, jaxnorm.BatchNorm)

# What no array of a call may be, whatever the input: its shape never fits.
MISFIT = (*ARRAY, np.ones((7, 5, 3, 2, 7)), jax.random.key(0))
# As MISFIT, but for what is real where the input is.
PARAMETER = (*MISFIT, np.ones(6, np.complex64), 1j)

# What each argument is, by its name or else by its annotation.
BY_NAME: dict[str, tuple[Any, ...]] = {
    "x": (*ARRAY, None),
    "y": (*ARRAY, None, 1j),
    "kernel": (*ARRAY, None),
    "u": (*MISFIT, None, np.ones(6, np.complex64)),
    "mean": (*MISFIT, None),
    "rstd": (*MISFIT, None),
    "residue": MISFIT,
    "mask": (*MISFIT, 1j),
    "residual": (*PARAMETER, 1.0),
    "domain": (*MISFIT, None, 1, np.ones(8)),
    "segment_ids": (*MISFIT, None, 1, np.ones(8)),
    "step": (*MISFIT, None, 1.0),
    "layer": FUNCTION,
    "total": FUNCTION,
    "stats": (*MAPPING, {}, {"mean": np.zeros(6)}, {"mean": None, "var": None}),
    "params": (*MAPPING, {"gamma": np.ones(6)}, {"scale": "words"}),
    "m": (*WORDS, *OBJECTS, None, 3, (1.0, 2.0), np.ones(6)),
    "use_running_average": (*FLAG, None, 1),
    "epsilon": (*NOT_NEGATIVE, None),
    "momentum": SHARE,
    "control_momentum": (*SHARE, None),
    "weight": (*SHARE, None),
    "rmax": (*(v for v in NUMBER if not callable(v)), None, 0.5),
    "dmax": (*(v for v in NUMBER if not callable(v)), None, -1.0),
    "clip": (*NUMBER, None, 0.5),
    "size": (*COUNT, None),
    "max_steps": (*COUNT, None),
    "num_domains": (*COUNT, None),
    "num_segments": COUNT,
    "iterations": (*INTEGER, None, -1),
    "n_steps": (*COUNT, None),
    "least": (*INTEGER, None),
    "num_groups": COUNT,
    "group_size": COUNT,
    "window": (*COUNT, None),
    "window_axes": (*AXIS, None),
    "axis": (*AXIS, None),
    "reduction_axes": AXIS,
    "feature_axes": AXIS,
    "axis_name": (*AXIS_NAME, "unbound", ("unbound",)),
    "axis_index_groups": GROUPS,
    "activation": CHOICE,
    "implementation": CHOICE,
    "stat_names": (*WORDS, *OBJECTS, None, 3, ("median",), (1,)),
    "feature_shape": SHAPE,
    "shape": (*SHAPE, 6),
}
BY_TYPE: dict[Any, tuple[Any, ...]] = {
    bool: (*FLAG, None, 1),
    int: (*INTEGER, None),
    int | None: INTEGER,
    float: (*NUMBER, None),
    tuple[int, ...]: SHAPE,
    int | Sequence[int] | None: AXIS,
    Axes: (*WORDS, *OBJECTS, None, -1, (0, 1)),
    ArrayLike: (*PARAMETER, None, True, 0.0, -1),
    ArrayLike | None: PARAMETER,
    DTypeLike: (*DTYPE, None),
    DTypeLike | None: DTYPE,
}


def wrong_for(name: str, annotation: Any = None) -> tuple[Any, ...]:
    """Wrong values for the argument `name`; KeyError where the tables know none."""
    return BY_NAME[name] if name in BY_NAME else BY_TYPE[annotation]


PACKAGE = str(pathlib.Path(jaxnorm.__file__).parent)


def problem_of(call: Callable[[], Any], *names: str) -> str | None:
    """What is wrong with how `call` refuses its arguments; None if it does so well.

    The message must name one of `names`, if there are any. Traceback filtering, which
    takes most of the time, is best off: see `unfiltered`.
    """
    try:
        call()
    except (TypeError, ValueError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(PACKAGE):
            return f"comes from below, {raised_in}: {error!r}"
        if names and not any(n in str(error) for n in names):
            return f"does not name {names}: {error!r}"
        return None
    except Exception as error:
        return f"is another exception: {error!r}"
    return "is accepted"


@pytest.fixture
def unfiltered():
    """Exceptions of JAX with all their frames, which are found much faster."""
    before = getattr(jax.config, "jax_traceback_filtering")  # noqa: B009
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


def told(value: Any) -> str:
    """`value` in a few words, to tell which of a table it is."""
    text = repr(value).splitlines()[0]
    return text if len(text) < 50 else f"{type(value).__name__} {text[:40]}..."
