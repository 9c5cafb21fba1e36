"""Norms of the graphs of a batch: as PyTorch Geometric publishes them, with padding,
graphs that are spread over devices, and what a graph may not do to another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_methods as methods
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from norms import assert_close, changed

import jaxnorm

pytestmark = pytest.mark.usefixtures("strict_dtypes")

GRAPH = np.array([2, 0, 0, 4, 2, 0, 0, 2, 4, 0, 1, 2])  # 1 is a lone node, 3 is empty
COUNT = 5
NODES, FEATURES = len(GRAPH), 6
KINDS = {
    "layer": jaxnorm.SegmentNorm(num_segments=COUNT),
    "instance": jaxnorm.SegmentNorm(num_segments=COUNT, num_groups=None, group_size=1),
    "group": jaxnorm.SegmentNorm(num_segments=COUNT, num_groups=2),
    "graph": jaxnorm.GraphNorm(num_segments=COUNT),
    "pair": jaxnorm.PairNorm(num_segments=COUNT),
    "pair_individual": jaxnorm.PairNorm(num_segments=COUNT, scale_individually=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def nodes(seed=0, offset=0.0, dtype: Any = np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(NODES, FEATURES)) + offset).astype(dtype)


def params_of(norm, seed=0):
    rng = np.random.default_rng(seed)
    like = norm.init_params((FEATURES,))
    return {k: rng.uniform(0.5, 2, v.shape).astype(v.dtype) for k, v in like.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(norm, x, params, ids, cotangent, mask=None):
    """Output and gradients."""

    def f(x, params):
        return norm(x, params, {}, segment_ids=ids, mask=mask)[0]

    y, pull = jax.vjp(f, x, params)
    return y, *pull(cotangent.astype(y.dtype))


# The formulas of torch_geometric.nn, with its sums over `batch`.


def scatter(values, batch):
    total = np.zeros((COUNT, *values.shape[1:]))
    np.add.at(total, batch, values)
    return total


def degree(batch):
    return np.maximum(np.bincount(batch, minlength=COUNT), 1)[:, None]


def published_instance(x, batch, eps=1e-5):
    norm = degree(batch)
    out = x - (scatter(x, batch) / norm)[batch]
    var = scatter(out * out, batch) / norm
    return out / np.sqrt(var + eps)[batch]


def published_layer(x, batch, eps=1e-5):
    norm = degree(batch) * x.shape[-1]
    out = x - (scatter(x, batch).sum(-1, keepdims=True) / norm)[batch]
    var = scatter(out * out, batch).sum(-1, keepdims=True) / norm
    return out / np.sqrt(var + eps)[batch]


def published_graph(x, batch, mean_scale, eps=1e-5):
    norm = degree(batch)
    out = x - (scatter(x, batch) / norm)[batch] * mean_scale
    var = scatter(out**2, batch) / norm
    return out / np.sqrt(var + eps)[batch]


def published_pair(x, batch, scale=1.0, eps=1e-5):
    norm = degree(batch)
    out = x - (scatter(x, batch) / norm)[batch]
    square = scatter((out**2).sum(-1, keepdims=True), batch) / norm
    return scale * out / np.sqrt(eps + square)[batch]


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_what_pytorch_geometric_publishes(offset):
    with jax.enable_x64(True):
        x = nodes(offset=offset, dtype=np.float64)
        share = params_of(KINDS["graph"])["mean_scale"].astype(np.float64)
        given = {"segment_ids": GRAPH, "num_segments": COUNT}
        instance = {"num_groups": None, "group_size": 1}

        @jax.jit
        def ours(x):
            return (
                jaxnorm.segment_norm(x, **given),
                jaxnorm.segment_norm(x, **instance, **given),
                jaxnorm.graph_norm(x, mean_scale=share, **given),
                jaxnorm.graph_norm(x, **given),
                jaxnorm.pair_norm(x, scale=2.0, **given),
            )

        published = (
            published_layer(x, GRAPH),
            published_instance(x, GRAPH),
            published_graph(x, GRAPH, share),
            published_graph(x, GRAPH, 1.0),
            published_pair(x, GRAPH, 2.0),
        )
        for y, exact in zip(ours(x), published, strict=True):
            np.testing.assert_allclose(y, exact, rtol=1e-9, atol=1e-9)


def test_one_graph_is_group_layer_and_instance_norm():
    @jax.jit
    def both(x):
        whole, one = x[None], jnp.zeros(NODES, jnp.int32)
        ours = functools.partial(jaxnorm.segment_norm, x, segment_ids=one)
        return {
            "layer": (
                ours(num_segments=1),
                jaxnorm.group_norm(whole, num_groups=1, epsilon=1e-5),
            ),
            "group": (
                ours(num_segments=1, num_groups=3),
                jaxnorm.group_norm(whole, num_groups=3, epsilon=1e-5),
            ),
            "instance": (
                ours(num_segments=1, num_groups=None, group_size=1),
                jaxnorm.instance_norm(whole, epsilon=1e-5),
            ),
        }

    for ours, expected in both(nodes()).values():
        assert_close(ours, expected[0], summed=NODES * FEATURES)


@pytest.mark.parametrize(
    "kind, padding",
    [("graph", v) for v in (-7, COUNT, 99, "last", "mask")] + [(k, -1) for k in KINDS],
)
def test_padding_counts_for_nothing(kind, padding):
    """As nodes of no graph, a graph of their own, or by a mask; whatever they hold."""
    norm = KINDS[kind]
    x, params, cotangent = nodes(), params_of(norm), nodes(1)
    exact = run(norm, x, params, GRAPH, cotangent)
    rest = np.full((3, FEATURES), np.nan, np.float32)
    if padding == "last":
        norm, ids, rest = changed(norm, num_segments=COUNT + 1), COUNT, 0 * x[:3] + 7
    else:
        ids = 0 if padding == "mask" else padding
    more = np.concatenate([x, rest]), np.append(GRAPH, [ids] * 3)
    mask = np.arange(NODES + 3)[:, None] < NODES
    cotangent = np.concatenate([cotangent, np.zeros((3, FEATURES), np.float32)])
    y, dx, dparams = run(
        norm, more[0], params, more[1], cotangent, mask if padding == "mask" else None
    )
    close = functools.partial(assert_close, summed=x.size, size=10)
    jax.tree.map(close, (y[:NODES], dx[:NODES], dparams), exact)
    assert np.isfinite(y).all()
    if padding != "last":
        np.testing.assert_array_equal(y[NODES:], 0)
        np.testing.assert_array_equal(dx[NODES:], 0)


@every_kind
def test_no_number_of_segments_is_as_many_as_there_are_nodes(kind):
    norm = KINDS[kind]
    args = nodes(), params_of(norm), GRAPH, nodes(1)
    jax.tree.map(
        functools.partial(assert_close, summed=args[0].size),
        run(changed(norm, num_segments=None), *args),
        run(norm, *args),
    )


@every_kind
def test_what_is_not_finite_stays_in_its_graph(kind):
    norm = KINDS[kind]
    x, params = nodes(), params_of(norm)
    bad = x.copy()
    bad[3] = np.nan, np.inf, -np.inf, 1e30, np.nan, np.inf
    others = GRAPH != GRAPH[3]
    exact = run(norm, x, params, GRAPH, nodes(1))[:2]
    found = run(norm, bad, params, GRAPH, nodes(1))[:2]
    for v, w in zip(found, exact, strict=True):
        np.testing.assert_array_equal(v[others], w[others])
        assert np.isfinite(v[others]).all()


@every_kind
def test_a_lone_node_is_the_bias(kind):
    norm = KINDS[kind]
    params = params_of(norm) | {"mean_scale": np.ones(FEATURES, np.float32)}
    params = {k: v for k, v in params.items() if k in norm.param_names}
    y, dx, dparams = run(norm, nodes(offset=50), params, GRAPH, nodes(1))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((dx, dparams)))
    lone = GRAPH == 1
    if kind in ("instance", "graph", "pair", "pair_individual"):
        np.testing.assert_array_equal(y[lone][0], params.get("bias", 0 * y[0]))
    single = nodes()[:1]
    ids = np.zeros(1, int)
    if kind in ("instance", "graph", "pair", "pair_individual"):
        with pytest.raises(ValueError, match="would take each variance of one single"):
            norm(single, params, {}, segment_ids=ids)
    else:
        norm(single, params, {}, segment_ids=ids)


@pytest.mark.optimized
@pytest.mark.parametrize("share", [1.0, 1 - 2e-4, 0.9, 0.0, 1.1])
def test_graph_norm_is_exact_far_from_zero(share):
    """What is left of the mean is no difference of large numbers."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2000, 3)) + 1e4).astype(np.float32)
    ids = rng.integers(0, 4, 2000)
    params = {"mean_scale": np.full(3, share, np.float32)}
    norm = jaxnorm.GraphNorm(num_segments=4)
    y = jax.jit(lambda x: norm(x, params, {}, segment_ids=ids)[0])(x)
    exact, _ = methods.graph_norm(x, params, {}, num_segments=4, segment_ids=ids)
    assert_close(y, exact, summed=4, size=np.abs(exact).max())


@pytest.mark.parametrize("kind", ["group", "graph", "pair_individual"])
def test_second_derivatives(kind):
    norm = KINDS[kind]
    with jax.enable_x64(True):
        x, way = nodes(dtype=np.float64), nodes(1, dtype=np.float64)
        params = jax.tree.map(lambda v: v.astype(np.float64), params_of(norm))

        @jax.jit
        @jax.grad
        def slope(x):
            return (norm(x, params, {}, segment_ids=GRAPH)[0] ** 3).sum()

        @jax.jit
        def seconds(x):
            forward = jax.jvp(slope, (x,), (way,))[1]
            return forward, jax.grad(lambda x: (slope(x) * way).sum())(x)

        for second in seconds(x):
            numeric = (slope(x + 1e-6 * way) - slope(x - 1e-6 * way)) / 2e-6
            # The lone node is where the curvature is largest, by 1 / epsilon.
            scale = np.abs(numeric).max()
            np.testing.assert_allclose(second / scale, numeric / scale, atol=1e-6)


@every_kind
def test_only_x_and_the_tables_are_kept_for_the_backward_pass(kind):
    norm = KINDS[kind]
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((4096, 64), dtype)
        ids = np.arange(4096) % COUNT
        params = norm.init_params((64,))

        def f(x, params, ids=ids):
            return norm(x, params, {}, segment_ids=ids)[0]

        kept = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], x, params)
        size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(kept))
        # Beside x, an integer and a flag for each node.
        assert size <= 1.15 * x.size * x.dtype.itemsize, size


DEVICES = 4


def spread_ids():
    """The graphs of each node, with nodes of one graph on several devices."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, COUNT, 8 * DEVICES)
    ids[:8], ids[9] = 3, -1
    return ids


@pytest.mark.parametrize(
    "kind, mode",
    [(kind, "shard_map") for kind in KINDS] + [("graph", "vmap"), ("group", "jit")],
)
def test_graphs_that_are_spread_over_devices(kind, mode):
    norm = KINDS[kind]
    ids = spread_ids()
    rng = np.random.default_rng(0)
    x, cotangent = rng.normal(3, 1, (2, len(ids), FEATURES)).astype(np.float32)
    params = params_of(norm)
    exact = run(norm, x, params, ids, cotangent)

    def loss(norm, x, params, ids, cotangent):
        y = norm(x, params, {}, segment_ids=ids)[0]
        return (y * cotangent).sum(), y

    devices = Mesh(np.array(jax.devices()[:DEVICES]), ("d",))
    if mode == "jit":
        put = functools.partial(jax.device_put, device=NamedSharding(devices, P("d")))
        whole = functools.partial(loss, norm)
        x, ids, cotangent = map(put, (x, ids, cotangent))
    else:
        each = functools.partial(loss, changed(norm, axis_name="d"))

        def whole(x, params, ids, cotangent):
            if mode == "vmap":
                pieces = [
                    v.reshape(DEVICES, -1, *v.shape[1:]) for v in (x, ids, cotangent)
                ]
                mapped = jax.vmap(each, (0, None, 0, 0), axis_name="d")
                total, y = mapped(pieces[0], params, *pieces[1:])
                return total.sum(), y.reshape(x.shape)
            mapped = jax.shard_map(
                lambda *args: tuple(v if v.ndim else v[None] for v in each(*args)),
                mesh=devices,
                in_specs=(P("d"), P(), P("d"), P("d")),
                out_specs=P("d"),
            )
            total, y = mapped(x, params, ids, cotangent)
            return total.sum(), y

    grad = jax.jit(jax.grad(whole, (0, 1), has_aux=True))
    (dx, dparams), y = grad(x, params, ids, cotangent)
    close = functools.partial(assert_close, summed=x.size, size=100)
    jax.tree.map(close, (y, dx, dparams), exact)


@every_kind
def test_devices_must_agree_on_the_number_of_segments(kind):
    norm = changed(KINDS[kind], num_segments=None, axis_name="d")
    call = functools.partial(norm, params={}, stats={})
    with pytest.raises(ValueError, match="num_segments=None is the number of nodes"):
        jax.vmap(lambda x: call(x, segment_ids=GRAPH), axis_name="d")(nodes()[None])


@pytest.mark.parametrize(
    "ids, error",
    [
        (np.zeros(3, int), r"segment_ids must hold an integer for each of the \(12,\)"),
        (np.zeros((12, 1), int), "got int64 of shape|got int32 of shape"),
        (np.zeros(12, np.float32), r"got float32 of shape \(12,\)"),
    ],
)
def test_segment_ids_that_do_not_fit(ids, error):
    with pytest.raises(ValueError, match=error):
        jaxnorm.graph_norm(nodes(), segment_ids=ids)


@every_kind
def test_settings_that_do_not_fit(kind):
    for count in (0, -1):
        with pytest.raises(ValueError, match="num_segments must be at least 1, got"):
            changed(KINDS[kind], num_segments=count)
    axis = {"axis": 0}
    with pytest.raises(ValueError, match="names the leading axis"):
        changed(KINDS[kind], **axis)(nodes(), {}, {}, segment_ids=GRAPH)


def test_batch_norm_of_the_nodes_is_batch_norm_with_a_mask():
    real = np.arange(NODES)[:, None] < 9
    stats = jaxnorm.init_stats(FEATURES)
    train = functools.partial(jaxnorm.batch_norm, use_running_average=False)
    y, new = train(nodes(), stats, mask=real)
    exact, kept = train(nodes()[:9], stats)
    assert_close(y[:9], exact, summed=54)
    jax.tree.map(assert_close, new, kept)


@pytest.mark.optimized
def test_nodes_are_counted_past_the_integers_of_float32():
    from jaxnorm._axes import Axes
    from jaxnorm._segments import segment_moments

    n = 2**24 + 3
    axes = Axes.per_example((n, 1), -1)
    m = jax.jit(lambda x, ids: segment_moments(x, axes, ids, 1, None))(
        jnp.ones((n, 1), jnp.bfloat16), jnp.zeros(n, jnp.int32)
    )
    assert m.size == n and m.mean == 1 and m.var == 0 and m.residue == 0


@pytest.mark.optimized
def test_constants_are_zeros_in_a_segment_of_any_size():
    """Sums of a hundred thousand equal numbers are far from exact."""
    for value in (5144.123, -1e4 / 3, 0.1):
        x = jnp.full((100_000, 2), value, jnp.float32)
        ids = jnp.zeros(100_000, jnp.int32)
        for norm in (jaxnorm.segment_norm, jaxnorm.graph_norm):
            y = jax.jit(functools.partial(norm, num_segments=1))(x, segment_ids=ids)
            np.testing.assert_array_equal(y, 0)


def test_ids_past_32_bits_are_padding():
    x = np.array([[1.0], [3.0], [100.0]], np.float32)
    ids = np.array([0, 0, 2**32])
    y = jaxnorm.segment_norm(x, segment_ids=ids, num_segments=1)
    np.testing.assert_allclose(y, [[-1], [1], [0]], atol=1e-4)
