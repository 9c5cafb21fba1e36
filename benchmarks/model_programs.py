"""Programs of blocks of models: a bottleneck of ResNet, a transformer, a scan."""

from typing import Any

import jax
from jax import lax
from norm_programs import LAYERS, Layer, Program, array

HEAD = 128


def bottleneck(shape, library):
    """A residual block of ResNet: three convolutions, each with batch norm and ReLU."""
    width = shape[-1]
    layer = Layer(library, "BatchNorm", "relu", use_running_average=False, momentum=0.9)
    params, stats, weights = bottleneck_variables(layer, shape)

    def step(x, weights, params, stats, last):
        def block(x, weights, params):
            return bottleneck_block(layer, params, stats, weights, x)

        z, pull, updates = jax.vjp(block, x, weights, params, has_aux=True)
        return updates, pull(conv(z, last))

    last = array(1, 1, width, width)
    return [Program(step, (array(*shape), weights, params, stats, last))]


def bottleneck_variables(layer: Layer, shape):
    """The shapes of what the norms hold, of their statistics, and of the weights."""
    *space, width = shape
    inner = width // 4
    narrow, wide = layer.variables(*space, inner), layer.variables(*space, width)
    params, stats = zip(narrow, narrow, wide, strict=True)
    weights = (
        array(1, 1, width, inner),
        array(3, 3, inner, inner),
        array(1, 1, inner, width),
    )
    return params, stats, weights


def bottleneck_block(layer: Layer, params, stats, weights, x):
    """The result, and the updated statistics of each norm."""
    y, updates = x, []
    for i in range(3):
        shortcut = x if i == 2 else None
        y, update = layer(params[i], stats[i], conv(y, weights[i]), shortcut)
        updates.append(update)
    return y, updates


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def transformer(kind: str, shape, library):
    """A block of a transformer, from the hidden layer of one MLP to that of the next.

    So that each norm follows the sum that it normalizes.
    """
    width = shape[-1]
    layer = Layer(library, kind)
    params, _ = layer.variables(*shape)
    weights = transformer_weights(width)

    def step(x, hidden, weights, params, last):
        def block(x, hidden, weights, params):
            return transformer_block(layer, params, weights, x, hidden)

        (x, hidden), pull = jax.vjp(block, x, hidden, weights, params)
        return pull((x @ last[0], hidden @ last[1]))

    hidden = array(*shape[:-1], 4 * width)
    last = array(width, width), array(4 * width, 4 * width)
    return [Program(step, (array(*shape), hidden, weights, (params, params), last))]


def transformer_weights(width: int):
    """The shapes of the products' weights of a block."""
    return (
        array(4 * width, width),
        array(width, 3 * width),
        array(width, width),
        array(width, 4 * width),
    )


def transformer_block(
    layer: Layer, params, weights, x, hidden, attention_by: Any = "xla"
):
    """The stream and the hidden layer after a block, of those before it."""
    down, qkv, out, up = weights
    x, y = layer.add_and_norm(params[0], hidden @ down, x)
    x, y = layer.add_and_norm(params[1], attention(y @ qkv, attention_by) @ out, x)
    return x, jax.nn.gelu(y @ up)


def attention(qkv, implementation: Any = "xla"):
    heads = qkv.reshape(*qkv.shape[:2], 3, -1, HEAD)
    q, k, v = (heads[:, :, i] for i in range(3))
    y = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation=implementation
    )
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
                x, y = layer.add_and_norm(params, x)
                return x + y @ w, None

            return lax.scan(body, x, (weights, params))[0]

        y, pull = jax.vjp(net, x, weights, params)
        return y, pull(dy)

    args = (array(*shape), array(LAYERS, width, width), stacked, array(*shape))
    return [Program(step, args)]
