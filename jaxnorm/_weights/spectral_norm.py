r"""Spectral normalization (Miyato et al., 2018, https://arxiv.org/abs/1802.05957).

    W' = \frac{W}{\sqrt{\sigma^2 + \epsilon}}
    \sigma \approx \max_u \frac{\|W u\|}{\|u\|}

Statistics over: the whole kernel.
Take it for: critics of generative adversarial networks, and layers that must not
    stretch their input.
Not for: layers before a norm, which takes their scale out again.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from jaxnorm._arguments import as_epsilon, as_integer
from jaxnorm._dtypes import as_floating, at_least_float32, promote
from jaxnorm._exact import overflow_as_nan
from jaxnorm._sharding import automatically


def spectral_norm(
    kernel: ArrayLike, u: ArrayLike, *, n_steps: int = 1, epsilon: float = 1e-12
) -> tuple[Array, Array, Array]:
    """Divides a kernel by its largest singular value, as power iteration estimates it.

        matrix = kernel.reshape(-1, kernel.shape[-1])
        for _ in range(n_steps):
            v = unit(matrix @ u)
            u = unit(v @ matrix)
        sigma = v @ matrix @ u
        w = kernel / sqrt(sigma**2 + epsilon)

    The estimate approaches the singular value from below, over the steps of one call
    and over calls that pass `u` on. Derivatives take `u` and `v` as constants. A kernel
    of 0, or of values that are not finite, leaves `u` as it is (a `u` of 0 counts as
    equal numbers), and a `sigma` of 0 leaves the kernel as it is.

    Args:
        kernel: array of real numbers with two axes or more; integers are read as
            float32.
        u: of shape (features,) or (1, features), the last call's, at first random.
        n_steps: steps of the power iteration, 1 or more.
        epsilon: added to the squared singular value.

    Returns:
        w, of the shape and dtype of the kernel; the new u, of length 1, of the shape
        and dtype of the old; and sigma, in the dtype of the computation: at least
        float32.

    Raises:
        ValueError, TypeError: while tracing, for shapes, dtypes or a number of steps
            that do not fit, and a negative epsilon.

    Source: Miyato et al., 2018.

    >>> import jax.numpy as jnp, jaxnorm
    >>> kernel = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    >>> w, u, sigma = jaxnorm.spectral_norm(kernel, jnp.array([1.0, 1.0]), n_steps=5)
    >>> print(w.round(3), f"{sigma:.3f}")
    [[1.    0.   ]
     [0.    0.333]] 3.000
    """
    kernel, u = as_floating(kernel, "kernel"), as_floating(u, "u")
    epsilon, n_steps = as_epsilon("epsilon", epsilon), as_integer("n_steps", n_steps)
    _check(kernel, u, n_steps)
    like = kernel, u, PartitionSpec()
    return automatically(_normalized, kernel, u, n_steps, epsilon, like=like)


def _normalized(
    kernel: Array, u: Array, n_steps: int, epsilon: ArrayLike
) -> tuple[Array, Array, Array]:
    wide = at_least_float32(promote(kernel.dtype, u.dtype))
    weights = kernel.astype(wide)
    matrix = weights.reshape(-1, kernel.shape[-1])
    first = lax.stop_gradient(u).astype(wide).reshape(1, -1)
    right, left = _singular_vectors(lax.stop_gradient(matrix), first, n_steps)
    sigma = (left * matrix * right).sum()
    # Selected before the root, whose derivative at 0 would be infinite.
    square = jnp.where(sigma > 0, sigma**2 + epsilon, 1)
    w = (weights * lax.rsqrt(overflow_as_nan(square))).astype(kernel.dtype)
    return w, right.reshape(u.shape).astype(u.dtype), sigma


def _check(kernel: Array, u: Array, n_steps: int) -> None:
    if jnp.iscomplexobj(kernel) or jnp.iscomplexobj(u):
        raise TypeError(
            f"spectral_norm takes real numbers, got a kernel of {kernel.dtype} and u "
            f"of {u.dtype}"
        )
    if kernel.ndim < 2:
        raise ValueError(
            f"a kernel of shape {kernel.shape} is no matrix: leave biases and scales "
            "as they are"
        )
    features = kernel.shape[-1]
    if u.shape not in ((features,), (1, features)):
        raise ValueError(
            f"u has shape {u.shape}, but a kernel of shape {kernel.shape} needs "
            f"({features},) or (1, {features}): draw one with jax.random.normal"
        )
    if n_steps < 1:
        raise ValueError(f"n_steps must be 1 or more, got {n_steps}")


def _singular_vectors(matrix: Array, u: Array, n_steps: int) -> tuple[Array, Array]:
    """The right vector, a row, and the left one, a column, after `n_steps` from `u`.

    Sums of products: matrix products are less exact by default on accelerators.
    """
    u = _unit(u, jnp.full_like(u, max(u.size, 1) ** -0.5))
    v = jnp.zeros((len(matrix), 1), matrix.dtype)
    for _ in range(n_steps):
        v = _unit((matrix * u).sum(1, keepdims=True), jnp.zeros_like(v))
        u = _unit((v * matrix).sum(0, keepdims=True), u)
    return u, v


def _unit(x: Array, otherwise: Array) -> Array:
    """`x` at length 1, however small; `otherwise` where `x` is 0 or holds a NaN."""
    largest = jnp.max(jnp.abs(x), initial=0)
    usable = largest > 0
    x = jnp.where(usable, x / jnp.where(usable, largest, 1), 0)
    length = jnp.maximum(jnp.linalg.norm(x), 1)  # no less, where the largest is 1
    return jnp.where(usable, x / length, otherwise)
