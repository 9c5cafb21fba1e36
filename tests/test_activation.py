"""A residual and an activation after a norm: as the composition, with less kept."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from norms import NORMS, assert_close, changed, problem
from scipy import special

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm._activation import ACTIVATIONS, pack, unpack

NAMES = ("batch", "batch_first", "group", "group_first", "instance")
EXACT = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "gelu": lambda z: (
        0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    ),
    "silu": lambda z: z * special.expit(z),
    "sigmoid": special.expit,
    "tanh": np.tanh,
}
# A last axis of eights is packed, another one is not.
WIDE = {
    "batch": (8, 4, 2, 8),
    "batch_first": (8, 4, 4, 8),
    "group": (8, 4, 2, 16),
    "group_first": (8, 8, 2, 8),
    "instance": (8, 4, 2, 8),
}
by_name = pytest.mark.parametrize("name", NAMES)


def case(name, activation, *, wide=False, dtype=jnp.float32):
    row = NORMS[name]
    p = problem(row, WIDE[name] if wide else None, dtype=dtype)
    residual = np.random.default_rng(9).normal(size=p.x.shape).astype(dtype)
    return row, changed(row.norm, activation=activation), p, residual


def composed(row, activation, p, *, mask=None, flag=False):
    """The norm without either, then both by hand."""

    def f(x, params, residual):
        y, stats = row.norm(x, params, p.stats, mask=mask, use_running_average=flag)
        y = y if residual is None else y + residual.astype(y.dtype)
        y = ACTIVATIONS[activation](y)
        return jnp.where(True if mask is None else mask, y, 0), stats

    return f


def fused(norm, p, *, mask=None, flag=False):
    def f(x, params, residual):
        options = {"mask": mask, "use_running_average": flag, "residual": residual}
        return norm(x, params, p.stats, **options)

    return f


def assert_same(actual, desired, **kwargs):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, np.asarray(b, np.float64), size=4, **kwargs)


@by_name
@pytest.mark.parametrize("activation", EXACT)
def test_values_match_the_reference(name, activation):
    row, norm, p, residual = case(name, activation)
    y, _ = jax.jit(norm)(p.x, p.params, p.stats, residual=residual)
    plain, _ = row.exact(p.x, p.params, p.stats)
    assert_close(y, EXACT[activation](plain + residual), summed=p.x.size)


# All ways for one method over the batch and one within examples; for the others every
# two of them together.
WAYS = [
    (name, *ways)
    for name in NAMES
    for ways in itertools.product([False, True], repeat=3)
    if name in ("batch", "group") or sum(ways) % 2
]


@pytest.mark.parametrize("name, wide, masked, with_residual", WAYS)
def test_relu_is_the_composition_with_all_derivatives(
    name, wide, masked, with_residual
):
    row, norm, p, residual = case(name, "relu", wide=wide)
    residual = residual if with_residual else None
    mask = p.mask if masked else None
    x, rng = p.x, np.random.default_rng(3)
    if masked:
        x = np.where(p.mask, x, np.nan).astype(x.dtype)
    direction = jax.tree.map(
        lambda v: rng.normal(size=v.shape).astype(v.dtype), (p.x, p.params, residual)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(f, args):
        (y, stats), (dy, _) = jax.jvp(f, args, direction)
        _, pull = jax.vjp(lambda *a: f(*a)[0], *args)

        def slope(args):
            return (jnp.sin(f(*args)[0]) * p.cotangent).sum()

        _, second = jax.jvp(jax.grad(slope), (args,), (direction,))
        return y, stats, dy, pull(p.cotangent.astype(y.dtype)), second

    args = x, p.params, residual
    ours = all_of(fused(norm, p, mask=mask), args)
    theirs = all_of(composed(row, "relu", p, mask=mask), args)
    assert_same(ours, theirs, summed=p.x.size)


@pytest.mark.parametrize("activation", EXACT)
def test_what_a_mask_hides_is_zero_and_gets_no_gradient(activation):
    _, norm, p, residual = case("batch", activation)
    bad = np.where(p.mask, residual, np.nan)

    @jax.jit
    def f(x, residual):
        y = norm(x, p.params, p.stats, mask=p.mask, residual=residual)[0]
        return (y * p.cotangent).sum(), y

    (dx, dr), y = jax.grad(f, (0, 1), has_aux=True)(p.x, bad)
    np.testing.assert_array_equal(y[~p.mask], 0)
    np.testing.assert_array_equal(dr[~p.mask], 0)
    clean, _ = jax.grad(f, (0, 1), has_aux=True)(p.x, residual)
    assert_same((dx, dr), clean)


@by_name
@pytest.mark.parametrize("flag", [False, True])
def test_half_precision_and_evaluation(name, flag):
    row, norm, p, residual = case(name, "relu", wide=True, dtype=jnp.bfloat16)
    y, stats = fused(norm, p, flag=flag)(p.x, p.params, residual)
    wide = p.x.astype(np.float32), p.params, residual.astype(np.float32)
    exact, kept = composed(row, "relu", p, flag=flag)(*wide)
    assert y.dtype == jnp.bfloat16
    assert_close(y, np.asarray(exact), dtype=jnp.bfloat16)
    assert_same(stats, kept, summed=p.x.size)


@by_name
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_bit_is_kept_for_each_element(name, dtype):
    shape = (4, 8, 32, 32) if name.endswith("first") else (4, 32, 32, 8)
    row = NORMS[name]
    p = problem(row, shape, dtype=dtype)
    norm = changed(row.norm, activation="relu")

    def f(x, params):
        return norm(x, params, p.stats)[0]

    kept = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], p.x, p.params)
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(kept))
    assert size <= 1.05 * p.x.nbytes + p.x.size / 8


@pytest.mark.parametrize("name", ["batch", "group"])
def test_synchronized_equals_one_device(name):
    row, norm, p, residual = case(name, "relu", wide=True)
    split = 0 if name == "batch" else 1
    synced = changed(norm, axis_name="i")

    def loss(norm, x, residual):
        y = norm(x, p.params, p.stats, residual=residual)[0]
        return y, (y**3).sum()

    def over_devices(x, residual):
        return jax.vmap(
            lambda *a: loss(synced, *a), (split, split), (split, 0), axis_name="i"
        )(*(jnp.stack(jnp.split(v, 4, split), split) for v in (x, residual)))

    def total(f):
        return jax.jit(jax.grad(lambda *a: f(*a)[1].sum(), (0, 1)))

    whole = total(functools.partial(loss, norm))(p.x, residual)
    assert_same(total(over_devices)(p.x, residual), whole, summed=p.x.size)


def test_modules_of_both_apis():
    _, norm, p, residual = case("batch", "relu", wide=True)
    want, new = norm(p.x, {}, p.stats, residual=residual)
    kinds = {"BatchNorm": {}, "GroupNorm": {"num_groups": 2}, "InstanceNorm": {}}
    for kind, options in kinds.items():
        module = getattr(jaxnorm.linen, kind)(activation="relu", **options)
        flag = {"use_running_average": False} if kind == "BatchNorm" else {}
        y, variables = module.init_with_output(
            jax.random.key(0), p.x, residual=residual, **flag
        )
        layer = getattr(jaxnorm.nnx, kind)(
            8, activation="relu", rngs=nnx.Rngs(0), **options
        )
        assert_same(layer(p.x, residual=residual), y)
        plain = getattr(nn, kind)(**options, **flag)
        by_hand = plain.apply(variables, p.x, mutable=["batch_stats"])[0] + residual
        assert_close(y, np.maximum(by_hand, 0), summed=p.x.size)
    generic = jaxnorm.linen.Norm(norm, use_running_average=False)
    variables = generic.init(jax.random.key(0), p.x)
    y, updates = generic.apply(
        variables, p.x, residual=residual, mutable=["batch_stats"]
    )
    assert_same((y, updates["batch_stats"]), (want, new), summed=p.x.size)


@pytest.mark.parametrize("shape", [(), (3,), (8,), (2, 3, 16), (0, 8)])
def test_packed_booleans_come_back(shape):
    flags = np.random.default_rng(0).random(shape) > 0.5
    bits = pack(jnp.asarray(flags))
    assert bits.nbytes == flags.nbytes / (8 if shape and shape[-1] % 8 == 0 else 1)
    np.testing.assert_array_equal(unpack(bits), flags)


def test_errors_name_what_does_not_fit():
    _, norm, p, residual = case("batch", "relu")
    with pytest.raises(ValueError, match="activation='swish' is none of .*'silu'"):
        jaxnorm.group_norm(p.x, num_groups=2, activation="swish")
    for flag in (False, True):
        with pytest.raises(ValueError, match=r"residual has shape \(4, 2, 6\), but"):
            fused(norm, p, flag=flag)(p.x, p.params, residual[0])
    with pytest.raises(TypeError, match="activation='relu' takes real numbers"):
        jaxnorm.group_norm(p.x + 1j, num_groups=2, activation="relu")
    with pytest.raises(TypeError, match="ScaleNorm is called with the inputs"):
        jaxnorm.ScaleNorm()(p.x, {}, {}, residual=residual)
