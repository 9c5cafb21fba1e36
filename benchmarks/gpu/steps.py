"""Whole training steps: transformer blocks, ResNet's bottlenecks, levels of a U-Net.

By the clock, with many steps queued and parameters donated, as users train. After five
steps the losses of all libraries have to agree.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from model_programs import (
    bottleneck_block,
    bottleneck_variables,
    conv,
    transformer_block,
    transformer_weights,
)
from norm_programs import Layer, Library, array

from gpu.interpreted import interpret_kernels
from gpu.libraries import libraries
from gpu.plan import Plan, Settings, Shape
from gpu.times import arrays
from gpu.work import Item, Row, said

RATE = 1e-3
LOSS_AFTER = 5
AHEAD = 1  # items that are compiled together
AGREE = 1e-2


class Model(NamedTuple):
    """`loss(params, stats, batch)` and new statistics, with arrays of these shapes."""

    loss: Callable[..., tuple[Any, Any]]
    params: Any
    stats: Any
    batch: Any


def items(settings: Settings) -> Iterator[Item]:
    if settings.dry_run:
        interpret_kernels()
    plan = settings.plan
    attention = "xla" if settings.dry_run else "cudnn"
    for shape in plan.levels:
        make = functools.partial(level, shape)
        yield _item(settings, f"U-Net level {shape}", "GroupNorm", make)
    for kind, way in plan.stacks:
        make = functools.partial(transformer, kind, plan, way, attention)
        yield _item(settings, f"{plan.blocks} blocks, {kind}, {way}", kind, make)
    for shape in plan.bottlenecks:
        make = functools.partial(bottleneck, shape)
        yield _item(settings, f"bottleneck {shape}", "BatchNorm", make)


def _item(
    settings: Settings, name: str, kind: str, make: Callable[[Library], Model]
) -> Item:
    chosen = [v for v in libraries(kind, settings.backends) if v.name != "jax.pallas"]
    builds = tuple(functools.partial(compiled_step, make, v) for v in chosen)

    def run(*compiled: Any) -> Iterator[Row]:
        first = None
        for library, step in zip(chosen, compiled, strict=True):
            row = {"step": name, "impl": library.name}
            if isinstance(step, str):
                yield row | {"problem": step}
                continue
            try:
                found = timed(step, make(library), settings.plan)
            except Exception as error:  # such as too little memory for this one
                yield row | {"problem": said(error)}
                continue
            first = found["loss"] if first is None else first
            agrees = abs(found["loss"] - first) <= AGREE * abs(first)
            yield row | {"agrees": agrees, **found}

    return Item(f"step of {name}", run, builds)


# ---- Models ------------------------------------------------------------------------


def transformer(
    kind: str, plan: Plan, way: str, attention: str, library: Library
) -> Model:
    """Pre-norm blocks, each from the hidden layer of one MLP to that of the next."""
    *tokens, width = plan.tokens
    layer = Layer(library, kind)
    norm, _ = layer.variables(*plan.tokens)
    params = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct((plan.blocks, *v.shape), v.dtype),
        ((norm, norm), transformer_weights(width)),
    )

    def block(carry: Any, of_block: Any) -> Any:
        norms, weights = of_block
        x, hidden = carry
        return transformer_block(layer, norms, weights, x, hidden, attention), None

    if "remat" in way:
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = jax.checkpoint(block, policy=saved)

    def loss(params: Any, stats: None, batch: Any) -> tuple[Any, None]:
        carry = batch
        if "scan" in way:
            carry, _ = lax.scan(block, carry, params)
        else:
            for k in range(plan.blocks):
                carry, _ = block(carry, jax.tree.map(lambda v, k=k: v[k], params))
        return sum(map(_mean_square, carry)), None

    batch = array(*plan.tokens), array(*tokens, 4 * width)
    return Model(loss, params, None, batch)


def level(shape: Shape, library: Library) -> Model:
    """A residual block of a U-Net: twice group norm, SiLU and a convolution."""
    layer = Layer(library, "GroupNorm", "silu", num_groups=32)
    norm, _ = layer.variables(*shape)
    kernel = array(3, 3, shape[-1], shape[-1])

    def loss(params: Any, stats: None, x: Any) -> tuple[Any, None]:
        y = x
        for norm, kernel in params:
            y = conv(layer(norm, {}, y)[0], kernel)
        return _mean_square(x + y), None

    return Model(loss, [(norm, kernel)] * 2, None, array(*shape))


def bottleneck(shape: Shape, library: Library) -> Model:
    layer = Layer(library, "BatchNorm", "relu", use_running_average=False)
    norms, stats, weights = bottleneck_variables(layer, shape)

    def loss(params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
        norms, weights = params
        y, stats = bottleneck_block(layer, norms, stats, weights, x)
        return _mean_square(y), tuple(stats)

    return Model(loss, (norms, weights), stats, array(*shape))


def _mean_square(x: Any) -> Any:
    return jnp.square(x.astype(jnp.float32)).mean()


# ---- Steps -------------------------------------------------------------------------


def compiled_step(make: Callable[[Library], Model], library: Library) -> Any:
    """A step, or why there is none."""
    try:
        return _compiled(make(library))
    except Exception as error:  # whatever a library or a compiler raises
        return said(error)


def _compiled(model: Model) -> Any:
    def step(params: Any, stats: Any, batch: Any) -> tuple[Any, Any, Any]:
        gradient = jax.value_and_grad(model.loss, has_aux=True)
        (loss, stats), grads = gradient(params, stats, batch)
        moved = jax.tree.map(lambda v, g: (v - RATE * g).astype(v.dtype), params, grads)
        return moved, stats, loss

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*model[1:])
    return lowered.compile()


def timed(step: Any, model: Model, plan: Plan) -> Row:
    """Milliseconds of a step, of three repeats; the loss; the bytes that it needs."""
    params, stats, batch = (arrays(v, seed) for seed, v in enumerate(model[1:]))
    params = _weights(params)
    for _ in range(LOSS_AFTER):
        params, stats, loss = step(params, stats, batch)
    loss_then = float(loss)
    repeats = []
    for _ in range(3):
        jax.block_until_ready(params)
        start = time.perf_counter()
        for _ in range(plan.steps):
            params, stats, loss = step(params, stats, batch)
        jax.block_until_ready(params)
        repeats.append((time.perf_counter() - start) / plan.steps * 1000)
    return {
        "ms": statistics.median(repeats),
        "repeats": repeats,
        "loss": loss_then,
        "peak_bytes": _bytes(step),
    }


def _weights(params: Any) -> Any:
    """With the weights of products and convolutions, stacked or not, such that what
    they give is as large as what they take."""

    def one(v: Any) -> Any:
        if v.dtype == jnp.float32:
            return v
        taken = v.shape[-2] * (v.shape[0] * v.shape[1] if v.ndim == 4 else 1)
        return (v * taken**-0.5).astype(v.dtype)

    return jax.tree.map(one, params)


def _bytes(step: Any) -> int | None:
    memory = step.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
