"""Statistics over many devices equal those of one, in every way to spread a batch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from norms import MOMENTS, NORMS, RUNNING, SYNCED, assert_close, changed, moved, problem

import jaxnorm
from jaxnorm import devices

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
@pytest.mark.usefixtures("quick_compilation")
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


@pytest.mark.parametrize(
    "name, explicit",
    [(n, False) for n in MOMENTS] + [(n, True) for n in ("batch", "layer")],
)
@pytest.mark.usefixtures("quick_compilation")
def test_sharded_inputs_under_jit_need_nothing(name, explicit):
    row = NORMS[name]
    p = problem(row)
    weights = p.cotangent
    plain = called(row)
    f = jax.jit(value_and_grads(plain, weights))
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    grid = jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))
    for mask in (np.ones(row.shape, bool), p.mask):
        one = f(p.x, p.params, p.stats, mask)
        with jax.set_mesh(grid):
            place = functools.partial(
                jax.device_put, device=NamedSharding(grid, P("d"))
            )
            whole = NamedSharding(grid, P())
            args = place(p.x), *jax.device_put((p.params, p.stats), whole), place(mask)
            g = jax.jit(value_and_grads(plain, place(weights)))
            many = g(*args)
        assert many[0].sharding.is_equivalent_to(place(p.x).sharding, p.x.ndim)
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=10), many, one
        )


GROUPS = ([[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0], [1, 2, 3]])


@pytest.mark.parametrize(
    "mode, groups",
    [("shard_map", g) for g in GROUPS] + [(m, GROUPS[-1]) for m in MODES[1:]],
)
@pytest.mark.usefixtures("quick_compilation")
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


@pytest.mark.usefixtures("quick_compilation")
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
    "divisive",
    "scale",
]


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.usefixtures("quick_compilation")
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


@pytest.mark.usefixtures("quick_compilation")
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


@pytest.mark.usefixtures("quick_compilation")
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
    "name",
    ["ghost_ragged", "online", "virtual", "domain", "range", "iter", "switchable"],
)
@pytest.mark.usefixtures("quick_compilation")
def test_sharded_inputs_give_the_same_under_jit(name):
    row = NORMS[name]
    p, stats, call = problem(row), moved(row), jax.jit(called(row))
    one = call(p.x, p.params, stats, p.mask)
    place = functools.partial(
        jax.device_put, device=NamedSharding(mesh(d=DEVICES), P("d"))
    )
    many = call(place(p.x), p.params, stats, place(p.mask))
    jax.tree.map(functools.partial(assert_close, summed=p.x.size, size=30), many, one)


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
@pytest.mark.usefixtures("quick_compilation")
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
    for good in (with_state, norm.local())[not norm.has_stats :]:
        jax.eval_shape(lambda x, g=good: g(x, p.params, p.stats, **inputs), p.x)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1], [2, 4]]])
def test_groups_that_are_no_partition_raise(groups):
    stats = jaxnorm.init_stats(3)
    message = "must hold each index of axis_name.* exactly once"
    with pytest.raises(ValueError, match=message):
        norm = jaxnorm.BatchNorm(axis_name="d", axis_index_groups=groups)
        jax.vmap(lambda x: norm(x, {}, stats), axis_name="d")(jnp.ones((4, 2, 3)))


@pytest.mark.usefixtures("quick_compilation")
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
def test_no_copy_of_the_input_between_devices(name):
    """Under jit, x stays where it is: nothing of its size is communicated."""
    row = RUNNING[name]
    p = problem(row)
    grid = mesh(d=4)
    x = jax.device_put(p.x, NamedSharding(grid, P("d")))
    text = jax.jit(row.norm).lower(x, p.params, p.stats).compile().as_text()
    assert set(collectives(text)) <= {"all-reduce"}
