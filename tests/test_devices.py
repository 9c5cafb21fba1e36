"""Statistics over many devices equal those of one, in every way to spread a batch."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from norms import (
    MOMENTS,
    NORMS,
    RUNNING,
    SYNCED,
    assert_close,
    changed,
    everything,
    moved,
    problem,
)

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx
from jaxnorm import _devices as devices

pytestmark = pytest.mark.usefixtures("strict_dtypes")

DEVICES = 4
GRID = {"a": 2, "b": 2}


def mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    grid = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes))


def shards(x, axis, count):
    """(count, ...) pieces of `x` along `axis`."""
    return jnp.stack(jnp.split(x, count, axis))


def joined(pieces, axis):
    return jnp.concatenate(list(pieces), axis)


def spread_over(mapped, axis):
    """`mapped`, over pieces of x and mask, as a function of whole arrays."""

    def call(x, params, stats, mask):
        pieces = (shards(v, axis, DEVICES) for v in (x, mask))
        x, mask = pieces
        y, stats = mapped(x, params, stats, mask)
        return joined(y, axis), jax.tree.map(lambda v: v[0], stats)

    return call


def called(row, norm=None):
    """A call of the row's norm, with all that it takes."""
    norm = row.norm if norm is None else norm

    def call(x, params, stats, mask):
        return norm(x, params, stats, mask=mask, **row.inputs(x))

    return call


def synced(mode, row, axis):
    """The norm over arrays that are spread over devices along `axis`, in some mode."""
    name = ("a", "b") if mode == "two_names" else "d"
    one = called(row, changed(row.norm, axis_name=name))

    if mode in ("shard_map", "shard_map_unchecked", "two_names"):
        sizes = GRID if mode == "two_names" else {"d": DEVICES}
        spec = P(*[None] * axis, name)
        return jax.shard_map(
            one,
            mesh=mesh(**sizes),
            in_specs=(spec, P(), P(), spec),
            out_specs=(spec, P()),
            check_vma=mode != "shard_map_unchecked",
        )
    axes = (0, None, None, 0)
    if mode == "pmap":
        mapped = jax.pmap(one, "d", in_axes=axes, devices=jax.devices()[:DEVICES])
    else:
        mapped = jax.vmap(one, axes, axis_name="d")
    return spread_over(mapped, axis)


MODES = ("shard_map", "shard_map_unchecked", "two_names", "pmap", "vmap")


def value_and_grads(call, weights):
    """Output, new statistics, and gradients by x and the parameters."""

    def f(x, params, stats, mask):
        def loss(x, params):
            y, new = call(x, params, stats, mask)
            return (y * weights).sum(), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
        return y, new, grads

    return f


def ragged(shape, axis, kind):
    """Masks with unequal counts per device: some rows, whole shards, almost all."""
    rng = np.random.default_rng(5)
    mask = rng.random(shape) > 0.4
    per = shape[axis] // DEVICES
    place = [slice(None)] * len(shape)
    if kind == "empty_shard":
        place[axis] = slice(per, 2 * per)
        mask[tuple(place)] = False
    if kind == "one_shard":
        place[axis] = slice(per, None)
        mask[tuple(place)] = False
    return mask | (kind == "full")


@pytest.mark.parametrize(
    "name, mode",
    [(name, "shard_map") for name in SYNCED]
    + [(name, mode) for name in ("batch", "group") for mode in MODES[1:]],
)
def test_any_partition_equals_one_device(name, mode):
    row = SYNCED[name]
    p = problem(row, offset=3.0)
    weights, stats = p.cotangent, moved(row)
    one = jax.jit(value_and_grads(called(row), weights))
    call = value_and_grads(synced(mode, row, row.split), weights)
    many = call if mode == "pmap" else jax.jit(call)
    for kind in ("full", "some", "empty_shard", "one_shard"):
        mask = ragged(row.shape, row.split, kind)
        mask = mask[..., :1] if row.positions else mask
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=100),
            many(p.x, p.params, stats, mask),
            one(p.x, p.params, stats, mask),
        )


@pytest.mark.optimized
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_synchronized_variance_is_exact_far_from_zero(offset, masked):
    """From the first step on, when the running mean knows nothing yet."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(24, 5, 3)) + offset).astype(np.float32)
    mask = rng.random((24, 5, 1)) > 0.4 if masked else np.ones((24, 5, 1), bool)
    norm = jaxnorm.BatchNorm(momentum=0.0, axis_name="d")
    _, stats = jax.jit(
        jax.shard_map(
            lambda x, m: norm(x, {}, norm.init_stats((3,)), mask=m if masked else None),
            mesh=mesh(d=8),
            in_specs=P("d"),
            out_specs=(P("d"), P()),
        )
    )(x, mask)
    exact = x.astype(np.float64)
    valid = np.broadcast_to(mask, x.shape)
    mean = exact.mean((0, 1), where=valid)
    var = np.square(exact - mean).mean((0, 1), where=valid)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6, atol=1e-6)


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


class Layout(NamedTuple):
    """A mesh of 2 x 2 devices, and what of a norm's arrays is spread over it.

    The features are over "b", and another axis of the input over "a": the examples or,
    if there is space, the first axis of that.
    """

    kinds: tuple[jax.sharding.AxisType, ...]
    space: bool = False
    whole: bool = True  # or parameters and statistics are spread as the features

    @property
    def mesh(self):
        return jax.make_mesh((2, 2), ("a", "b"), axis_types=self.kinds)

    def of_input(self, row):
        rank, feature = len(row.shape), row.norm.axes(row.shape).feature[-1]
        spaces = self.space and rank > 2 and feature != 1 and row.shape[1] % 2 == 0
        return P(*({int(spaces): "a", feature: "b"}.get(a) for a in range(rank)))

    def of_state(self, row, shape):
        features = row.norm.axes(row.shape).feature_shape[-1:]
        fits = shape[-1:] == features and not self.whole
        return P(*[None] * (len(shape) - 1), "b") if fits else P()

    def place(self, row, p, stats) -> tuple[Any, ...]:
        """x, parameters, statistics, mask and cotangent."""

        def put(v, spec):
            return jax.device_put(v, NamedSharding(self.mesh, spec))

        spec = self.of_input(row)
        sizes = zip(spec, p.mask.shape, strict=True)
        mask = P(*(name if n > 1 else None for name, n in sizes))
        state = (p.params, stats)
        state = jax.tree.map(lambda v: put(v, self.of_state(row, np.shape(v))), state)
        return put(p.x, spec), *state, put(p.mask, mask), put(p.cotangent, spec)


LAYOUTS = {
    "automatic": Layout((AUTO, AUTO)),
    "explicit": Layout((EXPLICIT, EXPLICIT), whole=False),
    "mixed": Layout((EXPLICIT, AUTO), space=True),
}
# Within a norm, explicit axes are automatic: these stand for the others there.
IN_ALL_LAYOUTS = (
    *("batch", "layer", "rms_space", "group", "instance", "ghost_ragged", "online"),
    *("virtual", "domain", "range", "iter", "switchable"),
)


def step(row):
    """The row's norm, by the batch or by running statistics, and its gradients."""

    def f(flag, x, params, stats, mask, cotangent):
        how = {"use_running_average": flag} if row.norm.has_stats else {}

        def apply(x, params):
            return row.norm(x, params, stats, mask=mask, **how, **row.inputs(x))

        y, pull, new = jax.vjp(apply, x, params, has_aux=True)
        return y, new, *pull(cotangent)

    return f


def shardings(tree):
    return jax.tree.map(lambda v: jax.typeof(v).sharding, tree)


@pytest.mark.parametrize("name", NORMS)
def test_sharded_arrays_need_nothing(name):
    """On every kind of mesh, in training and evaluation, with masks and gradients; what
    is explicitly sharded, stays so."""
    row = NORMS[name]
    p, stats, f = problem(row), moved(row), jax.jit(step(row))
    flags = [np.bool_(v) for v in ([False, True] if row.norm.has_stats else [False])]
    one = [f(v, p.x, p.params, stats, p.mask, p.cotangent) for v in flags]
    for kind in LAYOUTS if name in IN_ALL_LAYOUTS else ["explicit"]:
        layout = LAYOUTS[kind]
        given = layout.place(row, p, stats)
        with jax.set_mesh(layout.mesh):
            many = [f(v, *given) for v in flags]
        close = functools.partial(assert_close, summed=p.x.size, size=30)
        jax.tree.map(close, many, one)
        x, params, stats_, _, _ = shardings(given)
        for v in many:
            assert shardings(v) == (x, stats_, x, params)


def test_explicit_axes_without_jit():
    row, layout = NORMS["batch"], LAYOUTS["explicit"]
    p, stats = problem(row), moved(row)
    one = everything("batch", p.x, p.params, stats, p.mask, p.cotangent)[:2]
    x, params, stats, mask, _ = layout.place(row, p, stats)
    with jax.set_mesh(layout.mesh):
        many = row.norm(x, params, stats, mask=mask)
    close = functools.partial(assert_close, summed=p.x.size, size=30)
    jax.tree.map(close, many, one)
    assert shardings(many) == shardings((x, stats))


def test_shard_map_over_some_explicit_axes():
    """Devices along one axis are named, those along the other hold the features."""
    row, layout = NORMS["batch"], LAYOUTS["explicit"]
    p, stats = problem(row), moved(row)
    one = everything("batch", p.x, p.params, stats, p.mask, p.cotangent)
    given = layout.place(row, p, stats)
    norm = changed(row.norm, axis_name="a")

    @jax.jit
    def f(x, params, stats, mask, cotangent):
        mapped = jax.shard_map(
            lambda x, params, mask: norm(x, params, stats, mask=mask),
            in_specs=(P("a"), P(), P("a")),
            out_specs=(P("a"), P()),
            axis_names={"a"},
        )
        y, pull, new = jax.vjp(
            lambda x, params: mapped(x, params, mask), x, params, has_aux=True
        )
        return y, new, *pull(cotangent)

    with jax.set_mesh(layout.mesh):
        many = f(*given)
    close = functools.partial(assert_close, summed=p.x.size, size=30)
    jax.tree.map(close, many, one)


def test_arrays_may_be_spread_in_ways_that_do_not_fit():
    """Parameters over the axis that the batch is over, statistics over none, and a mask
    that every device has."""
    row, layout = NORMS["batch"], LAYOUTS["explicit"]
    p, stats = problem(row), moved(row)
    mask = p.mask[:, :1, :1, :1]
    one = everything("batch", p.x, p.params, stats, mask, p.cotangent)
    x, _, _, _, cotangent = layout.place(row, p, stats)
    params = jax.device_put(p.params, NamedSharding(layout.mesh, P("a")))
    with jax.set_mesh(layout.mesh):
        many = everything("batch", x, params, stats, mask, cotangent)
    close = functools.partial(assert_close, summed=p.x.size, size=30)
    jax.tree.map(close, many, one)
    assert shardings(many[3]) == shardings(params)


def test_functions_are_called_on_axes_as_they_were():
    """The layer before a cross-iteration norm, with a kernel that is sharded."""
    rng = np.random.default_rng(0)
    inputs, kernel = (rng.normal(size=s).astype(np.float32) for s in ((8, 4), (4, 6)))
    norm = jaxnorm.CrossIterationBatchNorm(window=2, kernel_shape=kernel.shape)
    stats = norm.init_stats((6,))
    seen = []

    @jax.jit
    def f(inputs, kernel):
        def layer(kernel):
            seen.append(jax.typeof(kernel).sharding.spec)
            return inputs @ kernel

        return norm(layer(kernel), {}, stats, kernel=kernel, layer=layer)

    one = f(inputs, kernel)
    grid = LAYOUTS["explicit"].mesh
    with jax.set_mesh(grid):
        many = f(
            jax.device_put(inputs, NamedSharding(grid, P("a"))),
            jax.device_put(kernel, NamedSharding(grid, P(None, "b"))),
        )
    jax.tree.map(functools.partial(assert_close, summed=8, size=30), many, one)
    assert seen[-2:] == [P(None, "b")] * 2


def spread_like(grid, tree, features):
    """`tree` with the arrays whose last axis is the features' spread as these."""

    def put(v):
        fits = np.shape(v)[-1:] == (features,)
        spec = P(*[None] * (np.ndim(v) - 1), "b") if fits else P()
        return jax.device_put(v, NamedSharding(grid, spec))

    return jax.tree.map(put, tree)


def standardized(x, mask):
    state = jaxnorm.Standardizer.init(8).update(x, mask=mask).update(2 * x)
    state = state.update(x, mask=mask, weights=abs(x), decay=0.5)
    return state, state.apply(x, mask=mask, clip=2), state.invert(x)


def accumulated(x, mask):
    norm = jaxnorm.BatchNorm()
    stats = jaxnorm.models.accumulate(norm.init_stats((8,)))
    for scale in (1, 2):
        _, stats = norm(scale * x, {}, stats, mask=mask)
    return jaxnorm.models.commit(stats, momentum=0.5)


def of_kernels(x, mask):
    scale = jnp.abs(x).max((0, 1)) + 1
    spectral = jaxnorm.spectral_norm(x, scale)
    return jaxnorm.weight_norm(x, scale), jaxnorm.weight_standardize(x), spectral


def directly(x, mask):
    y, m = jaxnorm.positional_norm(x, mask=mask)
    moments = jaxnorm.batch_norm(x, jaxnorm.init_stats(8), use_running_average=False)
    return y, m, moments


@pytest.mark.parametrize("f", [standardized, accumulated, of_kernels, directly])
def test_functions_on_explicit_axes(f):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 8)).astype(np.float32)
    mask = rng.random((4, 6, 1)) > 0.3
    one = jax.jit(f)(x, mask)
    grid = LAYOUTS["explicit"].mesh
    with jax.set_mesh(grid):
        x = jax.device_put(x, NamedSharding(grid, P("a", None, "b")))
        many = jax.jit(f)(x, jax.device_put(mask, NamedSharding(grid, P())))
    jax.tree.map(functools.partial(assert_close, summed=x.size, size=30), many, one)


LINEN = {
    "BatchNorm": jaxnorm.linen.BatchNorm(use_running_average=False),
    "LayerNorm": jaxnorm.linen.LayerNorm(),
    "GroupNorm": jaxnorm.linen.GroupNorm(num_groups=1),
    "Norm": jaxnorm.linen.Norm(jaxnorm.BatchRenorm(), use_running_average=False),
    "WeightNorm": jaxnorm.linen.WeightNorm(linen.Dense(8)),
    "WeightStandardization": jaxnorm.linen.WeightStandardization(linen.Dense(8)),
    "SpectralNorm": jaxnorm.linen.SpectralNorm(linen.Dense(8)),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_on_explicit_axes(name):
    layer = LINEN[name]
    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    flag = {"update_stats": True} if name == "SpectralNorm" else {}
    variables = layer.init(jax.random.key(0), x, **flag)

    @jax.jit
    def f(variables, x):
        def loss(params, x):
            given = variables | {"params": params}
            y, new = layer.apply(given, x, **flag, mutable=["batch_stats"])
            return (y**3).sum(), (y, new)

        params = variables.get("params", {})
        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    check_on_explicit_axes(f, variables, x)


NNX = {
    "BatchNorm": lambda rngs: jaxnorm.nnx.BatchNorm(8, rngs=rngs),
    "LayerNorm": lambda rngs: jaxnorm.nnx.LayerNorm(8, rngs=rngs),
    "GroupNorm": lambda rngs: jaxnorm.nnx.GroupNorm(8, num_groups=1, rngs=rngs),
    "Norm": lambda rngs: jaxnorm.nnx.Norm(jaxnorm.BatchRenorm(), 8),
    "WeightNorm": lambda rngs: jaxnorm.nnx.WeightNorm(
        nnx.Linear(8, 8, rngs=rngs), rngs=rngs
    ),
    "SpectralNorm": lambda rngs: jaxnorm.nnx.SpectralNorm(
        nnx.Linear(8, 8, rngs=rngs), rngs=rngs
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_on_explicit_axes(name):
    x = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
    graph, params, rest = nnx.split(NNX[name](nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def f(variables, x):
        def loss(params, x):
            # New variables, as those from outside may not be written to.
            layer = nnx.merge(graph, params, jax.tree.map(lambda v: v, variables[1]))
            y = layer(x)
            return (y**3).sum(), (y, nnx.split(layer, nnx.Param, ...)[2])

        return jax.grad(loss, (0, 1), has_aux=True)(variables[0], x)

    check_on_explicit_axes(f, (params, rest), x)


def check_on_explicit_axes(f, variables, x):
    one = f(variables, x)
    grid = LAYOUTS["explicit"].mesh
    with jax.set_mesh(grid):
        variables = spread_like(grid, variables, 8)
        x = jax.device_put(x, NamedSharding(grid, P("a", None, "b")))
        many = f(variables, x)
    jax.tree.map(functools.partial(assert_close, summed=x.size, size=30), many, one)


GROUPS = ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0], [1, 2, 3]])


@pytest.mark.parametrize(
    "mode, groups",
    [("shard_map", g) for g in GROUPS] + [(m, GROUPS[-1]) for m in MODES[1:]],
)
def test_groups_of_devices(mode, groups):
    """Each group is a batch of its own; gradients too, masks with unequal counts."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(DEVICES, 4, 3)), jnp.float32)
    mask = rng.random((DEVICES, 4, 3)) > 0.3
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    name = ("a", "b") if mode == "two_names" else "d"
    norm = jaxnorm.BatchNorm(axis_name=name, axis_index_groups=groups)
    stats = norm.init_stats((3,))

    def one(x, mask):
        y, new = norm(x, {}, stats, mask=mask)
        return y, new

    if mode == "pmap":
        mapped = jax.pmap(one, "d", devices=jax.devices()[:DEVICES])
    elif mode == "vmap":
        mapped = jax.vmap(one, axis_name="d")
    else:
        mapped = jax.shard_map(
            lambda x, m: jax.tree.map(lambda v: v[None], one(x[0], m[0])),
            mesh=mesh(**(GRID if mode == "two_names" else {"d": DEVICES})),
            in_specs=P(name),
            out_specs=P(name),
            check_vma=mode != "shard_map_unchecked",
        )

    def loss(x, call):
        y, new = call(x, mask)
        return (y * weights).sum(), (y, new)

    grad = functools.partial(jax.grad(loss, has_aux=True), call=mapped)
    dx, (y, new) = (grad if mode == "pmap" else jax.jit(grad))(x)
    local = jaxnorm.BatchNorm()
    for group in map(np.array, groups):

        def alone(x, group=group):
            y, new = local(x.reshape(-1, 3), {}, stats, mask=mask[group].reshape(-1, 3))
            y = y.reshape(x.shape)
            return (y * weights[group]).sum(), (y, new)

        dx_alone, (y_alone, new_alone) = jax.jit(jax.grad(alone, has_aux=True))(
            x[group]
        )
        assert_close(y[group], y_alone, summed=16, size=10)
        assert_close(dx[group], dx_alone, summed=16, size=30)
        for k, v in new.items():
            for i in group:
                assert_close(v[i], new_alone[k], summed=16)


def test_nested_axes():
    """vmap for an ensemble around shard_map for its data, and names within names."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 3)), jnp.float32)
    norm = jaxnorm.BatchNorm(axis_name="d")
    stats = norm.init_stats((3,))
    sharded = jax.shard_map(
        lambda x: norm(x, {}, stats),
        mesh=mesh(d=4),
        in_specs=P("d"),
        out_specs=(P("d"), P()),
    )
    y, new = jax.jit(jax.vmap(sharded))(x)
    for i in range(2):
        plain = jaxnorm.BatchNorm()(x[i], {}, stats)
        jax.tree.map(
            functools.partial(assert_close, summed=8), (y[i], _at(new, i)), plain
        )
    inner = jaxnorm.BatchNorm(axis_name=("outer", "inner"))
    grid = x.reshape(2, 4, 2, 3)
    y, _ = jax.vmap(
        jax.vmap(lambda x: inner(x, {}, stats), axis_name="inner"), axis_name="outer"
    )(grid)
    plain = jaxnorm.BatchNorm()(x.reshape(-1, 3), {}, stats)[0]
    assert_close(y.reshape(-1, 3), plain, summed=16)


def _at(tree, i):
    return jax.tree.map(lambda v: v[i], tree)


LOCAL = [
    "layer",
    "rms",
    "group",
    "instance",
    "ghost",
    "dynamic_tanh",
    "act",
    "divisive",
    "scale",
]


@pytest.mark.parametrize("name", LOCAL)
def test_local_statistics_in_shard_map(name):
    """No name, no communication: masks and gradients in shard_map with check_vma."""
    row = NORMS[name]
    p = problem(row)

    def one(x, params, mask):
        return row.norm(x, params, p.stats, mask=mask)[0]

    many = jax.shard_map(
        one, mesh=mesh(d=4), in_specs=(P("d"), P(), P("d")), out_specs=P("d")
    )
    grads = (
        jax.jit(jax.grad(lambda *a, f=f: (f(*a, p.mask) * p.cotangent).sum(), (0, 1)))
        for f in (many, one)
    )
    actual, desired = (g(p.x, p.params) for g in grads)
    close = functools.partial(assert_close, summed=p.x.size, size=100)
    jax.tree.map(close, actual, desired)


def test_features_split_over_devices():
    """Layer norm of rows whose features are sharded, parameters with them."""
    row = NORMS["layer"]
    p = problem(row, (8, 12))
    weights = p.cotangent
    norm = changed(row.norm, axis_name="d")
    cut = P(None, "d")
    call = jax.shard_map(
        lambda x, params: norm(x, params, {})[0],
        mesh=mesh(d=4),
        in_specs=(cut, P("d")),
        out_specs=cut,
    )
    many, one = (
        jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1)))(
            p.x, p.params
        )
        for f in (call, lambda x, params: row.norm(x, params, {})[0])
    )
    jax.tree.map(functools.partial(assert_close, summed=96, size=10), many, one)


def test_virtual_batches_are_groups_of_devices():
    """Ghost batches of n rows on one device, as many devices of n rows each."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    ghost = jaxnorm.GhostBatchNorm(size=4)
    stats = ghost.init_stats((3,))
    y, new = ghost(x, {}, stats)
    for count in (1, 2, 4):
        spread_ghost = jaxnorm.GhostBatchNorm(size=4, axis_name="d")
        y_many, new_many = jax.jit(
            jax.shard_map(
                lambda x, g=spread_ghost: g(x, {}, stats),
                mesh=mesh(d=count),
                in_specs=P("d"),
                out_specs=(P("d"), P()),
            )
        )(x)
        jax.tree.map(
            functools.partial(assert_close, summed=16), (y_many, new_many), (y, new)
        )


def collectives(text):
    """The collectives of a compiled program, by name."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= .*? ({names})(?:-start)?\(", text)


def test_aligned_virtual_batches_communicate_nothing():
    """Under jit, with examples sharded: no word between devices for the output."""
    ghost = jaxnorm.GhostBatchNorm(size=4)
    stats = ghost.init_stats((3,))
    sharding = NamedSharding(mesh(d=4), P("d"))
    x = jax.device_put(jnp.ones((16, 5, 3)), sharding)
    y_only = jax.jit(lambda x: ghost(x, {}, stats)[0])
    grad = jax.jit(jax.grad(lambda x: (ghost(x, {}, stats)[0] ** 3).sum()))
    for f in (y_only, grad):
        text = str(f.lower(x).compile().as_text())
        # On a CPU, devices agree on whether to sum about a pivot: one boolean.
        numbers = [
            v for v in re.findall(r"= (\S+) all-reduce\(", text) if v != "pred[]"
        ]
        assert numbers == []
        assert set(collectives(text)) <= {"all-reduce"}
        assert f(x).sharding.is_equivalent_to(sharding, 3)


@pytest.mark.parametrize(
    "name, check_vma, masked",
    [("batch", v, m) for v in (True, False) for m in (True, False)]
    + [("layer_space", True, False), ("rms_space", False, True), ("group", True, True)]
    + [(n, True, False) for n in SYNCED if n not in MOMENTS],
)
def test_one_collective_forward_and_one_backward(name, check_vma, masked):
    row = SYNCED[name]
    norm = changed(row.norm, axis_name="d")
    p = problem(row)
    assert row.split is not None
    spec = P(*[None] * row.split, "d")
    features = row.split in row.norm.axes(row.shape).feature
    assert not features
    shard = functools.partial(jax.shard_map, mesh=mesh(d=4), check_vma=check_vma)
    mask = p.mask if masked else None
    mask_spec = spec if masked else P()

    def local(x, params, mask):
        return norm(x, params, p.stats, mask=mask, **row.inputs(x))

    forward = jax.jit(
        shard(local, in_specs=(spec, P(), mask_spec), out_specs=(spec, P()))
    )
    text = forward.lower(p.x, p.params, mask).compile().as_text()
    found = collectives(text)
    # XLA may join two that a method needs.
    assert set(found) == {"all-reduce"} and len(found) <= row.collectives

    def pulled_back(x, params, mask, ct):
        _, vjp = jax.vjp(lambda x: local(x, params, mask)[0], x)
        return vjp(ct)[0]

    both = jax.jit(
        shard(pulled_back, in_specs=(spec, P(), mask_spec, spec), out_specs=spec)
    )
    text = both.lower(p.x, p.params, mask, p.x).compile().as_text()
    assert len(collectives(text)) <= 2 * row.collectives


def test_gradients_of_the_parameters_ride_along():
    """With check_vma the collective of the backward pass carries them too."""
    row = SYNCED["batch"]
    norm = changed(row.norm, axis_name="d")
    p = problem(row)

    def loss(x, params):
        y, _ = norm(x, params, p.stats)
        return jax.lax.psum((y**3).sum(), "d")

    grad = jax.jit(
        jax.grad(
            jax.shard_map(loss, mesh=mesh(d=4), in_specs=(P("d"), P()), out_specs=P()),
            argnums=(0, 1),
        )
    )
    program = grad.lower(p.x, p.params)
    assert len(collectives(program.compile().as_text())) == 2
    # As written, before XLA combines any: the statistics, and both sums of the
    # backward pass, with which scale and bias have their gradients.
    assert str(program.as_text()).count("stablehlo.all_reduce") == 2


@pytest.mark.optimized
def test_very_many_statistics_take_two_small_collectives(monkeypatch):
    monkeypatch.setattr(devices, "MAX_SLOT_BYTES", 0)
    row = SYNCED["batch"]
    p = problem(row, offset=1e4)
    norm = changed(row.norm, axis_name="d", momentum=0.0)
    many = jax.jit(
        jax.shard_map(
            lambda x, mask: norm(x, p.params, p.stats, mask=mask),
            mesh=mesh(d=4),
            in_specs=P("d"),
            out_specs=(P("d"), P()),
        )
    )
    found = collectives(many.lower(p.x, p.mask).compile().as_text())
    assert found == ["all-reduce"] * 2
    y, stats = many(p.x, p.mask)
    plain = changed(row.norm, momentum=0.0)(p.x, p.params, p.stats, mask=p.mask)
    np.testing.assert_allclose(stats["var"], plain[1]["var"], rtol=1e-5)
    assert_close(y, plain[0], summed=p.x.size, size=100)


def test_sizes_add_up_past_the_integers_of_float32():
    n = 2**24 + 1
    m = jax.vmap(
        lambda size: jaxnorm.sync(
            jaxnorm.Moments(jnp.ones(1), jnp.ones(1), size[None]), "d"
        ),
        axis_name="d",
    )(jnp.full(8, n, jnp.int32))
    np.testing.assert_array_equal(m.size, 8 * n)


@pytest.mark.parametrize("name", SYNCED)
def test_an_unbound_name_raises(name):
    row = SYNCED[name]
    norm = changed(row.norm, axis_name="data")
    p = problem(row)
    inputs = row.inputs(p.x)
    message = r"axis_name='data' is not bound here \(bound axes: none\)"
    for call in (jax.jit(norm), *([norm] if name == "batch" else [])):
        with pytest.raises(ValueError, match=message):
            call(p.x, p.params, p.stats, **inputs)
    with pytest.raises(ValueError, match=r"'data' is not bound .*\(bound axes: 'd'\)"):
        jax.vmap(lambda x: norm(x, p.params, p.stats, **inputs), axis_name="d")(
            p.x[None]
        )
    with_state = functools.partial(norm, use_running_average=True)
    for good in (with_state, norm.without_devices())[not norm.has_stats :]:
        jax.eval_shape(lambda x, g=good: g(x, p.params, p.stats, **inputs), p.x)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]]])
def test_groups_that_are_no_partition_raise(groups):
    stats = jaxnorm.init_stats(3)
    message = "must hold each index of axis_name.* exactly once"
    with pytest.raises(ValueError, match=message):
        norm = jaxnorm.BatchNorm(axis_name="d", axis_index_groups=groups)
        jax.vmap(lambda x: norm(x, {}, stats), axis_name="d")(jnp.ones((4, 2, 3)))


def test_one_value_per_variance_counts_all_devices():
    norm = jaxnorm.BatchNorm(axis_name="d")
    stats = norm.init_stats((3,))
    x = jnp.ones((4, 1, 3))
    jax.vmap(lambda x: norm(x, {}, stats), axis_name="d")(x)
    alone = changed(norm, axis_index_groups=[[0], [1, 2, 3]])
    for bad, inputs in ((norm, x[:1]), (alone, x)):
        with pytest.raises(ValueError, match="one single value"):
            jax.vmap(lambda x, n=bad: n(x, {}, stats), axis_name="d")(inputs)


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_no_copy_of_the_input_between_devices(name, kind):
    """Under jit, x stays where it is: nothing of its size is communicated."""
    row, layout = RUNNING[name], LAYOUTS[kind]
    p = problem(row)
    x, params, stats, _, cotangent = layout.place(row, p, p.stats)
    with jax.set_mesh(layout.mesh):
        f = jax.jit(functools.partial(step(row), False))
        text = f.lower(x, params, stats, None, cotangent).compile().as_text()
    assert set(collectives(text)) <= {"all-reduce"}


@pytest.mark.parametrize("groups", [None, ((0, 3), (1, 2))])
@pytest.mark.parametrize("name", SYNCED)
def test_gradients_reach_across_a_mapped_axis_that_is_gone(name, groups):
    """A derivative of what was traced before knows the axes of a vmap no more."""
    if groups and name not in ("batch", "group", "renorm", "moving_average"):
        pytest.skip("groups meet devices in the same functions")
    row = SYNCED[name]
    p = problem(row)
    names = {"axis_name": "b", "axis_index_groups": groups}
    norm = changed(row.norm, **names)
    pieces = shards(p.x, row.split, DEVICES if groups else 2)

    def f(pieces):
        def call(x):
            return norm(x, p.params, p.stats, **row.inputs(x))[0]

        return (jax.vmap(call, axis_name="b")(pieces) ** 3).sum()

    # The plain one last: it leaves rules behind that were traced where the axis is.
    ways = (jax.jit(f), jax.checkpoint(f), f)
    *others, exact = (jax.jit(jax.grad(way))(pieces) for way in ways)
    assert np.abs(exact).max() > 0
    for other in others:
        assert_close(other, exact, summed=p.x.size, size=np.abs(exact).max())


def test_gradients_by_what_a_mapped_axis_that_is_gone_does_not_map():
    """Devices that hold the same array, and each a cotangent of its own."""
    rng = np.random.default_rng(0)
    x, cotangents = rng.normal(size=(6, 3)), rng.normal(size=(4, 6, 3))
    norm = jaxnorm.BatchNorm(axis_name="b")
    stats = norm.init_stats((3,))

    @jax.jit
    def f(x, cotangents):
        def call(cotangent):
            return (norm(x, {}, stats)[0] * cotangent).sum()

        return jax.vmap(call, axis_name="b")(cotangents).sum()

    found = jax.grad(f)(*(v.astype(np.float32) for v in (x, cotangents)))
    dy, deviation = cotangents.sum(0), np.sqrt(x.var(0) + norm.epsilon)
    y = (x - x.mean(0)) / deviation
    exact = (dy - dy.mean(0) - y * (dy * y).mean(0)) / deviation
    assert_close(found, exact, summed=x.size, size=np.abs(exact).max())
