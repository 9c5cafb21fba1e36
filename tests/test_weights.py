"""Weight standardization, weight norm and spectral norm against float64 NumPy.

The references are written from the papers and share no code with the package.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm

FUNCTIONS = ("weight_standardize", "weight_norm", "spectral_norm")

# One compilation for calls of the same shapes.
spectral = jax.jit(jaxnorm.spectral_norm, static_argnames="n_steps")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1.5, shape)


def along(value, shape, axes):
    """A value, or one per feature, where the features are the axes not in `axes`."""
    features = [n for a, n in enumerate(shape) if a not in axes]
    return np.expand_dims(np.broadcast_to(value, features), axes)


def standardized(kernel, axes, epsilon, gain=None, scaled=False):
    """Qiao et al. 2019, equations 3 and 4; scaled, Brock et al. 2021, equation 1."""
    mean = kernel.mean(axes, keepdims=True)
    var = ((kernel - mean) ** 2).mean(axes, keepdims=True)
    w = (kernel - mean) / np.sqrt(var + epsilon)
    if scaled:
        w = w / np.sqrt(np.prod([kernel.shape[a] for a in axes]))
    return w if gain is None else w * along(gain, kernel.shape, axes)


def normed(kernel, axes, epsilon, scale=None):
    """Salimans and Kingma 2016, equation 2."""
    w = kernel / np.sqrt((kernel**2).sum(axes, keepdims=True) + epsilon)
    return w if scale is None else w * along(scale, kernel.shape, axes)


def iterated(kernel, u, n_steps):
    """Miyato et al. 2018, algorithm 1: the vectors and the singular value."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    v = None
    for _ in range(n_steps):
        v = matrix @ u / np.linalg.norm(matrix @ u)
        u = v @ matrix / np.linalg.norm(v @ matrix)
    return u, v, v @ matrix @ u


# Shape of the kernel, axes that lead into one output, shape of the others.
SHAPES = [
    ((5, 4), (0,), (4,)),
    ((3, 3, 2, 4), (0, 1, 2), (4,)),
    ((3, 2, 4), (0, 2), (2,)),
    ((5, 2, 3), (0,), (2, 3)),
    ((4, 3), (0, 1), ()),
    ((2, 4, 3), (1,), (2, 3)),
]

shapes = pytest.mark.parametrize(("shape", "axes", "features"), SHAPES, ids=str)


def features_of(shape, axes):
    return tuple(a for a in range(len(shape)) if a not in axes)


def variants(shape, axes, features):
    """(function of a kernel and its scale, reference) for each function and setting."""
    kept = features_of(shape, axes) or None
    for scaled in (False, True):
        yield (
            lambda k, g, scaled=scaled: jaxnorm.weight_standardize(
                k, g, feature_axes=kept, epsilon=1e-2, scaled=scaled
            ),
            lambda k, g, scaled=scaled: standardized(k, axes, 1e-2, g, scaled),
        )
    yield (
        lambda k, g: jaxnorm.weight_norm(k, g, feature_axes=kept, epsilon=1e-2),
        lambda k, g: normed(k, axes, 1e-2, g),
    )


def assert_close(got, want, tolerance=1e-5):
    """Equal shapes, finite, and equal up to `tolerance`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all() and np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("strict_dtypes")
@shapes
def test_values(shape, axes, features):
    """With and without a gain, and with one for all features."""
    kernel = random(*shape)
    gains = (None, random(*features, seed=1), np.float64(1.7))
    functions, references = zip(*variants(shape, axes, features), strict=True)
    # Compiled as one, for the time that it takes.
    found = jax.jit(lambda k, gains: [f(k, g) for g in gains for f in functions])(
        *jax.tree.map(jnp.float32, (kernel, gains))
    )
    want = [reference(kernel, g) for g in gains for reference in references]
    for got, w in zip(found, want, strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, w)


def test_defaults():
    """All axes but the last lead into one output; epsilon as documented."""
    kernel = random(2, 3, 4) * 1e-3
    want = standardized(kernel, (0, 1), 1e-6)
    assert_close(first("weight_standardize")(jnp.float32(kernel)), want)
    want = normed(kernel * 1e-3, (0, 1), 1e-12)
    assert_close(first("weight_norm")(jnp.float32(kernel * 1e-3)), want)


def test_negative_axes():
    kernel = jnp.float32(random(3, 2, 4))
    want = standardized(random(3, 2, 4), (0, 2), 1e-6)
    assert_close(first("weight_standardize", feature_axes=(-2,))(kernel), want)
    want = normed(random(3, 2, 4), (0, 2), 1e-12)
    assert_close(first("weight_norm", feature_axes=(-2,))(kernel), want)


def slopes(f, x, step=1e-5):
    """The derivative of a scalar function of an array, by central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = step
        grad[i] = (f(x + e) - f(x - e)) / (2 * step)
    return grad


@pytest.mark.parametrize(("shape", "axes", "features"), SHAPES[1:5:2], ids=str)
def test_gradients(shape, axes, features):
    """Reverse and forward mode, by the kernel and the gain, in float64."""
    kernel, gain = random(*shape), random(*features, seed=1)
    weights, towards = np.cos(np.arange(kernel.size)).reshape(shape), np.sin(kernel)

    def derivatives(function, k, g):
        def loss(k, g):
            return (weights * function(k, g)).sum()

        return *jax.grad(loss, (0, 1))(k, g), jax.jvp(loss, (k, g), (towards, g))[1]

    functions, references = zip(*variants(shape, axes, features), strict=True)
    with jax.enable_x64(True):
        found = jax.jit(lambda k, g: [derivatives(f, k, g) for f in functions])
        found = found(kernel, gain)
    for reference, derived in zip(references, found, strict=True):
        by_kernel, by_gain, tangent = map(np.asarray, derived)

        def loss(k, g, reference=reference):
            return (weights * reference(k, g)).sum()

        assert_close(by_kernel, slopes(functools.partial(loss, g=gain), kernel), 1e-8)
        assert_close(by_gain, slopes(functools.partial(loss, kernel), gain), 1e-8)
        total = (by_kernel * towards).sum() + (by_gain * gain).sum()
        assert_close(tangent, total, 1e-8)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 2, 4)], ids=str)
def test_spectral_norm_values(shape, n_steps):
    kernel, u = random(*shape), random(shape[-1], seed=1)
    want_u, _, want_sigma = iterated(kernel, u, n_steps)
    for given in (u, u[None]):
        w, new, sigma = spectral(
            jnp.float32(kernel), jnp.float32(given), n_steps=n_steps
        )
        assert_close(w, kernel / want_sigma)
        assert_close(new, want_u.reshape(given.shape))
        assert_close(sigma, want_sigma)


def test_spectral_norm_reaches_the_singular_value():
    """Over calls that pass u on, from below."""
    kernel = jnp.float32(random(6, 4))
    largest = np.linalg.svd(kernel, compute_uv=False)[0]
    w, u, last = kernel, jnp.ones(4), 0.0
    for _ in range(30):
        w, u, sigma = spectral(kernel, u)
        assert last - 1e-5 <= float(sigma) <= largest + 1e-5
        last = float(sigma)
    assert_close(np.linalg.svd(w, compute_uv=False)[0], 1)


def test_spectral_norm_gradients():
    """Those of kernel / (v @ matrix @ u) where u and v stay what they are."""
    kernel, u = random(3, 2, 4), random(4, seed=1)
    weights, towards = np.cos(np.arange(24.0)).reshape(3, 2, 4), np.sin(kernel)
    right, left, _ = iterated(kernel, u, 2)

    def reference(k):
        sigma = left @ k.reshape(6, 4) @ right
        return (weights * k / np.sqrt(sigma**2 + 1e-12)).sum() + 2 * sigma

    def loss(k, u):
        w, new, sigma = jaxnorm.spectral_norm(k, u, n_steps=2)
        return (weights * w).sum() + 2 * sigma + 3 * new.sum()

    @jax.jit
    def derivatives(k, u):
        return *jax.grad(loss, (0, 1))(k, u), jax.jvp(loss, (k, u), (towards, u))[1]

    with jax.enable_x64(True):
        by_kernel, by_u, tangent = map(np.asarray, derivatives(kernel, u))
    assert_close(by_kernel, slopes(reference, kernel), 1e-8)
    assert not np.any(by_u)
    assert_close(tangent, (by_kernel * towards).sum(), 1e-8)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-12, 1e-30])
def test_spectral_norm_of_small_kernels(size):
    """The vectors and the value do not depend on the size; the norm is never above 1.

    Flax adds epsilon to the squares of vectors as small as the kernel, so that a norm
    of 1e-6 comes out as 40.
    """
    kernel = random(6, 4)
    want_u, _, want_sigma = iterated(kernel, np.ones(4), 20)
    w, u, sigma = spectral(jnp.float32(kernel * size), jnp.ones(4), n_steps=20)
    assert_close(u, want_u)
    assert_close(sigma / size, want_sigma)
    relative = want_sigma * size / np.sqrt((want_sigma * size) ** 2 + 1e-12)
    assert_close(np.linalg.svd(w, compute_uv=False)[0], relative)


def test_spectral_norm_keeps_a_vector_that_it_cannot_improve():
    u = jnp.float32([0.6, 0.8])
    for bad in (0, jnp.nan, jnp.inf):
        _, new, _ = spectral(jnp.full((3, 2), bad, jnp.float32), u)
        assert_close(new, u)
    # What a kernel of 0 has left in a checkpoint of Flax counts as equal numbers.
    kernel = jnp.float32(random(3, 2))
    _, new, sigma = spectral(kernel, jnp.zeros(2))
    want, _, want_sigma = iterated(random(3, 2), np.ones(2), 1)
    assert_close(new, want)
    assert_close(sigma, want_sigma)
    # No estimate at all: the kernel stays as it is.
    kernel = jnp.float32([[1.0, 0.0], [2.0, 0.0]])
    w, _, sigma = spectral(kernel, jnp.float32([0.0, 1.0]))
    assert sigma == 0
    assert np.array_equal(w, kernel)


def of_kernel(name, **kwargs):
    """The function of that name, of a kernel alone."""
    if name != "spectral_norm":
        return functools.partial(getattr(jaxnorm, name), **kwargs)

    def w_of(kernel):
        u = jnp.ones(kernel.shape[-1], jnp.float32)
        return jaxnorm.spectral_norm(kernel, u, **kwargs)[0]

    return w_of


def first(name, **kwargs):
    """`of_kernel`, compiled."""
    return jax.jit(of_kernel(name, **kwargs))


names = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("epsilon", [None, 1e-3])
@pytest.mark.parametrize("kind", ["zero", "tiny", "constant", "fan-in of 1"])
@names
def test_degenerate_kernels_are_finite(name, kind, epsilon):
    """Values and gradients; what has no direction or deviation comes out as 0."""
    kernel = {
        "zero": jnp.zeros((5, 4)),
        "tiny": jnp.float32(random(5, 4) * 1e-30),
        "constant": jnp.full((5, 4), 3.7),
        "fan-in of 1": jnp.float32(random(1, 1, 1, 4)),
    }[kind]
    function = first(name, **({} if epsilon is None else {"epsilon": epsilon}))
    weights = jnp.cos(jnp.arange(float(kernel.size))).reshape(kernel.shape)
    w, grad = jax.jit(
        lambda k: (function(k), jax.grad(lambda k: (weights * function(k)).sum())(k))
    )(kernel)
    assert np.isfinite(w).all() and np.isfinite(grad).all()
    if kind == "zero":
        assert not np.any(w)
    elif kind == "tiny":
        assert np.abs(w).max() < 1e-20
    elif name == "weight_standardize":
        assert_close(w, np.zeros(kernel.shape))
        assert np.abs(w).max() < 1e-3


@pytest.mark.usefixtures("strict_dtypes")
@names
def test_half_precision_is_rounded_once(name):
    """Computed in float32: only the result is rounded to the dtype of the kernel."""
    kernel = jnp.asarray(random(16, 4) + 8, jnp.bfloat16)
    found = first(name)(kernel)
    wide = first(name)(kernel.astype(jnp.float32))
    assert found.dtype == kernel.dtype
    assert np.array_equal(found, wide.astype(kernel.dtype))
    gain = jnp.float32(random(4, seed=1))
    if name != "spectral_norm":
        found = jax.eval_shape(of_kernel(name, scale=gain), kernel)
        assert found.dtype == kernel.dtype
    by = jax.eval_shape(jax.grad(lambda k: first(name)(k).sum().astype("f4")), kernel)
    assert by.dtype == kernel.dtype


def test_weights_far_from_zero():
    kernel = (random(3, 3, 16, 8) + 1e4).astype(np.float32)
    w = jaxnorm.weight_standardize(kernel)
    exact = standardized(kernel.astype(np.float64), (0, 1, 2), 1e-6)
    np.testing.assert_allclose(w, exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("name", FUNCTIONS[:2])
def test_gradients_in_half_precision_are_rounded_once(name):
    kernel = random(3, 16, 8).astype(jnp.bfloat16)
    cotangent = (100 + random(3, 16, 8, seed=1)).astype(jnp.bfloat16)

    @jax.jit
    def gradient(kernel, cotangent):
        return jax.vjp(getattr(jaxnorm, name), kernel)[1](cotangent)[0]

    exact = gradient(*(v.astype(np.float32) for v in (kernel, cotangent)))
    error, rounding = (
        np.abs(v.astype(np.float32) - exact).max()
        for v in (gradient(kernel, cotangent), exact.astype(jnp.bfloat16))
    )
    assert 0 < error <= 2 * rounding


@names
def test_float64_and_integers(name):
    whole = np.arange(12).reshape(4, 3) ** 2
    with jax.enable_x64(True):
        found = first(name)(jnp.asarray(whole, jnp.float64))
        assert found.dtype == jnp.float64
    integer = first(name)(jnp.asarray(whole, jnp.int32))
    assert integer.dtype == jnp.float32
    assert_close(integer, found)


def test_the_state_of_spectral_norm_is_a_fixed_carry():
    """u keeps its shape and dtype over steps, whatever those of the kernel."""
    for kernel_dtype, u_dtype in (
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
    ):
        kernel = jnp.asarray(random(5, 4), kernel_dtype)

        def step(u, _, kernel=kernel):
            w, u, sigma = jaxnorm.spectral_norm(kernel, u)
            assert sigma.dtype == jnp.float32
            return u, w

        u, ws = jax.lax.scan(step, jnp.ones((1, 4), u_dtype), length=2)
        assert u.dtype == u_dtype and ws.dtype == kernel_dtype


@names
def test_vmap(name):
    kernels = jnp.float32(random(3, 5, 4))
    want = jnp.stack([first(name)(k) for k in kernels])
    assert_close(jax.jit(jax.vmap(of_kernel(name)))(kernels), want, 1e-6)


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=str)
@names
def test_sharded_kernels(name, spec):
    """Along explicit axes, in and across the sums."""
    kernel = jnp.float32(random(8, 4))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(kernel, jax.NamedSharding(mesh, spec))
        assert_close(first(name)(sharded), first(name)(kernel))
        if name == "spectral_norm":
            # Written to variables, the state must have the sharding that it had.
            u = spectral(sharded, jnp.ones((1, 4)))[1]
            assert jax.typeof(u).sharding.spec == P(None, None)


KERNEL = np.ones((3, 2, 4), np.float32)
U = np.ones(4, np.float32)
WRONG = [
    ("weight_standardize", (KERNEL[0, 0],), ValueError, r"shape \(4,\) has no axis"),
    (
        "weight_standardize",
        (KERNEL, np.ones((1, 4), np.float32)),
        ValueError,
        r"scale has shape \(1, 4\).* are \(4,\) \(axes \(2,\)\): pass",
    ),
    (
        "weight_norm",
        (KERNEL, np.ones((1, 4), np.float32)),
        ValueError,
        r"scale has shape \(1, 4\).* kernel of shape \(3, 2, 4\) are \(4,\)",
    ),
    ("weight_norm", (np.float32(1),), ValueError, "feature_axes=-1 is out of range"),
    ("weight_norm", (KERNEL, 1j * U), TypeError, "scale is complex64, but"),
    ("spectral_norm", (U, U), ValueError, r"kernel of shape \(4,\) is no matrix"),
    (
        "spectral_norm",
        (KERNEL, U[:3]),
        ValueError,
        r"u has shape \(3,\).* needs \(4,\) or \(1, 4\): draw",
    ),
    ("spectral_norm", (1j * KERNEL, U), TypeError, "real numbers, .* complex64"),
]


@pytest.mark.parametrize(("name", "args", "error", "message"), WRONG)
def test_errors(name, args, error, message):
    with pytest.raises(error, match=message):
        getattr(jaxnorm, name)(*args)


def test_errors_of_settings():
    for name in FUNCTIONS[:2]:
        with pytest.raises(
            ValueError, match="feature_axes=5 is out of range .* rank 3"
        ):
            getattr(jaxnorm, name)(KERNEL, feature_axes=5)
        with pytest.raises(TypeError, match="feature_axes must be an integer"):
            getattr(jaxnorm, name)(KERNEL, feature_axes=1e-5)
    for name in FUNCTIONS:
        with pytest.raises(ValueError, match="epsilon must not be negative"):
            first(name, epsilon=-1.0)(jnp.asarray(KERNEL))
    for n_steps, error in ((0, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"n_steps must be .*, got {n_steps}"):
            spectral(KERNEL, U, n_steps=n_steps)


@names
def test_functions_say_what_they_do(name):
    function = getattr(jaxnorm, name)
    module = inspect.getmodule(function)
    assert module is not None and "https://arxiv.org/abs/" in (module.__doc__ or "")
    for section in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert section in (function.__doc__ or "")
