"""What every method keeps, row by row: values, state and gradients as its paper defines
them, masks, dtypes, transformations, memory, and both Flax APIs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from norms import (
    MOMENTS,
    NORMS,
    STATEFUL,
    assert_close,
    everything,
    forward,
    implied,
    initial_stats,
    moved,
    problem,
    tolerance,
)

from jaxnorm import linen as jl
from jaxnorm import nnx as jx

pytestmark = pytest.mark.usefixtures("strict_dtypes")
every_norm = pytest.mark.parametrize("name", NORMS)
OTHERS = [n for n in NORMS if n not in MOMENTS]
wide = functools.partial(jax.tree.map, lambda v: np.asarray(v, np.float64))


def in_float64(row, shape=None, seed=0):
    """A problem in float64, with integers left as they are."""
    p = problem(row, shape, dtype=jnp.float64, seed=seed)
    stats = {
        k: v if np.issubdtype(v.dtype, np.integer) else v.astype(np.float64)
        for k, v in moved(row, shape, seed).items()
    }
    return p._replace(params=wide(p.params), stats=stats, cotangent=wide(p.cotangent))


def assert_same(actual, desired, limit=1e-9):
    """Equal trees in float64, and finite."""
    assert actual.keys() == desired.keys()
    for k, v in actual.items():
        assert np.isfinite(v).all(), k
        np.testing.assert_allclose(v, desired[k], rtol=limit, atol=limit, err_msg=k)


def reference_gradients(row, p, mask):
    """Slopes of the reference along random directions, with what each is along."""
    names = list(p.params)
    held = row.held(p.x, p.stats, mask) if row.held else {}

    def f(x, *params):
        params = dict(zip(names, params, strict=True))
        inputs = row.inputs(x)
        return row.exact(x, params, p.stats, mask=mask, **inputs, **held)[0]

    rng = np.random.default_rng(1)
    args = (p.x, *p.params.values())
    for _ in range(2):
        ways = [rng.normal(size=np.shape(a)) for a in args]
        yield ways, (reference.jvp(f, args, ways, 1e-6) * p.cotangent).sum()


@every_norm
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_reference(name, masked):
    row = NORMS[name]
    with jax.enable_x64(True):
        for shape in (row.shape, *([] if masked else row.more_shapes)):
            p = in_float64(row, shape)
            mask = p.mask if masked else None
            y, new, dx, dparams = everything(
                name, p.x, p.params, p.stats, mask, p.cotangent
            )
            exact, exact_new = row.exact(
                p.x, p.params, p.stats, mask=mask, **row.inputs(p.x)
            )
            assert y.dtype == dx.dtype == jnp.float64 and y.shape == shape
            # The pivot and the pooling cost a few digits of the sixteen.
            assert_same({"y": y}, {"y": exact}, 1e-8)
            assert_same(new, exact_new, 1e-7)
            if row.backward is not None:
                assert_renewed(row, p, mask, dx, dparams)
                continue
            grads = (dx, *dparams.values())
            for ways, slope in reference_gradients(row, p, mask):
                ours = sum((g * w).sum() for g, w in zip(grads, ways, strict=True))
                np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-4)


def assert_renewed(row, p, mask, dx, dparams):
    """Gradients that the paper defines, and for controls what subtraction renews."""
    desired = row.backward(p.x, p.params, p.stats, p.cotangent, mask=mask)
    actual = {"x": dx} | {
        k if k in ("scale", "bias") else f"new_{k}": v
        if k in ("scale", "bias")
        else p.params[k] - v
        for k, v in dparams.items()
    }
    assert_same(actual, desired, 1e-8)


@every_norm
def test_gradients_in_half_precision_are_rounded_once(name):
    """Also where the cotangent has a large mean, of which nearly all cancels."""
    row = NORMS[name]
    p = problem(row, dtype=jnp.bfloat16)
    rng = np.random.default_rng(1)
    cotangent = (100 + rng.normal(size=row.shape)).astype(jnp.bfloat16)
    x, wide = p.x.astype(np.float32), cotangent.astype(np.float32)
    for mask in (None, p.mask) if name in ("batch", "layer", "renorm") else (None,):
        exact = np.asarray(everything(name, x, p.params, p.stats, mask, wide)[2])
        _, _, dx, _ = everything(name, p.x, p.params, p.stats, mask, cotangent)
        assert dx.dtype == jnp.bfloat16 and np.isfinite(exact).all()
        rounding = np.abs(exact.astype(jnp.bfloat16).astype(np.float32) - exact).max()
        assert np.abs(dx.astype(np.float32) - exact).max() <= 2 * rounding


CENTERED = [n for n, r in NORMS.items() if r.norm.center and r.constant]
CENTERED += ["online", "online_unscaled", "divisive"]


@pytest.mark.parametrize("name", CENTERED)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_are_exact_far_from_zero(name, masked):
    """At 10,000 deviations from 0, what rounds off the mean must not be lost."""
    row = NORMS[name]
    p = problem(row, offset=1e4)
    level = {k: np.float32(1e4 if "mean" in k else 0) for k in p.stats}
    stats = {k: (v + level[k]).astype(v.dtype) for k, v in moved(row).items()}
    mask, inputs = p.mask if masked else None, row.inputs(p.x)
    wide_x = np.asarray(p.x, np.float64)
    for flag in (False, True) if row.norm.has_stats else (False,):
        y, _ = forward(name, p.x, p.params, stats, mask, flag)
        settings = {"use_running_average": True} if flag else {}
        exact, _ = row.exact(wide_x, p.params, stats, mask=mask, **inputs, **settings)
        assert_close(y, exact, summed=4, size=np.abs(exact).max())


@every_norm
def test_squares_that_overflow_give_no_plausible_number(name):
    row = NORMS[name]
    p = problem(row)
    for scale in (1e19, 3e19):
        x = (p.x * np.float32(scale)).astype(np.float32)
        inputs = row.inputs(x)
        y = np.asarray(forward(name, x, p.params, p.stats, None, False)[0])
        with np.errstate(invalid="ignore"):
            exact, _ = row.exact(np.asarray(x, np.float64), p.params, p.stats, **inputs)
        finite = np.isfinite(y)
        np.testing.assert_allclose(y[finite], exact[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in STATEFUL if n in OTHERS])
def test_evaluation_matches_the_reference(name):
    row = NORMS[name]
    with jax.enable_x64(True):
        p = in_float64(row)
        for flag in (False, True):
            given = {"mask": p.mask, "use_running_average": flag, **row.inputs(p.x)}
            exact, exact_new = row.exact(p.x, p.params, p.stats, **given)
            y, new = forward(name, p.x, p.params, p.stats, p.mask, flag)
            assert_same({"y": y, **new}, {"y": exact, **exact_new}, 1e-7)
        jax.tree.map(np.testing.assert_array_equal, new, p.stats)
        # One example is enough, whatever the method does in training.
        if not row.inputs(p.x):
            evaluate = functools.partial(row.norm, use_running_average=True)
            one, new = jax.jit(evaluate)(p.x[:1], p.params, p.stats)
            whole = row.exact(p.x[:1], p.params, p.stats, use_running_average=True)
            assert_same({"y": one}, {"y": whole[0]}, 1e-8)
            jax.tree.map(np.testing.assert_array_equal, new, p.stats)


@pytest.mark.parametrize("name", OTHERS)
def test_half_precision_rounds_only_the_result(name):
    row, dtype = NORMS[name], jnp.float16
    p = problem(row, dtype=dtype)
    stats = moved(row)

    @jax.jit
    def call(x):
        return row.norm(x, p.params, stats, **row.inputs(x))

    # Squares of the latter are beyond float16.
    for x in (p.x, (p.x * 300).astype(np.float16)):
        y, new = call(x)
        assert y.dtype == dtype
        assert all(v.dtype == stats[k].dtype for k, v in new.items())
        exact, _ = row.exact(
            np.asarray(x, np.float64), p.params, stats, **row.inputs(x)
        )
        size = max(1, np.abs(exact).max())
        limit = float(jnp.finfo(dtype).eps) + tolerance(jnp.float32, x.size)
        assert np.isfinite(np.asarray(y, np.float32)).all()
        np.testing.assert_allclose(
            np.asarray(y, np.float64), exact, rtol=limit, atol=limit * size
        )


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_under_a_mask_changes_nothing(name):
    row = NORMS[name]
    p, stats = problem(row), moved(row)
    mask = np.broadcast_to(p.mask, row.shape)
    run = functools.partial(everything, name)
    clean = run(p.x, p.params, stats, p.mask, p.cotangent)
    for poison in (np.nan, np.inf, 1e30) if row.poison else (7.0,):
        x = np.where(mask, p.x, np.float32(poison))
        poisoned = run(x, p.params, stats, p.mask, p.cotangent)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(poisoned))
        jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    np.testing.assert_array_equal(np.asarray(clean[0])[~mask], 0)
    np.testing.assert_array_equal(np.asarray(clean[2])[~mask], 0)

    nothing = np.full(row.shape, np.nan, np.float32), np.zeros_like(p.mask)
    y, new, dx, dparams = run(nothing[0], p.params, stats, nothing[1], p.cotangent)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(dx, 0)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(dparams))
    jax.tree.map(np.testing.assert_array_equal, new, stats)

    gone = p.mask.copy()
    gone[2] = False
    y, new, *_ = run(p.x, p.params, stats, gone, p.cotangent)
    exact, exact_new = row.exact(p.x, p.params, stats, mask=gone, **row.inputs(p.x))
    assert_close(y, exact, summed=p.x.size, size=100)
    for k, v in new.items():
        assert_close(v, exact_new[k], summed=p.x.size, size=30)


@pytest.mark.parametrize("name", OTHERS)
def test_masks_of_whole_examples(name):
    row = NORMS[name]
    p, stats = problem(row), moved(row)
    short = np.arange(8).reshape(-1, *[1] * (len(row.shape) - 1)) % 3 != 1
    full = np.broadcast_to(short, p.mask.shape)
    y, new, *_ = everything(name, p.x, p.params, stats, full, p.cotangent)

    @jax.jit
    def call(x):
        return row.norm(x, p.params, stats, mask=short, **row.inputs(x))

    close = functools.partial(assert_close, summed=p.x.size, size=30)
    jax.tree.map(close, call(p.x), (y, new))


def test_a_mask_of_single_features_does_not_fit_a_whitening():
    row = NORMS["iter"]
    p = problem(row)
    for shape in (row.shape, row.shape[-1:]):
        with pytest.raises(ValueError, match="takes masks of whole positions"):
            row.norm(p.x, p.params, p.stats, mask=np.ones(shape, bool))


@pytest.mark.parametrize("name", OTHERS)
def test_forward_mode_and_vmap_agree_with_reverse_mode(name):
    row = NORMS[name]
    with jax.enable_x64(True):
        p, q = in_float64(row), in_float64(row, seed=1)

        def f(x, params):
            return row.norm(x, params, p.stats, **row.inputs(x))[0]

        def pulled(x, params, ct):
            return jax.vjp(f, x, params)[1](ct)

        @jax.jit
        def both(cts):
            along = jax.jvp(f, (p.x, p.params), (q.x, q.params))[1]
            return along, jax.vmap(pulled, (None, None, 0))(p.x, p.params, cts)

        if row.backward is not None:
            with pytest.raises(TypeError, match="can't apply forward-mode"):
                both(p.cotangent[None])
            return
        along, (dx, dparams) = both(np.stack([p.cotangent, q.cotangent]))
        for i, ct in enumerate((p.cotangent, q.cotangent)):
            pairs = [(dx, q.x), *((dparams[k], v) for k, v in q.params.items())]
            slope = sum((g[i] * w).sum() for g, w in pairs)
            np.testing.assert_allclose((along * ct).sum(), slope, rtol=1e-9, atol=1e-9)


OWN_RULES = (
    "recurrent",
    "online",
    "moving_average",
    "power",
    "domain",
    "segment",
    "graph",
    "range",
    "iter",
)


@pytest.mark.parametrize("name", OWN_RULES)
def test_vmap_is_a_loop(name):
    row = NORMS[name]
    p = problem(row)

    def call(x, stats):
        return row.norm(x, p.params, stats, **row.inputs(x))

    xs = np.stack([p.x, 2 * p.x + 1])
    stats = [moved(row, seed=s) for s in range(2)]
    stacked = jax.tree.map(lambda *v: np.stack(v), *stats) if stats[0] else {}
    mapped = jax.jit(jax.vmap(call))(xs, stacked)
    for i in range(2):
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=10),
            jax.tree.map(lambda v, i=i: v[i], mapped),
            jax.jit(call)(xs[i], stats[i]),
        )


@pytest.mark.parametrize("name", [n for n in STATEFUL if n in OTHERS])
def test_the_state_keeps_its_structure_and_skips_bad_batches(name):
    row = NORMS[name]
    stats = moved(row)

    def step(stats, x):
        y, stats = row.norm(x, {}, stats, **row.inputs(x))
        return stats, y

    xs = np.stack([problem(row, seed=s).x for s in range(3)])
    bad = xs.copy()
    bad[1, -1] = np.nan
    scan = jax.jit(lambda xs: jax.lax.scan(step, stats, xs))
    last, _ = scan(xs)
    kept, _ = scan(bad)
    exact = skipped = stats
    for i, x in enumerate(xs):
        exact = row.exact(x, implied(row), exact, **row.inputs(x))[1]
        if i != 1:
            inputs = row.inputs(x)
            skipped = row.exact(x, implied(row), skipped, **inputs)[1]
    for k, v in stats.items():
        assert last[k].dtype == v.dtype and last[k].shape == v.shape
        assert_close(last[k], exact[k], summed=xs.size, size=30)
        assert_close(kept[k], skipped[k], summed=xs.size, size=30)


@pytest.mark.parametrize("name", [n for n in OTHERS if NORMS[n].constant])
def test_constant_input_gives_zeros_and_finite_gradients(name):
    row = NORMS[name]
    p = problem(row)
    params = {k: v for k, v in p.params.items() if k != "bias"}
    params |= {k: np.zeros_like(v) for k, v in p.params.items() if k == "bias"}
    for value in (0.0, 5144.123, -1e4 / 3):
        x = np.full(row.shape, value, np.float32)
        y, _, dx, _ = everything(name, x, params, p.stats, None, p.cotangent)
        if row.norm.center:
            np.testing.assert_array_equal(y, 0)
        assert np.isfinite(y).all() and np.isfinite(dx).all()


@pytest.mark.parametrize("name", [n for n in OTHERS if not NORMS[n].constant])
def test_zeros_have_finite_gradients(name):
    row = NORMS[name]
    p = problem(row)
    for value in (0.0, 3.0):
        x = np.full(row.shape, value, np.float32)
        y, new, *grads = everything(name, x, p.params, p.stats, None, p.cotangent)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves((y, new, grads)))


@pytest.mark.parametrize("name", OTHERS)
def test_scale_and_bias_per_example(name):
    row = NORMS[name]
    p, stats = problem(row), moved(row)
    rng = np.random.default_rng(1)
    if name == "domain_affine" or not {"scale", "bias"} & set(p.params):
        return
    params = dict(p.params)
    for k in {"scale", "bias"} & set(p.params):
        shape = (row.shape[0], *np.shape(p.params[k]))
        params[k] = rng.normal(size=shape).astype(np.float32)

    @jax.jit
    def call(x):
        return row.norm(x, params, stats, **row.inputs(x))[0]

    if name == "scale":
        exact = row.exact(p.x, {}, stats)[0]
        exact = exact * params["scale"].reshape(-1, 1, 1, 1)
    else:
        exact = row.exact(p.x, params, stats, **row.inputs(p.x))[0]
    assert_close(call(p.x), exact, summed=p.x.size, size=10)


KEPT = {"layer_zero_centered", "rms_zero_centered", "positional", "scale"}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_the_input_is_kept_for_the_backward_pass(name, dtype):
    row = NORMS[name]
    shape = (64, 1024) if name in KEPT else (8, 16, 16, row.shape[-1])
    p = problem(row, shape, dtype=dtype)

    def f(x, params):
        return row.norm(x, params, p.stats, **row.inputs(x))[0]

    residuals = jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], p.x, p.params)
    size = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(residuals))
    per_statistic = 40 * 4 * p.x[:, 0].size if name not in KEPT else 0
    assert size <= 1.05 * p.x.nbytes + per_statistic, f"{size / p.x.nbytes:.2f} times"


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_and_statistics_fit_the_features(name):
    row = NORMS[name]
    p = problem(row)
    y, new = jax.eval_shape(
        lambda x: row.norm(x, p.params, p.stats, **row.inputs(x)), p.x
    )
    assert y.shape == row.shape
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {
        k: (v.shape, v.dtype) for k, v in p.stats.items()
    }


@pytest.mark.parametrize("name", OTHERS)
def test_both_flax_apis(name):
    """The generic modules: the same numbers, variables named as the norm names them."""
    row = NORMS[name]
    p = problem(row)
    features = row.norm.axes(row.shape).feature_shape
    stats = initial_stats(row.norm, features)
    params = jax.tree.map(np.asarray, row.norm.init_params(features))
    flags = {"use_running_average": False}
    with jax.numpy_dtype_promotion("standard"):
        module = jl.Norm(row.norm)
        variables = jax.jit(
            lambda x: module.init(jax.random.key(0), x, False, **row.inputs(x))
        )(p.x)
        held = variables.get("params", {}), variables.get("batch_stats", {})
        jax.tree.map(np.testing.assert_array_equal, held, (params, stats))
        shape = features[0] if len(features) == 1 else features
        graph, state = nnx.split(jx.Norm(row.norm, shape))

        @jax.jit
        def each(x, state):
            inputs = row.inputs(x)
            pure = row.norm(x, params, stats, **flags, **inputs)
            linen, changes = module.apply(
                variables, x, False, **inputs, mutable=["batch_stats"]
            )
            model = nnx.merge(graph, state)
            out = model(x, **inputs)
            new = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return pure, (linen, changes.get("batch_stats", {})), (out, new)

        pure, *modules = each(p.x, state)
    for found in modules:
        jax.tree.map(
            functools.partial(assert_close, summed=p.x.size, size=10), found, pure
        )


@every_norm
def test_unknown_parameters_and_inputs_are_refused(name):
    row = NORMS[name]
    p = problem(row)
    kind = type(row.norm).__name__
    inputs = row.inputs(p.x)
    with pytest.raises(ValueError, match=rf"{kind} has no parameter \['gamma'\]"):
        row.norm(p.x, {"gamma": 1.0}, p.stats, **inputs)
    with pytest.raises(TypeError, match=rf"{kind} is called with the inputs"):
        row.norm(p.x, {}, p.stats, noise=1, **inputs)
    if inputs:
        with pytest.raises(TypeError, match=rf"{kind} is called with the inputs"):
            row.norm(p.x, {}, p.stats)


@pytest.mark.parametrize("name", [n for n in STATEFUL if n in OTHERS])
def test_statistics_that_do_not_fit_are_refused(name):
    row = NORMS[name]
    p = problem(row)

    def call(stats, flag=False):
        flags = {"use_running_average": flag}
        jax.eval_shape(lambda x: row.norm(x, {}, stats, **flags, **row.inputs(x)), p.x)

    for flag in (False, True):
        with pytest.raises(ValueError, match="stats lacks"):
            call({}, flag)
    for k, v in p.stats.items():
        if v.ndim:
            wrong = p.stats | {k: np.ones((5, *v.shape), v.dtype)}
            with pytest.raises(ValueError, match=rf"stats\['{k}'\] has shape"):
                call(wrong)


@pytest.mark.parametrize(
    "kind", sorted({type(r.norm) for r in NORMS.values()}, key=str)
)
def test_methods_that_share_nothing_take_no_axis_name(kind):
    if kind.can_sync:
        kind(axis_name="d")
        return
    with pytest.raises(ValueError, match="shares nothing between devices"):
        kind(axis_name="d")
