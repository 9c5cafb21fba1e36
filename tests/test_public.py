"""What the package shows: names, docstrings, tables, and no Flax unless asked."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys

import public_names
import pytest

import jaxnorm

ROOT = pathlib.Path(__file__).parents[1]
PUBLIC = {
    f"{module}.{name}": value
    for module in public_names.MODULES
    for name, value in public_names.public(module).items()
}
METHODS = {
    name: value
    for name, value in vars(jaxnorm).items()
    if inspect.isclass(value)
    and issubclass(value, jaxnorm.Norm)
    and not inspect.isabstract(value)
}


def test_importing_it_does_not_import_flax():
    code = "import jaxnorm, sys; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    assert len(public_names.docstring(PUBLIC[name])) > 30


@pytest.mark.parametrize("name", public_names.MODULES)
def test_modules_show_what_is_public(name):
    """All of it, and no module or helper of their own; in order."""
    module = importlib.import_module(name)
    imported = {
        k
        for k, v in vars(module).items()
        if not k.startswith("_")
        and (inspect.isclass(v) or inspect.isfunction(v))
        and (hasattr(module, "__path__") or v.__module__ == name)
    }
    assert dir(module) == module.__all__ == sorted(imported)


@pytest.mark.parametrize("name", METHODS)
def test_each_field_of_a_settings_value_is_described(name):
    text = inspect.getdoc(METHODS[name]) or ""
    assert "\n\nAttributes:\n" in text
    described = re.findall(r"^    (\w+): \S", text.split("Attributes:\n")[1], re.M)
    assert described == [f.name for f in dataclasses.fields(METHODS[name])]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_function_a_row_and_a_reference(name):
    module = sys.modules[METHODS[name].__module__]
    assert module.__doc__ and "https://arxiv.org/abs/" in module.__doc__
    short = module.__name__.rpartition(".")[2]
    function = getattr(jaxnorm, short)
    for section in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert section in function.__doc__ or "All else is as in" in function.__doc__
    table = (ROOT / "README.md").read_text()
    assert f"| `{name}`" in table, f"the README's table of methods lacks {name}"
    from norms import NORMS

    assert any(type(row.norm) is METHODS[name] for row in NORMS.values())


def test_every_method_trains_in_the_example():
    text = (ROOT / "examples" / "01_train_digits.py").read_text()
    trained = {name for name in METHODS if f"jaxnorm.{name}(" in text}
    # The network has nothing but x to give; docs/norms/index.md says so of each.
    assert trained == {
        name for name, kind in METHODS.items() if not kind.required_inputs
    }
    accuracies = (ROOT / "docs" / "accuracy.md").read_text()
    for name in re.findall(r'^    "([\w-]+)": jaxnorm', text, re.M):
        assert f"| `{name}` |" in accuracies


def test_the_version_is_one():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert jaxnorm.__version__ == importlib.metadata.version("jaxnorm")
    assert f"## {jaxnorm.__version__}" in text
    with pytest.raises(AttributeError, match="no attribute 'version'"):
        jaxnorm.version  # type: ignore  # noqa: B018
