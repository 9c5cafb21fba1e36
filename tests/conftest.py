"""JAX as strict as it gets, on 8 virtual devices."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """No implicit promotion between dtypes. Flax itself relies on it here and there."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_compilation():
    """XLA with few optimizations, for tests of values that do not depend on them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
