"""Every tool for trained models refuses wrong arguments: a walk over all of them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from wrong_values import (
    ARRAY,
    AXIS_NAME,
    FLAG,
    FUNCTION,
    GROUPS,
    MAPPING,
    NOT_NEGATIVE,
    SHARE,
    TREE,
    problem_of,
    told,
)

import jaxnorm


class Part(nnx.Module):
    """A model of NNX, which is no tree of arrays."""

    def __init__(self):
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


MODEL = Part()
LEAVES = ({"a": "words"}, {"a": {"mean": object()}}, {"a": np.array(["b"])}, np.ones(2))
SWITCH = (*FLAG, None)
# Layers or parameters; empty ones are none of some tools' business.
PARAMS = (*TREE, *LEAVES, MODEL, ["words"], jnp.ones(2))
STATS = (*PARAMS, [], {}, [1.0], {"conv": {"kernel": 1.0}}, {"norm": {}})
COLLECTIONS = (
    *PARAMS,
    {},
    [],
    {"params": None},
    {"batch_stats": None},
    {"params": MODEL, "batch_stats": MODEL},
    {"params": [], "batch_stats": []},
    {"params": {}, "batch_stats": {}},
)
NAMES = (*FUNCTION[:2], 3, [], {"where": "conv"}, {"conv": 3}, lambda path: 3)
CHECKPOINTS = (*MAPPING, MODEL)


def given(values):
    """`values`, for an argument that may be None."""
    return tuple(v for v in values if v is not None)


class Tool(NamedTuple):
    """A function, arguments that it takes, and the wrong ones of some of these."""

    call: Callable[..., Any]
    given: Mapping[str, Any]
    wrong: Mapping[str, tuple[Any, ...]]


LAYER = {"norm": jaxnorm.init_stats(2)}
GATHERING = jaxnorm.models.accumulate(LAYER)
VARIABLES = {
    "params": {"dense": {"kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}},
    "batch_stats": LAYER,
}
NORMS, OTHERS = jaxnorm.models.split(VARIABLES)
TORCH = jaxnorm.models.to_checkpoint("torch", VARIABLES)
FRAMEWORK = (*TREE, "tensorflow", "", [], {})
WHERE = {"where": FUNCTION}


def train(variables, batch):
    stats = variables["batch_stats"]["norm"]
    return {"norm": jaxnorm.BatchNorm()(batch, {}, stats)[1]}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="dense")(x)


TOOLS = {
    "accumulate": Tool(
        jaxnorm.models.accumulate,
        {"batch_stats": LAYER},
        {"batch_stats": STATS} | WHERE,
    ),
    "blend": Tool(
        jaxnorm.models.blend,
        {"a": LAYER, "b": LAYER, "weight": 0.5},
        {"a": STATS, "b": STATS, "weight": (*SHARE, None)} | WHERE,
    ),
    "commit": Tool(
        jaxnorm.models.commit,
        {"batch_stats": GATHERING, "momentum": 0.9},
        {"batch_stats": (*STATS, LAYER), "momentum": (*SHARE, None), "unbiased": FLAG},
    ),
    "decay_mask": Tool(
        jaxnorm.models.decay_mask, {"params": VARIABLES["params"]}, {"params": PARAMS}
    ),
    "discard": Tool(
        jaxnorm.models.discard,
        {"batch_stats": GATHERING},
        {"batch_stats": (*STATS, LAYER)},
    ),
    "ema": Tool(
        jaxnorm.models.ema,
        {
            "average": VARIABLES,
            "variables": VARIABLES,
            "decay": 0.9,
            "batch_stats": "average",
        },
        {
            "average": (*COLLECTIONS, LAYER),
            "variables": (*COLLECTIONS, LAYER),
            "decay": (*SHARE, None),
            "batch_stats": (*TREE, "mean", [], ["copy"], np.array(["copy", "copy"])),
        },
    ),
    "freeze": Tool(
        jaxnorm.models.freeze,
        {"batch_stats": LAYER},
        {"batch_stats": STATS, "use_running_average": SWITCH, "update": SWITCH} | WHERE,
    ),
    "from_checkpoint": Tool(
        jaxnorm.models.from_checkpoint,
        {"framework": "torch", "checkpoint": TORCH, "template": VARIABLES},
        {
            "framework": FRAMEWORK,
            "checkpoint": (*CHECKPOINTS, {}, {**TORCH, "norm.weight": "words"}),
            "template": (*COLLECTIONS, LAYER, {"params": {"norm": {"scale": 1.0}}}),
            "rename": NAMES,
            "kinds": NAMES,
            "keep": FUNCTION,
            "ignore": FUNCTION,
        },
    ),
    "frozen": Tool(
        jaxnorm.models.frozen, {"batch_stats": LAYER}, {"batch_stats": PARAMS}
    ),
    "frozen_labels": Tool(
        jaxnorm.models.frozen_labels,
        {"params": VARIABLES["params"]},
        {"params": (*PARAMS, {}, [], {"dense": {"kernel": 1.0}})} | WHERE,
    ),
    "health": Tool(
        jaxnorm.models.health,
        {"batch_stats": LAYER, "params": VARIABLES["params"]},
        {
            "batch_stats": STATS,
            "params": (*given(PARAMS), VARIABLES),
            "fresh": (*given(STATS), GATHERING),
            "epsilon": (*NOT_NEGATIVE, None, 0),
            "dead": (*NOT_NEGATIVE, None),
            "drift": (*NOT_NEGATIVE, None),
            "least": (*NOT_NEGATIVE, None),
        }
        | WHERE,
    ),
    "init_from_batch": Tool(
        jaxnorm.models.init_from_batch,
        {
            "apply": Net().apply,
            "variables": {"params": {"dense": {"kernel": jnp.eye(3)}}},
            "batch": jnp.linspace(0, 1, 12).reshape(4, 3) ** 2,
        },
        {
            "apply": (*FUNCTION, lambda variables, batch, mutable: batch),
            "variables": (*COLLECTIONS, LAYER),
            "per_feature": SWITCH,
            "center": SWITCH,
            "mask": (*given(ARRAY), jnp.ones(3), jnp.ones((4, 1)), 1j),
            "axis_name": (*AXIS_NAME, "unbound"),
            "axis_index_groups": GROUPS,
        }
        | WHERE,
    ),
    "join": Tool(
        jaxnorm.models.join,
        {"norms": NORMS, "others": OTHERS},
        {
            "norms": PARAMS,
            "others": (*PARAMS, VARIABLES),
        },
    ),
    "layers": Tool(
        jaxnorm.models.layers, {"batch_stats": LAYER}, {"batch_stats": PARAMS}
    ),
    "merge": Tool(
        jaxnorm.models.merge,
        {"trees": [LAYER, LAYER], "weights": [1, 2]},
        {
            "trees": (*TREE, LAYER, [], [LAYER], *([LAYER, v] for v in STATS)),
            "weights": (
                *TREE[:-3],
                3,
                {0: 1, 1: 2},
                [1],
                [0, 0],
                jnp.zeros(2),
                *([1, v] for v in (*NOT_NEGATIVE, None)),
            ),
        }
        | WHERE,
    ),
    "norm_settings": Tool(
        jaxnorm.models.norm_settings,
        {"framework": "torch", "eps": 1e-3, "momentum": 0.1},
        {
            "framework": FRAMEWORK,
            "method": (*TREE, None, "IterNorm", [], {}),
            "eps": NOT_NEGATIVE,
            "momentum": SHARE,
            "momentun": (0.1,),
        },
    ),
    "quantization_aware_layer": Tool(
        jaxnorm.models.quantization_aware_layer,
        {
            "kernel": jnp.ones((3, 2)),
            "stats": jaxnorm.init_stats(2),
            "layer": lambda kernel: jnp.ones((4, 3)) @ kernel,
            "quantize": lambda kernel: kernel,
            "freeze": False,
        },
        {
            "kernel": (*TREE[:-2], 3.0, np.array(["a"]), jnp.ones(()), {}),
            "stats": (*MAPPING, {}, VARIABLES, jaxnorm.init_stats(3)),
            "scale": (*TREE[:2], jnp.ones(3), {}),
            "bias": (jnp.ones(3),),
            "layer": (*FUNCTION, lambda kernel: None, lambda kernel: (kernel, kernel)),
            "quantize": FUNCTION,
            "freeze": SWITCH,
        },
    ),
    "recalibrate": Tool(
        jaxnorm.models.recalibrate,
        {"apply": train, "variables": VARIABLES, "batches": [jnp.ones((4, 2))]},
        {
            "apply": (
                *FUNCTION,
                lambda variables, batch: None,
                lambda variables, batch: "words",
                lambda variables, batch: {},
                lambda variables, batch: {"batch_stats": train(variables, batch)},
                lambda variables, batch: variables["batch_stats"],
            ),
            "variables": (*COLLECTIONS, LAYER),
            "batches": (*TREE[:2], object(), print, None, 3, {}, [], {"x": 1}),
            "layer_by_layer": SWITCH,
            "unbiased": SWITCH,
            "progress": given(FUNCTION),
        }
        | WHERE,
    ),
    "reset": Tool(
        jaxnorm.models.reset, {"batch_stats": LAYER}, {"batch_stats": STATS} | WHERE
    ),
    "split": Tool(
        jaxnorm.models.split,
        {"variables": VARIABLES},
        {"variables": (*COLLECTIONS, LAYER, VARIABLES | {"step": 3})} | WHERE,
    ),
    "swap": Tool(
        jaxnorm.models.swap,
        {"a": LAYER, "b": LAYER},
        {"a": STATS, "b": STATS} | WHERE,
    ),
    "to_checkpoint": Tool(
        jaxnorm.models.to_checkpoint,
        {"framework": "torch", "variables": VARIABLES},
        {
            "framework": FRAMEWORK,
            "variables": (
                *COLLECTIONS[:-1],
                LAYER,
                jax.eval_shape(lambda: VARIABLES),
                {"params": {"a": jax.random.key(0)}},
            ),
            "rename": NAMES,
            "kinds": NAMES,
            "template": (*given(CHECKPOINTS), {}),
        },
    ),
    "unfreeze": Tool(
        jaxnorm.models.unfreeze, {"batch_stats": LAYER}, {"batch_stats": STATS} | WHERE
    ),
}


def test_the_table_holds_every_tool():
    files = {tool.call.__module__ for tool in TOOLS.values()}
    public = {
        name
        for name, value in vars(jaxnorm.models).items()
        if inspect.isfunction(value) and value.__module__ in files
    }
    assert public == {*TOOLS}


@pytest.mark.parametrize(
    "name, argument", [(n, a) for n, tool in TOOLS.items() for a in tool.wrong]
)
def test_wrong_values(name, argument):
    tool = TOOLS[name]
    tool.call(**tool.given)
    problems = {}
    for value in tool.wrong[argument]:
        call = functools.partial(tool.call, **{**tool.given, argument: value})
        problem = problem_of(call)
        if problem:
            problems[told(value)] = problem
    assert not problems


CHECKPOINT_ARGUMENTS = {
    ("from_checkpoint", "checkpoint"),
    ("to_checkpoint", "template"),
}


@pytest.mark.parametrize(
    "name, argument",
    [
        (name, argument)
        for name, tool in TOOLS.items()
        for argument, values in tool.wrong.items()
        if any(v is MODEL for v in values)
        and (name, argument) not in CHECKPOINT_ARGUMENTS
    ],
)
def test_of_a_model_of_nnx_its_variables_are_asked_for(name, argument):
    tool = TOOLS[name]
    words = rf"{argument} must .* got .*Part.*jaxnorm\.nnx\.variables\(model\)"
    with pytest.raises(TypeError, match=f"(?s){words}"):
        tool.call(**{**tool.given, argument: MODEL})


@pytest.mark.parametrize(
    "words, call",
    [
        ("there are no layers with running stat", lambda: jaxnorm.models.freeze({})),
        (
            r"means none of the layers .* \['norm'\]",
            lambda: jaxnorm.models.freeze(LAYER, lambda path: False),
        ),
        (
            r"where must be a function of a layer's path .* 'norm'.__eq__, got 'conv'",
            lambda: jaxnorm.models.freeze(LAYER, "conv"),  # pyright: ignore
        ),
        (
            "batch_stats must hold arrays and nothing else, got 'words' at 'a/mean'",
            lambda: jaxnorm.models.freeze({"a": {"mean": "words"}}),
        ),
        (
            r"a weight must not be negative, got -1",
            lambda: jaxnorm.models.merge([LAYER, LAYER], [2, -1]),
        ),
        (
            r"some weight must not be 0, got \[0, 0\]",
            lambda: jaxnorm.models.merge([LAYER, LAYER], [0, 0]),
        ),
        (
            "weight must be a number, got nan",
            lambda: jaxnorm.models.blend(LAYER, LAYER, float("nan")),
        ),
        (
            r"\"params\" of average .* differ at \['dense/kernel', 'norm/scale'\]",
            lambda: jaxnorm.models.ema(
                VARIABLES,
                {"params": {"norm": {"scale": jnp.ones(3)}}},
                0.5,
                batch_stats="copy",
            ),
        ),
        (
            r"average must hold \"params\", got \['norm'\]",
            lambda: jaxnorm.models.ema(LAYER, VARIABLES, 0.5, batch_stats="copy"),
        ),
        (
            "health needs values, got .*Tracer.* call it outside of `jit`",
            lambda: jax.jit(lambda stats: jaxnorm.models.health(stats).healthy)(LAYER),
        ),
        (
            "of a module of torch pass its state_dict",
            lambda: jaxnorm.models.from_checkpoint("torch", [], VARIABLES),  # pyright: ignore
        ),
    ],
)
def test_messages(words, call):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_layers_and_parameters_may_be_in_lists():
    stats = [jaxnorm.init_stats(2), {"inner": (jaxnorm.init_stats(3),)}]
    assert list(jaxnorm.models.frozen(jaxnorm.models.freeze(stats))) == [
        "0",
        "1/inner/0",
    ]
    params = [{"kernel": jnp.ones((2, 2))}, {"scale": jnp.ones(2)}]
    assert jaxnorm.models.decay_mask(params) == [{"kernel": True}, {"scale": False}]
