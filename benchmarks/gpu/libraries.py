"""Norms of all sources as classes like Flax's."""

import flax.linen as nn
from norm_programs import Library

import jaxnorm.linen as ours
from gpu import pallas_ops


def libraries(kind: str, backends: tuple[str, ...]) -> list[Library]:
    """Those that have `kind`: Flax, jaxnorm by XLA and by kernels, and JAX's own."""
    # What has no kernels has no field to ask for XLA, either.
    by_xla = Library("xla", ours, "xla")
    by_xla = by_xla if by_xla.offers(kind) else Library("xla", ours)
    by_kernels = [Library(name, ours, name) for name in backends]
    jaxs = [Library("jax.pallas", pallas_ops)] if hasattr(pallas_ops, kind) else []
    found = [Library("flax", nn), by_xla, *by_kernels, *jaxs]
    return [library for library in found if library.offers(kind)]
