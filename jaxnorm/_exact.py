"""Arithmetic that loses nothing where rounding would show."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Pair = tuple[Array, Array]


def two_sum(pivot: Array, shift: Array) -> tuple[Array, Array]:
    """The sum of a rounded pivot and a smaller shift, and what rounding cut off it."""
    main = drop_last_bit(shift)
    total = pivot + main
    return total, (pivot - total) + main + (shift - main)


def two_sum_denoised(pivot: Array, shift: Array, var: Array) -> tuple[Array, Array]:
    """As `two_sum`, and 0 for a rest below the rounding of the shift, where the
    variance is, too: it is noise, and would keep what is constant from becoming 0."""
    total, rest = two_sum(pivot, shift)
    noise = 64 * jnp.finfo(rest.dtype).eps
    is_small = jnp.abs(rest) <= noise * jnp.abs(shift)
    is_constant = var <= noise * abs_square(shift)
    return total, jnp.where(is_small & is_constant, jnp.zeros_like(rest), rest)


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


def add_pairs(a: Pair, b: Pair) -> Pair:
    """The sum of two numbers, each the sum of two of which the second is what rounding
    has cut off the first; exact for integers up to 2**47 in float32.

    The smaller one may be negative if it is no farther from 0.
    """
    less = a[0] < b[0]
    large, small = jnp.where(less, b[0], a[0]), jnp.where(less, a[0], b[0])
    total, rest = two_sum(large, small)
    return two_sum(total, rest + (a[1] + b[1]))


def shrink_pair(a: Pair, share: Array) -> Pair:
    """`a` less this share of it.

    The share of the first is subtracted, not the rest multiplied: only the rounding of
    what goes would add up over many calls.
    """
    total, rest = two_sum(a[0], -(share * a[0]))
    return two_sum(total, rest + (1 - share) * a[1])


def split_size(size: Array) -> Pair:
    """`size` as two numbers that float32 can sum. A number of elements as integers of
    16 bits, whose sums are exact up to 2**24; a sum of weights as itself and 0."""
    if jnp.issubdtype(size.dtype, jnp.floating):
        return size, jnp.zeros_like(size)
    return size >> 16, size & 0xFFFF


def join_size(high: Array, low: Array, dtype: DTypeLike) -> Array:
    """The size, of this dtype, of these two parts, which may be sums of parts."""
    if jnp.issubdtype(dtype, jnp.floating):
        return high.real.astype(dtype)
    return (high.real.astype(jnp.int32) << 16) + low.real.astype(jnp.int32)


def not_zero(size: Array) -> Array:
    """`size`, and instead of 0 the least that a size can be, to divide by."""
    whole = jnp.issubdtype(size.dtype, jnp.integer)
    least = 1 if whole else jnp.finfo(size.dtype).tiny
    return jnp.maximum(size, jnp.asarray(least, size.dtype))
