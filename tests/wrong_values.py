"""Wrong values for each kind of argument, for tests that walk over what is public.

Each value is wrong for every argument of its kind, whatever the others are: `call`
must raise ValueError or TypeError of the package's own for it, while tracing.
"""

import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

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

PACKAGE = str(pathlib.Path(jaxnorm.__file__).parent)


def problem_of(call: Callable[[], Any]) -> str | None:
    """What is wrong with how `call` refuses its arguments; None if it does so well."""
    try:
        call()
    except (TypeError, ValueError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(PACKAGE):
            return f"comes from below, {raised_in}: {error!r}"
        return None
    except Exception as error:
        return f"is another exception: {error!r}"
    return "is accepted"


def told(value: Any) -> str:
    """`value` in a few words, to tell which of a table it is."""
    text = repr(value).splitlines()[0]
    return text if len(text) < 50 else f"{type(value).__name__} {text[:40]}..."
