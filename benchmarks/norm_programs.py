"""Programs around norms, as inside networks, for any library of Flax's layer classes.

Activations and the weights of products are bfloat16 unless a layer has another dtype,
parameters of norms float32. All arguments are shapes only. Gradients are taken as
inside a network: the cotangent is the result of one more product, so that it depends on
all of the forward pass.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import fp8_ops

import jaxnorm

DTYPE = jnp.bfloat16
LAYERS = 12


def array(*shape: int, dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class Program(NamedTuple):
    """What to compile: `f(*args)`; the arguments in `donate` need not survive it."""

    f: Callable
    args: tuple
    donate: tuple[int, ...] = ()


class Library(NamedTuple):
    """A module with Flax's layer classes, and the kernels that they are asked for."""

    name: str
    module: ModuleType
    implementation: str | None = None

    def has(self, kind: str, field: str) -> bool:
        fields = dataclasses.fields(getattr(self.module, kind))
        return any(f.name == field for f in fields)

    def takes(self, kind: str, name: str) -> bool:
        """Whether a call of the class takes an argument of this name."""
        call = getattr(self.module, kind).__call__
        return name in inspect.signature(call).parameters

    def offers(self, kind: str) -> bool:
        """Whether the class can be asked for the kernels of this column."""
        return self.implementation is None or self.has(kind, "implementation")


class Layer:
    """A norm, and the activation that follows it, inside it where it has that field."""

    def __init__(
        self,
        library: Library,
        kind: str,
        activation: str | None = None,
        dtype: Any = DTYPE,
        **options: Any,
    ):
        self.fused = activation is not None and library.has(kind, "activation")
        self.activation = getattr(jax.nn, activation) if activation else lambda y: y
        if self.fused:
            options["activation"] = activation
        if library.implementation is not None:
            options["implementation"] = library.implementation
        self.module = getattr(library.module, kind)(dtype=dtype, **options)
        self.array = functools.partial(array, dtype=dtype)
        self.adds = library.takes(kind, "residual")

    def variables(self, *shape: int) -> tuple[Any, Any]:
        """The shapes of parameters and statistics, for inputs of this shape."""
        x = self.array(*shape)
        held = dict(jax.eval_shape(self.module.init, jax.random.key(0), x))
        params = held.pop("params", {})
        return params, held

    def __call__(self, params, stats, x, residual=None):
        """The result, and the updated statistics."""
        variables = {"params": params, **stats}
        taken = {"residual": residual} if self.fused and residual is not None else {}
        y, updates = self.module.apply(variables, x, mutable=["batch_stats"], **taken)
        if self.fused:
            return y, updates
        return self.activation(y if residual is None else y + residual), updates

    def add_and_norm(self, params, x, residual: Any = 0):
        """The sum, and the norm of it: by the norm where it takes a residual."""
        if self.adds:
            return self.module.apply({"params": params}, x, residual=residual)
        x = x + residual
        return x, self.module.apply({"params": params}, x)


def sandwich(make: Callable[[Library], Layer], shape, residual: bool, library):
    """Forward pass and gradient of product, norm, product."""
    layer = make(library)
    params, stats = layer.variables(*shape)
    x, w = layer.array(*shape), layer.array(shape[-1], shape[-1])

    def step(x, w1, w2, w3, params, stats, *residual):
        def net(x, w1, w2, params, *residual):
            y, updates = layer(params, stats, x @ w1, *residual)
            return y @ w2, updates

        z, pull, updates = jax.vjp(net, x, w1, w2, params, *residual, has_aux=True)
        return updates, pull(z @ w3)

    added = (x,) if residual else ()
    return [Program(step, (x, w, w, w, params, stats, *added))]


def skipping(make: Callable[[Library], Layer], shape, library):
    """Forward pass and gradient of a norm of a sum that is read after it, too."""
    layer = make(library)
    params, _ = layer.variables(*shape)
    x, w = layer.array(*shape), layer.array(shape[-1], shape[-1])

    def step(x, residual, w1, w2, w3, params):
        def net(x, residual, w1, w2, params):
            x, y = layer.add_and_norm(params, x @ w1, residual)
            return x + y @ w2

        z, pull = jax.vjp(net, x, residual, w1, w2, params)
        return pull(z @ w3)

    return [Program(step, (x, x, w, w, w, params))]


def alone(make: Callable[[Library], Layer], shape, library):
    """Forward pass and gradient of the norm, whose cotangent is an argument."""
    layer = make(library)
    params, stats = layer.variables(*shape)

    def step(x, dy, params, stats):
        def norm(x, params):
            return layer(params, stats, x)

        y, pull, updates = jax.vjp(norm, x, params, has_aux=True)
        return y, updates, pull(dy)

    x = layer.array(*shape)
    return [Program(step, (x, x, params, stats))]


def inference(make: Callable[[Library], Layer], shape, library):
    layer = make(library)
    params, stats = layer.variables(*shape)

    def forward(x, params, stats):
        return layer(params, stats, x)[0]

    return [Program(forward, (layer.array(*shape), params, stats))]


def to_float8(make: Callable[[Library], Layer], shape, with_largest: bool, library):
    """Inference of a norm in float32 that becomes float8, and its largest magnitude.

    Both are functions of Flax's, too, though of its products alone.
    """
    layer = make(library)
    params, stats = layer.variables(*shape)

    def forward(x, scale, params, stats):
        y = layer(params, stats, x)[0]
        if library.name == "Flax":
            q = fp8_ops.quantize(y, jnp.float8_e4m3fn, scale, jnp.float32)
            largest = abs(y).max()
        else:
            q, largest = jaxnorm.to_float8(y, scale)
        return (q, largest) if with_largest else q

    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return [Program(forward, (array(*shape), scale, params, stats))]


def split(make: Callable[[Library], Layer], shape, library):
    """Forward and backward pass as two programs, as between the stages of a pipeline.

    The first result of the first one is what it hands over to the second.
    """
    layer = make(library)
    params, stats = layer.variables(*shape)
    x = layer.array(*shape)

    def forward(x, params, stats):
        def norm(x, params):
            return layer(params, stats, x)

        y, pull, updates = jax.vjp(norm, x, params, has_aux=True)
        return pull, y, updates

    def backward(pull, dy):
        return pull(dy)

    pull = jax.eval_shape(forward, x, params, stats)[0]
    # Donated: handing x itself over costs nothing.
    return [Program(forward, (x, params, stats), (0,)), Program(backward, (pull, x))]
