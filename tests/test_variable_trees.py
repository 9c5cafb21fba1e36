"""Names, shapes and dtypes of variables are a contract: checkpoints depend on them.

`variable_trees.json` holds, for each module and choice of arguments, the path of each
variable and what stands there: `dtype[shape]`, and for NNX the type of the Variable.
"""

import functools
import inspect
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx, traverse_util

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

FILE = pathlib.Path(__file__).with_name("variable_trees.json")

# Divisible by 32, the number of groups that group norm has by default.
FEATURES = 32

CLASSES = {
    "BatchNorm": jaxnorm.BatchNorm,
    "LayerNorm": jaxnorm.LayerNorm,
    "RMSNorm": jaxnorm.RMSNorm,
    "GroupNorm": jaxnorm.GroupNorm,
    "InstanceNorm": jaxnorm.InstanceNorm,
}

WRAPPERS = ("WeightNorm", "WeightStandardization", "SpectralNorm")

# All that Flax has no class for.
OTHERS = {
    name: kind
    for name, kind in vars(jaxnorm).items()
    if inspect.isclass(kind)
    and issubclass(kind, jaxnorm.Norm)
    and not inspect.isabstract(kind)
    and kind not in CLASSES.values()
}

ARGUMENTS = {
    "": {},
    "use_scale=False": {"use_scale": False},
    "use_bias=False": {"use_bias": False},
    "use_scale=False, use_bias=False": {"use_scale": False, "use_bias": False},
    "param_dtype=bfloat16": {"param_dtype": jnp.bfloat16},
}


def modules():
    """Name and maker of every module in the file, in both APIs."""
    for api in ("linen", "nnx"):
        for name, settings in CLASSES.items():
            for text, kwargs in ARGUMENTS.items():
                comma = ", " * bool(text)
                generic = f"{api}.Norm({name}(){comma}{text})"
                yield generic, functools.partial(_norm, api, settings(), kwargs)
                # Flax's RMSNorm has no bias to leave out.
                if name != "RMSNorm" or "use_bias" not in kwargs:
                    make = functools.partial(_named, api, name, kwargs)
                    yield f"{api}.{name}({text})", make
        average = {"momentum": None}
        make = functools.partial(_named, api, "BatchNorm", average)
        yield f"{api}.BatchNorm(momentum=None)", make
        make = functools.partial(_norm, api, jaxnorm.BatchNorm(momentum=None), {})
        yield f"{api}.Norm(BatchNorm(momentum=None))", make
        for name in WRAPPERS:
            make = functools.partial(_wrapper, api, name)
            yield f"{api}.{name}(Dense)", make
    # The same in both APIs, as tests/test_methods.py makes sure.
    for name, kind in OTHERS.items():
        shape: dict[str, Any] = {"kernel_shape": (3, FEATURES)}
        settings = kind(**(shape if "Cross" in name else {}))
        yield f"nnx.Norm({name}())", functools.partial(_norm, "nnx", settings, {})


def _wrapper(api, name):
    made = getattr(getattr(jaxnorm, api), name)
    if api == "linen":
        return made(nn.Dense(4))
    rngs = nnx.Rngs(0)
    return made(nnx.Linear(FEATURES, 4, rngs=rngs), rngs=rngs)


def _named(api, name, kwargs):
    made = getattr(getattr(jaxnorm, api), name)
    if api == "linen":
        return made(**kwargs)
    return made(FEATURES, **kwargs, rngs=nnx.Rngs(0))


def _norm(api, settings, kwargs):
    if api == "linen":
        return jaxnorm.linen.Norm(settings, **kwargs)
    return jaxnorm.nnx.Norm(settings, FEATURES, **kwargs, rngs=nnx.Rngs(0))


def tree(module):
    """Path of each variable, and what stands there."""
    if isinstance(module, nnx.Module):
        leaves = nnx.to_flat_state(nnx.state(module))
        return {
            "/".join(map(str, path)): f"{type(v).__name__} {_array(v.get_value())}"
            for path, v in leaves
        }
    mode = {}
    if "use_running_average" in inspect.signature(module.__call__).parameters:
        mode = {"use_running_average": False}
    if "update_stats" in inspect.signature(module.__call__).parameters:
        mode = {"update_stats": False}
    x = jnp.zeros((2, 3, FEATURES))
    variables = jax.eval_shape(
        functools.partial(module.init, **mode), jax.random.key(0), x
    )
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {path: _array(leaf) for path, leaf in flat.items()}


def _array(a):
    return f"{a.dtype}[{','.join(map(str, a.shape))}]"


def regenerate():
    """Writes the file anew from the code as it is.

    This breaks the checkpoints of whoever uses the package. Do it only for modules that
    are new, or with a converter and a line in the change log:

        python tests/test_variable_trees.py
    """
    trees = {name: tree(make()) for name, make in modules()}
    FILE.write_text(json.dumps(trees, indent=2, sort_keys=True) + "\n")


FROZEN = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(*row, id=row[0]) for row in modules()]
)
def test_variables_are_frozen(name, make):
    found = tree(make())
    assert found == FROZEN.get(name), (
        f"the variables of {name} are not those in {FILE.name}. Checkpoints made with "
        "released versions no longer load. If the module is new, or the change is "
        "meant and has a converter and a line in the change log, run "
        "`python tests/test_variable_trees.py` and commit the file."
    )


def test_the_file_holds_nothing_else():
    """A row whose module went away is a checkpoint that nothing loads."""
    assert set(FROZEN) == {name for name, _ in modules()}


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_every_module_is_in_the_file(api):
    namespace = getattr(jaxnorm, api)
    base = nn.Module if api == "linen" else nnx.Module
    public = {
        name
        for name, value in vars(namespace).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__.startswith("jaxnorm.")
        and not name.startswith("_")
    }
    assert public == {"Norm", *CLASSES, *WRAPPERS}


@pytest.mark.parametrize("text", ARGUMENTS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_frozen_trees_are_flax_trees(name, text):
    """What was frozen is what the installed Flax makes of the same arguments."""
    kwargs = ARGUMENTS[text]
    if name == "RMSNorm" and "use_bias" in kwargs:
        kwargs = {k: v for k, v in kwargs.items() if k != "use_bias"}
    linen = tree(getattr(nn, name)(**kwargs))
    other = tree(getattr(nnx, name)(FEATURES, **kwargs, rngs=nnx.Rngs(0)))
    comma = ", " * bool(text)
    assert FROZEN[f"linen.Norm({name}(){comma}{text})"] == linen
    assert FROZEN[f"nnx.Norm({name}(){comma}{text})"] == other
    if kwargs == ARGUMENTS[text]:
        assert FROZEN[f"linen.{name}({text})"] == linen
        assert FROZEN[f"nnx.{name}({text})"] == other


if __name__ == "__main__":
    regenerate()
