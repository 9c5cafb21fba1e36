"""The library of kernels for CPUs: which is loaded, and what is said where none is."""

import ctypes
import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from jaxnorm._cpu import library

X86 = ("x86-64-v4", "x86-64-v3", "x86-64-v2")
built = pytest.mark.skipif(
    not library._files(), reason="jaxnorm was installed without a C++ compiler"
)


@pytest.fixture
def registered(monkeypatch):
    """The libraries whose handlers are registered, by a loader that remembers nothing
    and leaves those of this process alone."""
    found = []
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    monkeypatch.setattr(library, "_register", found.append)
    return found


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where the libraries are: it is empty at first."""
    monkeypatch.setattr(library, "_folders", lambda: [tmp_path / "none", tmp_path])
    return tmp_path


def put(folder, *levels):
    for level in levels:
        (folder / f"kernels-{level}.so").write_bytes(b"no library")


def processor(monkeypatch, level):
    """A loader of any file, on a processor of this level."""
    loaded = SimpleNamespace(jaxnorm_level=lambda: level)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded)


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@built
def test_a_library_that_is_installed_is_loaded(registered):
    assert library.problem() is None
    assert library.name() in library._usable(library._files())
    assert registered


@built
@pytest.mark.parametrize("level", library.LEVELS)
def test_each_library_that_the_processor_can_run_is_loaded(
    registered, monkeypatch, level
):
    monkeypatch.setenv(library.SWITCH, level)
    usable = level in library._usable(library._files())
    assert library.name() == (level if usable else "")
    assert (library.problem() is None) == usable


@built
def test_each_library_has_all_handlers():
    for path in library._files().values():
        loaded = ctypes.CDLL(str(path))
        assert all(hasattr(loaded, handler) for handler in library.HANDLERS)


@built
def test_another_library_can_be_asked_for():
    """The least, in a process of its own: handlers are registered once."""
    least = list(library._files())[-1]
    code = (
        "import jax.numpy as jnp, jaxnorm; from jaxnorm._cpu import library;"
        "y = jaxnorm.layer_norm(jnp.arange(4.0));"
        "print(library.name(), *(f'{v:.3f}' for v in y.tolist()))"
    )
    assert run(code, **{library.SWITCH: least}) == f"{least} -1.342 -0.447 0.447 1.342"


def test_importing_jaxnorm_loads_nothing():
    code = "import jaxnorm; from jaxnorm._cpu.library import _load as load; "
    assert run(code + "print(load.cache_info().currsize)") == "0"


@pytest.mark.parametrize("level", [4, 3, 2])
def test_the_best_is_loaded_that_the_processor_has(
    registered, folder, monkeypatch, level
):
    put(folder, *X86)
    processor(monkeypatch, level)
    assert (library.name(), library.problem()) == (f"x86-64-v{level}", None)


def test_the_plain_library_runs_on_any_processor(registered, folder, monkeypatch):
    put(folder, "plain")
    processor(monkeypatch, 0)
    assert (library.name(), library.problem()) == ("plain", None)


def test_a_processor_may_be_too_old(registered, folder, monkeypatch):
    put(folder, *X86)
    processor(monkeypatch, 0)
    assert library.problem() == (
        "the processor has none of the instruction sets x86-64-v4, x86-64-v3, x86-64-v2"
    )
    assert (library.name(), registered) == ("", [])


def test_a_level_that_the_processor_lacks_is_not_loaded(
    registered, folder, monkeypatch
):
    put(folder, *X86)
    processor(monkeypatch, 3)
    monkeypatch.setenv(library.SWITCH, "x86-64-v4")
    assert library.problem() == (
        "JAXNORM_CPU_KERNELS is x86-64-v4, and the processor has x86-64-v3, x86-64-v2 "
        "alone: set it to one of these, or not at all"
    )
    assert (library.name(), registered) == ("", [])


def test_a_level_that_is_not_installed_is_named(registered, folder, monkeypatch):
    put(folder, *X86)
    processor(monkeypatch, 4)
    monkeypatch.setenv(library.SWITCH, "plain")
    assert library.problem() == (
        "JAXNORM_CPU_KERNELS is plain, and jaxnorm was installed with x86-64-v4, "
        "x86-64-v3, x86-64-v2 alone: set it to one of these, or not at all"
    )


def test_kernels_can_be_switched_off(registered, monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.problem() == "the environment variable JAXNORM_CPU_KERNELS is 0"
    assert (library.name(), registered) == ("", [])


@pytest.mark.parametrize("value", ["", "no", "x86-64-v5"])
def test_a_switch_of_another_value_is_an_error(registered, monkeypatch, value):
    monkeypatch.setenv(library.SWITCH, value)
    for function in (library.problem, library.name):
        with pytest.raises(ValueError, match=f"JAXNORM_CPU_KERNELS='{value}' is none"):
            function()


def test_an_installation_without_a_compiler_is_said(registered, folder):
    assert library.problem() == (
        "jaxnorm was installed without its kernels for CPUs, for want of a C++ "
        "compiler that builds them: install GCC 12 or later, then jaxnorm again"
    )
    assert library.name() == ""


def test_a_broken_library_is_no_crash(registered, folder):
    put(folder, "x86-64-v2")
    said = library.problem()
    assert said and said.startswith("the kernels for CPUs cannot be loaded (")
    assert "kernels-x86-64-v2.so" in said
    assert said.endswith("): install jaxnorm again, on this machine")
    assert (library.name(), registered) == ("", [])


@built
def test_a_library_without_a_handler_is_no_crash(registered, monkeypatch):
    monkeypatch.setattr(library, "_register", lambda loaded: loaded.jaxnorm_nothing)
    assert "undefined symbol: jaxnorm_nothing" in (library.problem() or "")


def test_threads_that_ask_at_once_load_it_once(monkeypatch):
    loaded = []

    @functools.cache
    def load():
        time.sleep(0.05)
        loaded.append("plain")
        return "plain", None

    monkeypatch.setattr(library, "_load", load)
    with ThreadPoolExecutor(4) as threads:
        names = list(threads.map(lambda _: library.name(), range(4)))
    assert (names, loaded) == (["plain"] * 4, ["plain"])
