"""No state that is made here shares a buffer: with itself, or with its source."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from norms import NORMS, problem

import jaxnorm


@functools.partial(jax.jit, donate_argnums=0)
def changed(state):
    return jax.tree.map(lambda v: ~v if v.dtype == bool else v + 1, state)


def check(state, *sources):
    """Donates `state`, as a jitted step does, and uses `sources` afterwards."""
    before = jax.tree.map(np.array, sources)
    changed(state)
    donated = [v.is_deleted() for v in jax.tree.leaves(state)]
    assert all(donated)
    jax.tree.map(np.testing.assert_array_equal, sources, before)


@pytest.mark.parametrize("name", NORMS)
def test_what_a_method_starts_from(name):
    norm = NORMS[name].norm
    check((norm.init_params((4,)), norm.init_stats((4,))))


@pytest.mark.parametrize("name", ["batch", "power"])  # of both pipelines
def test_statistics_that_a_call_returns_as_they_were(name):
    row = NORMS[name]
    p = problem(row)
    stats = jaxnorm.models.freeze(jax.tree.map(jnp.asarray, p.stats))
    _, after = row.norm(p.x, p.params, stats, **row.inputs(p.x))
    check(after, stats)


def test_statistics_that_gather():
    stats = jaxnorm.models.accumulate(jaxnorm.init_stats(2))
    x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    _, after = jaxnorm.batch_norm(x, stats, use_running_average=False)
    check(after, stats)


def layers():
    """Statistics of two layers, one of complex numbers, and marks."""
    return {
        "a": jaxnorm.models.freeze(jaxnorm.init_stats(2, momentum=None)),
        "b": jaxnorm.init_stats(3, dtype=jnp.complex64),
    }


def model():
    params = {"a": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones((2, 3))}}
    counts = {"steps": {"count": jnp.array(3)}}
    return {"params": params | counts, "batch_stats": layers(), "others": counts}


def gathering():
    return jaxnorm.models.accumulate(layers(), "b".__eq__)


TOOLS = {
    "accumulate": (jaxnorm.models.accumulate, layers),
    "accumulate, some": (lambda v: jaxnorm.models.accumulate(v, "a".__eq__), layers),
    "blend": (lambda a, b: jaxnorm.models.blend(a, b, 0.5), layers, layers),
    "commit": (lambda v: jaxnorm.models.commit(v, momentum=0.9), gathering),
    "discard": (jaxnorm.models.discard, gathering),
    "ema, average": (
        lambda a, b: jaxnorm.models.ema(a, b, 0.5, batch_stats="average"),
        model,
        model,
    ),
    "ema, copy": (
        lambda a, b: jaxnorm.models.ema(a, b, 1, batch_stats="copy"),
        model,
        model,
    ),
    "ema, recalibrate": (
        lambda a, b: jaxnorm.models.ema(a, b, 0, batch_stats="recalibrate"),
        model,
        model,
    ),
    "freeze": (jaxnorm.models.freeze, layers),
    "from_checkpoint": (
        lambda v: jaxnorm.models.from_checkpoint("flax", v, v, keep="a".__eq__)[0],
        lambda: {"batch_stats": layers()},
    ),
    "join": (
        jaxnorm.models.join,
        lambda: jaxnorm.models.split(model())[0],
        lambda: jaxnorm.models.split(model())[1],
    ),
    "merge": (
        lambda a, b: jaxnorm.models.merge([a, b], where="b".__eq__),
        layers,
        layers,
    ),
    "reset": (jaxnorm.models.reset, layers),
    "split": (jaxnorm.models.split, model),
    "swap": (jaxnorm.models.swap, layers, layers),
    "unfreeze": (jaxnorm.models.unfreeze, layers),
    "recalibrate": (
        lambda v: jaxnorm.models.recalibrate(
            lambda v, x: (
                v["batch_stats"]
                | {"b": jaxnorm.BatchNorm()(x, {}, v["batch_stats"]["b"])[1]}
            ),
            v,
            [jnp.ones((4, 3))],
            where="b".__eq__,
        ),
        model,
    ),
}


@pytest.mark.parametrize("name", TOOLS)
def test_what_a_tool_returns(name):
    tool, *sources = TOOLS[name]
    sources = [source() for source in sources]
    check(tool(*sources), *sources)
