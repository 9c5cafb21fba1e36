"""Programs around norms, as inside networks, for any library of Flax's layer classes.

Activations and the weights of products are bfloat16, parameters of norms float32. All
arguments are shapes only. Gradients are taken as inside a network: the cotangent is the
result of one more product, so that it depends on all of the forward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DTYPE = jnp.bfloat16
LAYERS = 12
HEAD = 128


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, DTYPE)


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

    def offers(self, kind: str) -> bool:
        """Whether the class can be asked for the kernels of this column."""
        return self.implementation is None or self.has(kind, "implementation")


class Layer:
    """A norm, and the activation that follows it, inside it where it has that field."""

    def __init__(
        self, library: Library, kind: str, activation: str | None = None, **options: Any
    ):
        self.fused = activation is not None and library.has(kind, "activation")
        self.activation = getattr(jax.nn, activation) if activation else lambda y: y
        if self.fused:
            options["activation"] = activation
        if library.implementation is not None:
            options["implementation"] = library.implementation
        self.module = getattr(library.module, kind)(dtype=DTYPE, **options)

    def variables(self, *shape: int) -> tuple[Any, Any]:
        """The shapes of parameters and statistics, for inputs of this shape."""
        held = dict(jax.eval_shape(self.module.init, jax.random.key(0), array(*shape)))
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


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled and counted, and the passes over `x` that it needs at least.

    `quantity` is "passes" over an array of `shape`, the "kept" residuals of the forward
    pass, or the "temporaries" of a loop per layer, all in units of that array. Where
    there are `products`, the floor holds if these are kernels of their own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    floor: float | None
    programs: Callable[[Library], list[Program]]
    quantity: str = "passes"
    products: bool = True

    @property
    def unit(self) -> int:
        return math.prod(self.shape) * DTYPE.dtype.itemsize

    @property
    def key(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


def sandwich(make: Callable[[Library], Layer], shape, residual: bool, library):
    """Forward pass and gradient of product, norm, product."""
    layer = make(library)
    params, stats = layer.variables(*shape)
    x, w = array(*shape), array(shape[-1], shape[-1])

    def step(x, w1, w2, w3, params, stats, *residual):
        def net(x, w1, w2, params, *residual):
            y, updates = layer(params, stats, x @ w1, *residual)
            return y @ w2, updates

        z, pull, updates = jax.vjp(net, x, w1, w2, params, *residual, has_aux=True)
        return updates, pull(z @ w3)

    added = (x,) if residual else ()
    return [Program(step, (x, w, w, w, params, stats, *added))]


def alone(make: Callable[[Library], Layer], shape, library):
    """Forward pass and gradient of the norm, whose cotangent is an argument."""
    layer = make(library)
    params, stats = layer.variables(*shape)

    def step(x, dy, params, stats):
        def norm(x, params):
            return layer(params, stats, x)

        y, pull, updates = jax.vjp(norm, x, params, has_aux=True)
        return y, updates, pull(dy)

    return [Program(step, (array(*shape), array(*shape), params, stats))]


def inference(make: Callable[[Library], Layer], shape, library):
    layer = make(library)
    params, stats = layer.variables(*shape)

    def forward(x, params, stats):
        return layer(params, stats, x)[0]

    return [Program(forward, (array(*shape), params, stats))]


def split(make: Callable[[Library], Layer], shape, library):
    """Forward and backward pass as two programs, as between the stages of a pipeline.

    The first result of the first one is what it hands over to the second.
    """
    layer = make(library)
    params, stats = layer.variables(*shape)
    x = array(*shape)

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


def bottleneck(shape, library):
    """A residual block of ResNet: three convolutions, each with batch norm and ReLU."""
    *space, width = shape
    inner = width // 4
    layer = Layer(library, "BatchNorm", "relu", use_running_average=False, momentum=0.9)
    narrow, wide = layer.variables(*space, inner), layer.variables(*space, width)
    params, stats = zip(narrow, narrow, wide, strict=True)
    weights = (
        array(1, 1, width, inner),
        array(3, 3, inner, inner),
        array(1, 1, inner, width),
    )

    def step(x, weights, params, stats, last):
        def block(x, weights, params):
            y, updates = x, []
            for i in range(3):
                shortcut = x if i == 2 else None
                y, update = layer(params[i], stats[i], conv(y, weights[i]), shortcut)
                updates.append(update)
            return y, updates

        z, pull, updates = jax.vjp(block, x, weights, params, has_aux=True)
        return updates, pull(conv(z, last))

    last = array(1, 1, width, width)
    return [Program(step, (array(*shape), weights, params, stats, last))]


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def transformer(kind: str, shape, library):
    """A block of a transformer: causal attention and an MLP, a norm before each."""
    width = shape[-1]
    layer = Layer(library, kind)
    params, _ = layer.variables(*shape)
    weights = (
        array(width, 3 * width),
        array(width, width),
        array(width, 4 * width),
        array(4 * width, width),
    )

    def step(x, weights, params, last):
        def block(x, weights, params):
            qkv, out, up, down = weights
            y, _ = layer(params[0], {}, x)
            x = x + attention(y @ qkv) @ out
            y, _ = layer(params[1], {}, x)
            return x + jax.nn.gelu(y @ up) @ down

        z, pull = jax.vjp(block, x, weights, params)
        return pull(z @ last)

    args = (array(*shape), weights, (params, params), array(width, width))
    return [Program(step, args)]


def attention(qkv):
    heads = qkv.reshape(*qkv.shape[:2], 3, -1, HEAD)
    q, k, v = (heads[:, :, i] for i in range(3))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    return y.reshape(*qkv.shape[:2], -1)


def scanned(kind: str, shape, library):
    """Forward pass and gradient of a `lax.scan` over pre-norm layers, without remat."""
    layer = Layer(library, kind)
    width = shape[-1]
    params, _ = layer.variables(*shape)
    stacked = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct((LAYERS, *v.shape), v.dtype), params
    )

    def step(x, weights, params, dy):
        def net(x, weights, params):
            def body(x, of_layer):
                w, params = of_layer
                return x + layer(params, {}, x)[0] @ w, None

            return lax.scan(body, x, (weights, params))[0]

        y, pull = jax.vjp(net, x, weights, params)
        return y, pull(dy)

    args = (array(*shape), array(LAYERS, width, width), stacked, array(*shape))
    return [Program(step, args)]


def cases() -> Iterator[Case]:
    """All cases, in the order of the table."""

    def norm(kind, activation=None, **options):
        return lambda library: Layer(library, kind, activation, **options)

    training = {"use_running_average": False, "momentum": 0.9}
    batch = norm("BatchNorm", **training)
    batch_relu = norm("BatchNorm", "relu", **training)
    layer, rms = norm("LayerNorm"), norm("RMSNorm")
    group = norm("GroupNorm", num_groups=32)
    group_silu = norm("GroupNorm", "silu", num_groups=32)
    images, rows, maps = (256, 28, 28, 512), (8192, 4096), (16, 64, 64, 320)

    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", batch, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, (256, 28, 28, 128), 8),
        ("BN + ReLU", "BatchNorm", batch_relu, (256, 14, 14, 256), 8),
        # Forward x twice and r; backward x, dy twice, dx, dr; a bit per element thrice.
        ("BN + add + ReLU", "BatchNorm", batch_relu, images, 10 + 3 / 16),
        ("LN", "LayerNorm", layer, rows, 5),
        ("RMS", "RMSNorm", rms, rows, 5),
        ("GN", "GroupNorm", group, maps, 8),
        ("GN + SiLU", "GroupNorm", group_silu, maps, 8),
    ):
        programs = functools.partial(sandwich, make, shape, "add" in name)
        yield Case(f"{name}, train", kind, shape, floor, programs)

    # The cotangent is there from the start, so that one kernel can write y and dx.
    first = (256, 512, 28, 28)
    programs = functools.partial(alone, norm("BatchNorm", axis=1, **training), first)
    name = "BN channels first, train"
    yield Case(name, "BatchNorm", first, 7, programs, products=False)

    running = norm("BatchNorm", use_running_average=True)
    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", running, images, 2),
        ("LN", "LayerNorm", layer, rows, 2),
        ("RMS", "RMSNorm", rms, rows, 2),
        ("GN", "GroupNorm", group, maps, 3),
    ):
        programs = functools.partial(inference, make, shape)
        name = f"{name}, inference"
        yield Case(name, kind, shape, floor, programs, products=False)

    for name, kind, make, shape, floor in (
        ("BN", "BatchNorm", batch, images, 8),
        ("BN + ReLU", "BatchNorm", batch_relu, images, 8),
        ("LN", "LayerNorm", layer, rows, 5),
        ("RMS", "RMSNorm", rms, rows, 5),
        ("GN", "GroupNorm", group, maps, 8),
        ("GN + SiLU", "GroupNorm", group_silu, maps, 8),
    ):
        programs = functools.partial(split, make, shape)
        yield Case(f"{name}, split", kind, shape, floor, programs, products=False)
        yield Case(f"{name}, kept", kind, shape, 1, programs, "kept", False)

    for shape in ((32, 56, 56, 256), (32, 28, 28, 512)):
        programs = functools.partial(bottleneck, shape)
        yield Case("ResNet bottleneck, train", "BatchNorm", shape, None, programs)

    for name, kind in (("LN", "LayerNorm"), ("RMS", "RMSNorm")):
        # Sequences so short that XLA's attention, which writes its scores to memory,
        # does not outweigh all else.
        shape = (64, 128, 2048)
        programs = functools.partial(transformer, kind, shape)
        name = f"transformer block, {name}, train"
        yield Case(name, kind, shape, None, programs)

    for name, kind in (("LN", "LayerNorm"), ("RMS", "RMSNorm")):
        shape = (8192, 2048)
        programs = functools.partial(scanned, kind, shape)
        name = f"scan, {name}, temporaries"
        yield Case(name, kind, shape, None, programs, "temporaries")
