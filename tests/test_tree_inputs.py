"""Trees of inputs: for each array what a Standardizer of its own does."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from norms import assert_close
from test_inputs import (
    FAR,
    assert_moments,
    assert_weighted,
    data,
    over_devices,
    pointers,
)

from jaxnorm import Standardizer, TreeStandardizer, _samples


class Pair(NamedTuple):
    first: Any
    second: Any


SHAPES = {"image": (12, 2, 3, 4), "pair": Pair((12, 4), (12,)), "seconds": (12, 1)}
AXES = {"image": -1, "pair": Pair(-1, ()), "seconds": -1}


def observed() -> dict[str, Any]:
    """Images, vectors, a number for each example, and times in seconds since 1970."""
    seconds = 1.7e9 + 10 * np.random.default_rng(0).normal(size=(12, 1))
    first, second = data(12, 4, offset=5), data(12, offset=-3)
    return {
        "image": data(12, 2, 3, 4, **FAR),
        "pair": Pair(first, second),
        "seconds": seconds,
    }


X = observed()
INIT = TreeStandardizer.init(
    {"image": 4, "pair": Pair(4, ()), "seconds": (1,)}, axis=AXES
)


def assert_tree(stats: TreeStandardizer, rows: Any = slice(None), weights: Any = 1.0):
    """Moments of each array of `X`, whose examples have these weights."""
    weights = np.broadcast_to(weights, 12)[rows]
    parts = stats.parts
    for part, x in (
        (parts["image"], X["image"][rows]),
        (parts["pair"].first, X["pair"].first[rows]),
        (parts["seconds"], X["seconds"][rows]),
    ):
        flat = x.reshape(-1, x.shape[-1])
        each = np.repeat(weights, len(flat) // len(x))[:, None]
        assert_weighted(part, flat, each)
    single = jax.tree.map(lambda v: v[None], parts["pair"].second)
    assert_weighted(single, X["pair"].second[rows][:, None], weights[:, None])


def cut(rows: slice) -> dict[str, Any]:
    return jax.tree.map(lambda v: v[rows], X)


def test_each_array_has_its_moments():
    assert_tree(TreeStandardizer.fit(X, axis=AXES))
    batches = [slice(0, 5), slice(5, 6), slice(6, 12)]
    streamed = INIT
    for rows in batches:
        streamed = streamed.update(cut(rows))
    assert_tree(streamed)
    parts = [TreeStandardizer.fit(cut(rows), axis=AXES) for rows in batches]
    assert_tree(functools.reduce(TreeStandardizer.merge, parts))


def test_there_and_back_by_each_part():
    stats = TreeStandardizer.fit(X, axis=AXES)
    y = jax.jit(lambda s, x: s.apply(x, clip=1.5))(stats, X)
    assert jax.tree.structure(y) == jax.tree.structure(X)
    images = stats.parts["image"].apply(X["image"], clip=1.5)
    np.testing.assert_allclose(y["image"], images, rtol=1e-6)
    assert abs(y["pair"].first).max() == 1.5
    half = stats.apply(X, dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    back = stats.invert(stats.apply(X))
    for v, x in zip(jax.tree.leaves(back), jax.tree.leaves(X), strict=True):
        assert v.dtype == np.float32
        np.testing.assert_allclose(v, x, rtol=1e-6, atol=1e-4)
    narrow = stats.invert(half, dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}


def test_examples_are_masked_and_weighted_in_all_arrays():
    rng = np.random.default_rng(1)
    mask, weights = rng.random(12) > 0.4, rng.random(12)
    junk = jax.tree.map(lambda v: np.where(v == v[np.argmin(mask)], np.nan, v), X)
    stats = TreeStandardizer.fit(junk, axis=AXES, mask=mask, weights=weights)
    assert_tree(stats, weights=mask * weights)
    y = stats.apply(junk, mask=mask)
    for v in jax.tree.leaves(y):
        np.testing.assert_array_equal(np.asarray(v)[~mask], 0)
    assert_tree(INIT.update(X, weights=weights), weights=weights)


def test_each_array_may_have_a_mask_of_its_own():
    masks = jax.tree.map(lambda v: np.arange(12).reshape(-1, *[1] * (v.ndim - 1)), X)
    masks = masks | {"image": masks["image"] % 2, "seconds": masks["seconds"] > 3}
    masks["pair"] = Pair(None, np.ones(12))
    stats = TreeStandardizer.fit(X, axis=AXES, mask=masks)
    assert stats.parts["pair"].first.size[0] == 12
    odd = X["image"][1::2].reshape(-1, 4)
    assert_moments(stats.parts["image"], odd)
    assert_moments(stats.parts["seconds"], X["seconds"][4:])


def test_a_tree_of_nothing():
    fit = functools.partial(TreeStandardizer.fit, axis_name="data")
    empty = jax.vmap(lambda _: fit({}), axis_name="data", axis_size=2)({})
    assert empty.apply({}) == empty.update({}).parts == {}


def test_decay_is_of_all_arrays():
    stats = INIT.update(cut(slice(0, 7))).update(cut(slice(7, 12)), decay=0.25)
    assert_tree(stats, weights=np.repeat([0.25, 1], [7, 5]))


def test_arrays_too_large_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr(_samples, "MAX_SIZE", 5)
    assert_tree(TreeStandardizer.fit(X, axis=AXES))


@pytest.mark.parametrize("vma", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_devices_share_a_whole_tree_by_one_collective(large, vma, monkeypatch):
    monkeypatch.setattr(_samples, "MAX_SIZE", 50 if large else 2**31 - 1)
    weights = np.arange(12, dtype=np.float32) + 1
    x = X | {"seconds": X["seconds"].astype(np.int32)}

    def update(s, x, w):
        return s.update(x, weights=w, axis_name="data")

    monkeypatch.setitem(X, "seconds", x["seconds"])
    stats, program = over_devices(update, INIT, x, weights, vma=vma)
    assert program == ["all-reduce"]
    assert_tree(stats, weights=weights)


def test_dtypes_stay_those_of_each_array_where_devices_share_them():
    with jax.enable_x64(True):
        x = {"a": data(8, 3), "b": data(8, 2).astype(np.float64)}
        fit = functools.partial(TreeStandardizer.fit, axis_name="data")
        stats, program = over_devices(lambda _, x: fit(x), 0.0, x)
    assert program == ["all-reduce"]
    assert stats.parts["a"].mean.dtype == np.float32
    assert stats.parts["b"].mean.dtype == np.float64
    assert_moments(stats.parts["a"], x["a"])


def test_a_carry_of_scan_that_is_donated():
    x = {"a": data(20, 5, 3, offset=9), "b": data(20, 5, 2)}

    def run(s, x):
        return jax.lax.scan(lambda s, x: (s.update(x), None), s, x)[0]

    start = TreeStandardizer.init({"a": 3, "b": 2})
    assert len(set(pointers(start))) == len(pointers(start)) == 14
    stats = jax.jit(run, donate_argnums=0)(start, x)
    assert_moments(stats.parts["a"], x["a"].reshape(-1, 3))


def test_flax_writes_and_reads_it():
    stats = TreeStandardizer.fit(X, axis=AXES)
    loaded = serialization.from_bytes(INIT, serialization.to_bytes(stats))
    assert jax.tree.structure(loaded) == jax.tree.structure(stats)
    for old, new in zip(jax.tree.leaves(stats), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(old, new)


class Policy(nnx.Module):
    def __init__(self, rngs):
        start = TreeStandardizer.init({"image": 4, "speed": 2})
        self.inputs = nnx.Variable(start)
        self.dense = nnx.Linear(2, 1, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.inputs.apply(x)["speed"])


def test_orbax_restores_it_with_a_flax_nnx_model(tmp_path):
    x = {"image": X["image"], "speed": data(12, 2, offset=5)}
    model = Policy(nnx.Rngs(0))
    model.inputs.set_value(model.inputs.get_value().update(x))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Policy(nnx.Rngs(0))))
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "model", shapes)
    again = nnx.merge(graph, state)
    np.testing.assert_array_equal(again(x), model(x))


def test_axes_for_all_arrays_or_one_for_each():
    """Two integers for two arrays may be either; written out, or in another container
    than the arrays, they are one of them."""
    pair = data(4, 2, 3, offset=5), data(4, 2, 3, offset=-3)
    message = r"axis=\(1, 2\) may be .* \[0\], \[1\]: write \(\(1,\), \(2,\)\) for each"
    with pytest.raises(ValueError, match=message):
        TreeStandardizer.fit(pair, axis=(1, 2))
    each = TreeStandardizer.fit(pair, axis=((1,), (2,)))
    both = TreeStandardizer.fit([*pair], axis=(1, 2))
    for stats, reduced in ((each, ((0, 2), (0, 1))), (both, (0, 0))):
        for part, x, others in zip(stats.parts, pair, reduced, strict=True):
            assert_close(part.mean, x.mean(others, dtype=np.float64), size=5)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: INIT.apply({"image": X["image"]}),
            ValueError,
            r"x must be a tree with \['image'\], \['pair'\].first, .*: pass the same",
        ),
        (lambda: INIT.update(3.0), ValueError, "x must be a tree with"),
        (lambda: INIT.invert([]), ValueError, "y must be a tree with"),
        (
            lambda: TreeStandardizer.fit(X, axis={"image": -1}),
            ValueError,
            "axis must be a tree with",
        ),
        (
            lambda: TreeStandardizer.fit(X, axis=AXES, mask=[True] * 12),
            ValueError,
            "mask must be a tree with",
        ),
        (
            lambda: INIT.update(X | {"seconds": np.ones((12, 2))}),
            ValueError,
            r"(?s)holds features of shape \(2,\).*of the array at \['seconds'\]",
        ),
        (
            lambda: TreeStandardizer.fit({"a": np.ones((4, 2))}, mask=np.ones(3)),
            ValueError,
            r"(?s)mask of shape \(3, 1\) does not broadcast.*array at \['a'\]",
        ),
        (
            lambda: TreeStandardizer.init({"a": 2.5}),
            TypeError,
            r"(?s)feature_shape must .*array at \['a'\]",
        ),
        (
            lambda: INIT.merge(cast(Any, Standardizer.init(3))),
            TypeError,
            "other must be a jaxnorm.TreeStandardizer",
        ),
        (
            lambda: INIT.merge(TreeStandardizer.init({"image": 4})),
            ValueError,
            "other must be a tree with",
        ),
        (lambda: INIT.update(X, decay=2), ValueError, "decay must be from 0 to 1"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
