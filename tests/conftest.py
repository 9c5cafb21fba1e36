"""JAX as strict as it gets, on 8 virtual devices, and as quick to compile."""

import ctypes
import gc
import sys

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# XLA's older code generator, where a release has it still, takes a quarter of the time
# and of the memory of the newer one. No setting of JAX's reaches it for all programs.
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
compile_options = compiler.get_compile_options


def quick_options(*args, env_options_overrides=None, **kwargs):
    options = QUICK | (env_options_overrides or {})
    return compile_options(*args, env_options_overrides=options, **kwargs)


def known(options):
    """Those of XLA's options that this release has."""
    found = {}
    for name, value in options.items():
        try:
            jax.jit(lambda: 0).lower().compile({name: value})
            found[name] = value
        except jax.errors.JaxRuntimeError:
            continue
    return found


def optimize(most):
    """Compiles what follows with most of XLA's optimizations, or with the fewest."""
    if most == (compiler.get_compile_options is compile_options):
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not most)
    compiler.get_compile_options = compile_options if most else quick_options


QUICK = known(QUICK)
optimize(False)


def is_optimized(item):
    return item.get_closest_marker("optimized") is not None


class Compilation:
    """Compiles for each test as it is marked, and forgets programs once they are many.

    A program takes about a megabyte.
    """

    most = 400
    programs = 0

    def count(self, event, duration_secs, **kwargs):
        self.programs += event.endswith("backend_compile_duration")

    def pytest_collection_modifyitems(self, items):
        """Optimized tests of a file in a row: no program is compiled in turns."""
        files = {item.path: i for i, item in reversed([*enumerate(items)])}
        items.sort(key=lambda item: (files[item.path], is_optimized(item)))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        optimize(is_optimized(item))
        if self.programs > self.most:
            self.programs = 0
            jax.clear_caches()
            gc.collect()
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)  # or the C library keeps it


def pytest_configure(config):
    """For the doctests, too, which are in no folder of this file's."""
    compilation = Compilation()
    jax.monitoring.register_event_duration_secs_listener(compilation.count)
    config.pluginmanager.register(compilation)


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Flax itself relies on it here and there."""
    with jax.numpy_dtype_promotion("strict"):
        yield
