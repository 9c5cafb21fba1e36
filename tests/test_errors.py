"""Every wrong input raises while tracing: the rule, the values, the way out."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from norms import MOMENTS as NORMS
from norms import problem

import jaxnorm
from jaxnorm import axes

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "name, shape, message",
    [(n, shape, message) for n, r in NORMS.items() for shape, message in r.bad],
)
def test_bad_shapes(name, shape, message):
    norm = NORMS[name].norm
    stats = norm.init_stats((4,))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: norm(x, {}, stats), jnp.ones(shape))


@pytest.mark.parametrize("name", NORMS)
def test_parameters_of_another_shape(name):
    row = NORMS[name]
    p = problem(row)
    for key in p.params:
        params = p.params | {key: jnp.ones((5,))}
        with pytest.raises(
            ValueError, match=rf"{key} has shape \(5,\), but the features"
        ):
            jax.eval_shape(lambda x, q=params: row.norm(x, q, p.stats), p.x)
    complex_scale = {"scale": p.params["scale"].astype(jnp.complex64)}
    with pytest.raises(TypeError, match="scale is complex64, but the input is real"):
        row.norm(p.x, complex_scale, p.stats)


@pytest.mark.parametrize("name", [n for n, r in NORMS.items() if r.norm.has_stats])
@pytest.mark.parametrize("evaluate", [False, True])
def test_statistics_of_another_shape(name, evaluate):
    row = NORMS[name]
    p = problem(row)
    for bad, message in (
        ({}, r"stats lacks \['mean', 'var'\], it holds \[\]"),
        ({"mean": p.stats["mean"]}, r"stats lacks \['var'\], it holds \['mean'\]"),
        (p.stats | {"var": jnp.ones((5,))}, r"stats\['var'\] has shape \(5,\), but"),
    ):
        with pytest.raises(ValueError, match=message):
            row.norm(p.x, p.params, bad, use_running_average=evaluate)


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_what_is_no_number(name):
    norm = NORMS[name].norm
    keys = jax.random.split(jax.random.key(0), (4, 3))
    with pytest.raises(TypeError, match="x must be an array of numbers, got dtype key"):
        norm(keys, {}, norm.init_stats((3,)))


@pytest.mark.parametrize("kind", [type(r.norm) for r in NORMS.values()])
def test_settings_are_keyword_only_values(kind):
    with pytest.raises(TypeError, match="positional"):
        kind(12)
    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind(epsilon=1e-3) != kind() and "epsilon=0.001" in repr(kind(epsilon=1e-3))
    with pytest.raises(AttributeError):
        kind().epsilon = 1
    with pytest.raises(ValueError, match="epsilon must not be negative, got -1"):
        kind(epsilon=-1)
    # Lists, as Flax users write them, make the same hashable value.
    listed = kind(axis_name=["a", "b"], axis_index_groups=[[0, 1], [2, 3]])
    tupled = kind(axis_name=("a", "b"), axis_index_groups=((0, 1), (2, 3)))
    assert listed == tupled and hash(listed) == hash(tupled)


def test_functions_take_their_settings_by_keyword():
    x = jnp.ones((4, 3))
    with pytest.raises(TypeError, match="positional"):
        cast(Any, jaxnorm.layer_norm)(x, None, None, 12)
    with pytest.raises(TypeError, match="use_running_average"):
        cast(Any, jaxnorm.batch_norm)(x, jaxnorm.init_stats(3))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 99])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match="PyTorch's momentum m is 1 - m here"):
        jaxnorm.BatchNorm(momentum=momentum)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"num_groups": 2, "group_size": 2},
            "exactly one of num_groups and group_size",
        ),
        ({"num_groups": None}, "exactly one of num_groups and group_size"),
        ({"num_groups": 0}, "num_groups=0 does not divide the 6 features"),
        ({"num_groups": 2, "reduction_axes": (1,)}, "one feature axis, among those it"),
    ],
)
def test_group_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        jaxnorm.GroupNorm(**settings)(jnp.ones((2, 4, 6)), {}, {})


@pytest.mark.parametrize("axis", [1.5, "1", (0, 1.0), None])
def test_axes_that_are_no_integers(axis):
    with pytest.raises(TypeError, match="axis must be an integer or a sequence of"):
        jaxnorm.BatchNorm(axis=axis).axes((2, 3))
    with pytest.raises(TypeError, match="num_groups must be an integer, got 2.0"):
        cast(Any, jaxnorm.GroupNorm)(num_groups=2.0).axes((2, 4, 6))


@pytest.mark.parametrize("axis, ndim", [(2, 2), (-3, 2), ((0, 5), 3)])
def test_axes_out_of_range(axis, ndim):
    with pytest.raises(ValueError, match="is out of range for an array of rank"):
        jaxnorm.BatchNorm(axis=axis).axes((2,) * ndim)


@pytest.mark.parametrize("size", [2, 0])
def test_virtual_batches_that_are_not_equal(size):
    message = f"size={size} does not divide the batch of 7 examples"
    with pytest.raises(ValueError, match=message):
        axes.virtual_batches((7, 4), -1, size)
