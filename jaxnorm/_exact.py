"""Arithmetic that loses nothing where rounding would show."""

import jax.numpy as jnp
from jax import Array, lax


def two_sum(pivot: Array, shift: Array) -> tuple[Array, Array]:
    """The sum of a rounded pivot and a smaller shift, and what rounding cut off it."""
    main = drop_last_bit(shift)
    total = pivot + main
    return total, (pivot - total) + main + (shift - main)


def two_sum_denoised(pivot: Array, shift: Array) -> tuple[Array, Array]:
    """As `two_sum`, and 0 for a rest below the rounding of the shift: it is noise, and
    would keep what is constant from becoming 0."""
    total, rest = two_sum(pivot, shift)
    noise = 64 * jnp.finfo(rest.dtype).eps * jnp.abs(shift)
    return total, jnp.where(jnp.abs(rest) > noise, rest, jnp.zeros_like(rest))


def drop_last_bit(x: Array) -> Array:
    """`x` rounded to one bit less than its dtype has.

    So that all uses of it are of one and the same number: a compiler contracts the
    division that made `x` with the subtraction that uses it, into something of more
    digits, but only in some places.
    """
    if jnp.iscomplexobj(x):
        return lax.complex(drop_last_bit(x.real), drop_last_bit(x.imag))
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant - 1)


def abs_square(x: Array) -> Array:
    """`abs(x) ** 2`, real also where `x` is complex."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def rstd(var: Array, epsilon: Array) -> Array:
    """`1 / sqrt(var + epsilon)`, and NaN where the variance is infinite."""
    return lax.rsqrt(overflow_as_nan(var + epsilon))


def overflow_as_nan(square: Array) -> Array:
    """`square`, with NaN for infinity: what is divided by it would be 0, and look like
    a result, where the square of a number is past the largest of its dtype.

    As a remainder, which takes `square` once: a selection would part the kernel that a
    GPU has for rows.
    """
    return lax.rem(square, jnp.full_like(square, jnp.finfo(square.dtype).max))


def split_size(size: Array) -> tuple[Array, Array]:
    """`size` as two integers small enough to be summed exactly in float32, which holds
    integers up to 2**24."""
    return size >> 16, size & 0xFFFF


def join_size(high: Array, low: Array) -> Array:
    """The size of these two parts, which may be sums of parts."""
    return (high.real.astype(jnp.int32) << 16) + low.real.astype(jnp.int32)
