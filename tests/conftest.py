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


def pytest_collection_modifyitems(items):
    """Optimized tests of a file in a row: no program is compiled in turns."""
    files = {item.path: i for i, item in reversed([*enumerate(items)])}
    items.sort(key=lambda item: (files[item.path], is_optimized(item)))


def is_optimized(item):
    return item.get_closest_marker("optimized") is not None


@pytest.fixture(autouse=True)
def compilation(request):
    """Values do not depend on optimizations, but where the mark `optimized` says so."""
    optimize(is_optimized(request.node))


@pytest.fixture(autouse=True, scope="module")
def memory():
    """What a file has compiled goes with it."""
    yield
    optimize(False)
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or the C library keeps it


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Flax itself relies on it here and there."""
    with jax.numpy_dtype_promotion("strict"):
        yield
