"""Which library of kernels is loaded, and what is said where there is none."""

import subprocess
import sys

import pytest

from jaxnorm._cpu import library

LIBRARIES = {v: p for v in library.LEVELS if (p := library._file(v)) is not None}


@pytest.fixture
def load(monkeypatch):
    """Loads as if for the first time."""

    def load(switch=None):
        if switch is not None:
            monkeypatch.setenv(library.SWITCH, switch)
        library._load.cache_clear()
        return library.name(), library.problem()

    yield load
    monkeypatch.undo()
    library._load.cache_clear()


def test_they_can_be_switched_off(load):
    name, problem = load("0")
    assert not name and "JAXNORM_CPU_KERNELS is 0" in problem


def test_an_unknown_switch_is_refused(load):
    with pytest.raises(ValueError, match=r"'yes' is none of 0 .* 1 .* x86-64-v3"):
        load("yes")


def test_an_install_without_a_compiler_says_so(load, monkeypatch):
    monkeypatch.setattr(library, "_file", lambda level: None)
    name, problem = load("1")
    assert not name and "C++ compiler" in problem and "again" in problem


def test_a_broken_library_is_a_problem_and_no_crash(load, monkeypatch, tmp_path):
    broken = tmp_path / "kernels-plain.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(
        library, "_file", lambda level: broken if level == "plain" else None
    )
    name, problem = load("1")
    assert not name and "cannot be loaded" in problem and str(broken) in problem


@pytest.mark.skipif(not LIBRARIES, reason="installed without kernels")
class TestInstalled:
    def test_the_best_that_the_processor_has_is_loaded(self, load):
        name, problem = load("1")
        assert problem is None and name in LIBRARIES

    @pytest.mark.parametrize("level, name", [(4, 4), (3, 3), (2, 2), (0, 2)])
    def test_levels(self, level, name, monkeypatch):
        files = {v: LIBRARIES[v] for v in LIBRARIES if v != "plain"}
        if not files:
            pytest.skip("one plain library alone")

        class Library:
            def __init__(self, path):
                pass

            def jaxnorm_level(self):
                return level

        monkeypatch.setattr(library.ctypes, "CDLL", Library)
        assert library._best(files) == f"x86-64-v{name}"

    def test_another_can_be_asked_for(self):
        """The least, in a process of its own: handlers are registered once."""
        least = [*LIBRARIES][-1]
        code = (
            "import jax.numpy as jnp, jaxnorm; from jaxnorm._cpu import library;"
            "y = jaxnorm.layer_norm(jnp.arange(4.0));"
            "print(library.name(), *(f'{v:.3f}' for v in y.tolist()))"
        )
        done = subprocess.run(
            ["env", f"{library.SWITCH}={least}", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [least, "-1.342", "-0.447", "0.447", "1.342"]


def test_the_package_loads_no_kernels():
    code = "import sys, jaxnorm; print(jaxnorm._cpu.library._load.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
