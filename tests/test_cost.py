"""What a norm keeps for the backward pass, and what XLA makes of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import MOMENTS as NORMS
from norms import problem

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Per-statistic arrays must be small beside x for the bound to say anything.
WIDE = {
    "batch": (512, 64),
    "batch_first": (64, 8, 64),
    "layer": (64, 1024),
    "layer_space": (8, 16, 16, 8),
    "rms": (64, 1024),
    "rms_space": (8, 16, 16, 8),
    "group": (8, 16, 16, 8),
    "group_first": (8, 8, 256),
    "instance": (4, 32, 32, 8),
    "instance_first": (4, 8, 32, 32),
    "ghost": (2048, 64),
}


def arguments(name, dtype):
    row = NORMS[name]
    norm = row.norm
    if name == "ghost":
        norm = jaxnorm.GhostBatchNorm(size=512)
    p = problem(row, WIDE[name], dtype=dtype)
    return norm, p


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_only_the_input_is_kept_for_the_backward_pass(name, dtype, masked):
    norm, p = arguments(name, dtype)
    mask = p.mask if masked else None

    def f(x, params):
        return norm(x, params, p.stats, mask=mask)[0]

    residuals = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], p.x, p.params)
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(residuals))
    allowed = 1.05 * p.x.nbytes + (p.mask.nbytes if masked else 0)
    assert size <= allowed, f"{size / p.x.nbytes:.3f} times the input"


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_evaluation_and_parts_keep_no_more(name):
    """Standardizing by given statistics, as evaluation and fine-tuning do."""
    norm, p = arguments(name, jnp.bfloat16)

    def f(x, params):
        return norm(x, params, p.stats, use_running_average=True)[0]

    residuals = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], p.x, p.params)
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(residuals))
    assert size <= 1.05 * p.x.nbytes


@pytest.mark.optimized
@pytest.mark.parametrize("name", WIDE)
def test_no_transpose_or_copy_of_the_input(name):
    norm, p = arguments(name, jnp.float32)
    weights = p.cotangent

    def f(x, params, weights):
        return (norm(x, params, p.stats)[0] * weights).sum()

    grad = jax.jit(jax.grad(f, (0, 1)))
    text = str(grad.lower(p.x, p.params, weights).compile().as_text())
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (transpose|copy)\(", text)
    sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims, _ in moved]
    assert all(n < p.x.size / 4 for n in sizes), moved


@pytest.mark.parametrize("name", WIDE)
def test_half_precision_is_not_kept_in_float32(name):
    """Forward and backward in one program: no float32 array of x's size survives."""
    norm, p = arguments(name, jnp.bfloat16)

    def f(x, params):
        return norm(x, params, p.stats)[0]

    split = jax.jit(lambda x, params: jax.vjp(f, x, params))
    _, pull = split.lower(p.x, p.params).out_info
    wide = [v for v in jax.tree.leaves(pull) if v.dtype == jnp.float32]
    assert all(v.size < p.x.size / 4 for v in wide)


@pytest.mark.parametrize("name", NORMS)
def test_parameters_and_statistics_have_the_shape_of_the_features(name):
    row = NORMS[name]
    features = row.norm.axes(row.shape).feature_shape
    y, stats = jax.eval_shape(
        functools.partial(row.norm, params={}, stats=row.norm.init_stats(features)),
        problem(row).x,
    )
    assert y.shape == row.shape
    assert all(v.shape == features for v in stats.values())
    assert all(v.shape == features for v in row.norm.init_params(features).values())


def test_the_gradient_of_segments_of_rows_takes_little_memory():
    """That of rows, in which no slope of each element is written."""
    norm = jaxnorm.SegmentNorm(num_segments=8)
    x = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    ids = np.arange(len(x)) % 8

    @jax.jit
    def gradients(x, params, ids, dy):
        def f(x, params):
            return norm(x, params, {}, segment_ids=ids)[0]

        return jax.vjp(f, x, params)[1](dy)

    program = gradients.lower(x, norm.init_params(x.shape[-1:]), ids, x).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 2.5 * x.nbytes
