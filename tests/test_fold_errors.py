"""Folding, converting and the tools of NNX models refuse wrong arguments: a walk."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from wrong_values import (
    ARRAY,
    AXIS,
    COUNT,
    FLAG,
    FUNCTION,
    MAPPING,
    NORM,
    NOT_NEGATIVE,
    OBJECTS,
    TREE,
    WORDS,
    problem_of,
    told,
    unfiltered,
)

import jaxnorm
import jaxnorm.nnx as jx

__all__ = ["unfiltered"]  # a fixture
pytestmark = pytest.mark.usefixtures("unfiltered")

ONES, ZEROS = jnp.ones(3), jnp.zeros(3)
LAYER, STATS = {"kernel": jnp.ones((3, 3))}, jaxnorm.init_stats(3)
VARIABLES = {
    "params": {"dense": LAYER, "norm": {"scale": ONES}},
    "batch_stats": {"norm": STATS},
}
PAIR = ("dense", "norm")
RNGS = nnx.Rngs(0)
MODEL = nnx.Sequential(nnx.Linear(3, 3, rngs=RNGS), jx.BatchNorm(3, rngs=RNGS))
SCALES = nnx.Sequential(jx.RMSNorm(3, rngs=RNGS), nnx.Linear(3, 3, rngs=RNGS))
VARIABLES_OF_SCALES = {"params": {"dense": LAYER, "norm": {"scale": ONES}}}
WRAPPED = jx.WeightNorm(nnx.Linear(3, 3, rngs=RNGS), rngs=RNGS)
HELD, X = jx.variables(MODEL), jnp.ones((2, 3))
BATCH_STATS = {"mean": ONES, "var": ONES}

LAYERS = (
    *MAPPING,
    {},
    {"bias": ZEROS},
    {"kernel": None},
    {"kernel": "words"},
    {"kernel": jnp.ones((3, 3), jnp.int8)},
    {"kernel": jnp.ones(())},
    {**LAYER, "bias": "words"},
    {**LAYER, "bias": None},
    {**LAYER, "bias": jnp.ones(2)},
)
ARRAYS = (*ARRAY, None)
EPSILON = (*NOT_NEGATIVE, None)
PAIRS = (
    *WORDS,
    *OBJECTS,
    3,
    [],
    {},
    PAIR,
    jaxnorm.models.Pair(*PAIR),
    *([pair] for pair in (None, 1, "dense", ("dense",), (1, 2), (*PAIR, *"abcdef"))),
    *([(*PAIR, epsilon)] for epsilon in (-1, 1j, True, "1e-5")),
    [(*PAIR, 1e-5, "no")],
    [(*PAIR, 1e-5, False, "axis")],
    [(*PAIR, 1e-5, True, -2, 0)],
    [(*PAIR, 1e-5, True, -2, 1, "padded")],
)
TREES = (*TREE, MODEL, {"params": None}, {"params": {"dense": "words"}})
NORMS = (
    *TREES,
    {},
    {"params": [{"scale": ONES}]},
    {"params": {"norm": {"scale": None, "bias": ONES}}},
)
UPDATES = (
    *TREES,
    {"others": {}},
    *(
        {"batch_stats": {"layers": {1: BATCH_STATS | {"var": v}}}}
        for v in (None, "words", 1j * ONES, jnp.ones(2))
    ),
)
MODELS = (*WORDS, *OBJECTS, None, 3, {}, VARIABLES, nnx.Linear, nnx.state(MODEL))
FUNCTIONS = (*(v for v in FUNCTION if v is not None), None)
FLAGS = (*FLAG, None)


class Tool(NamedTuple):
    """A function, arguments that it takes, and the wrong ones of some of these."""

    call: Callable[..., Any]
    given: Mapping[str, Any]
    wrong: Mapping[str, tuple[Any, ...]]


def apply(variables, x):
    return x @ variables["params"]["dense"]["kernel"]


def scaled(variables, x):
    params = variables["params"]
    return jaxnorm.rms_norm(x, **params["norm"]) @ params["dense"]["kernel"]


FORM = {"layer": LAYER, "a": ONES, "b": ZEROS}
WRONG_FORM = {"layer": LAYERS, "a": ARRAYS, "b": ARRAYS, "axis": (*AXIS, None)}
FLAGS_OF_CONVERT = {"use_scale": FLAGS, "use_bias": FLAGS}
TOOLS = {
    "affine_form": Tool(
        jaxnorm.models.affine_form,
        {"params": {"scale": ONES}, "stats": STATS, "epsilon": 0.1},
        {
            "params": (*MAPPING, {"scale": "words"}, {"scale": jnp.ones(2)}),
            "stats": (*MAPPING, {}, {"var": None}, {"var": jnp.ones(2)}),
            "epsilon": EPSILON,
        },
    ),
    "fold_output": Tool(jaxnorm.models.fold_output, FORM, WRONG_FORM),
    "fold_input": Tool(
        jaxnorm.models.fold_input,
        FORM,
        WRONG_FORM | {"groups": (*COUNT, None), "padded": FLAG},
    ),
    "fold": Tool(
        jaxnorm.models.fold,
        {"variables": VARIABLES, "pairs": [PAIR], "epsilon": 0.1},
        {"variables": (*TREES, {}), "pairs": (*PAIRS, None), "epsilon": EPSILON},
    ),
    "find_pairs": Tool(
        lambda apply, variables: jaxnorm.models.find_pairs(apply, variables, X),
        {"apply": apply, "variables": VARIABLES},
        {"apply": (*FUNCTIONS, MODEL), "variables": TREES},
    ),
    "convert": Tool(
        jaxnorm.models.convert,
        {"variables": VARIABLES, "norm": jaxnorm.BatchRenorm()},
        {"variables": NORMS, "norm": (*NORM, MODEL), "where": FUNCTIONS}
        | FLAGS_OF_CONVERT,
    ),
    "nnx.variables": Tool(jx.variables, {"model": MODEL}, {"model": MODELS}),
    "nnx.update": Tool(
        jx.update,
        {"model": MODEL, "variables": HELD},
        {"model": MODELS, "variables": UPDATES},
    ),
    "nnx.bake": Tool(jx.bake, {"model": WRAPPED}, {"model": MODELS}),
    "nnx.convert": Tool(
        jx.convert,
        {"model": MODEL, "norm": jaxnorm.BatchRenorm()},
        {"model": MODELS, "norm": (*NORM, MODEL), "where": FUNCTIONS}
        | FLAGS_OF_CONVERT,
    ),
    "nnx.fold": Tool(
        lambda model, **options: jx.fold(model, X, **options),
        {"model": MODEL, "pairs": [("layers/0", "layers/1")], "epsilon": 0.1},
        {"model": MODELS, "pairs": PAIRS, "epsilon": EPSILON},
    ),
    "fold_scales": Tool(
        lambda apply, variables, where: jaxnorm.models.fold_scales(
            apply, variables, X, where=where
        ),
        {"apply": scaled, "variables": VARIABLES_OF_SCALES, "where": "norm".__eq__},
        {"apply": (*FUNCTIONS, MODEL), "variables": TREES, "where": FUNCTIONS},
    ),
    "nnx.fold_scales": Tool(
        lambda model, where: jx.fold_scales(model, X, where=where),
        {"model": SCALES, "where": "layers/0".__eq__},
        {"model": MODELS, "where": FUNCTIONS},
    ),
    "nnx.init_from_batch": Tool(
        lambda model, batch, **options: jx.init_from_batch(
            nnx.clone(model), batch, where="layers/0".__eq__, **options
        ),
        {"model": MODEL, "batch": jnp.linspace(0, 1, 12).reshape(4, 3) ** 2},
        {"model": MODELS, "per_feature": FLAG, "center": FLAG},
    ),
    "nnx.recalibrate": Tool(
        jx.recalibrate,
        {"model": MODEL, "batches": [X]},
        {"model": MODELS, "call": FUNCTIONS, "where": FUNCTIONS},
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_wrong_values(name):
    tool = TOOLS[name]
    tool.call(**tool.given)
    before, problems = jx.variables(MODEL), {}
    for argument, values in tool.wrong.items():
        for value in values:
            call = functools.partial(tool.call, **{**tool.given, argument: value})
            problem = problem_of(call)
            if problem:
                problems[argument, told(value)] = problem
    assert not problems
    jax.tree.map(np.testing.assert_array_equal, jx.variables(MODEL), before)


def test_the_table_holds_every_tool_of_nnx_models():
    tools = {k for k in dir(jx) if getattr(jx, k).__class__ is apply.__class__}
    assert tools <= {name.removeprefix("nnx.") for name in TOOLS}
