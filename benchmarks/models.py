"""The two models that are trained whole: their sizes, weights and data."""

import numpy as np
from cases import Case
from peers import Program

RATE, SGD_MOMENTUM = 0.01, 0.9  # of the optimizer
CHECKED_STEPS = 3

# ResNet: a bottleneck block for each.
STEM, CLASSES = 32, 10
WIDTHS, STRIDES, EXPANSION = (32, 64, 128), (1, 2, 2), 2
# Transformer
HEADS, MLP = 4, 4


def convolutions(colors: int) -> list[tuple[int, int, int, int]]:
    """Inputs, outputs, kernel and stride of all convolutions, in order of use."""
    found = [(colors, STEM, 3, 1)]
    inputs = STEM
    for width, stride in zip(WIDTHS, STRIDES, strict=True):
        outputs = EXPANSION * width
        found += [
            (inputs, width, 1, 1),
            (width, width, 3, stride),
            (width, outputs, 1, 1),
            (inputs, outputs, 1, stride),
        ]
        inputs = outputs
    return found


def resnet_forward(x, conv_norm, relu):
    """The convolutional part; `conv_norm` applies the next convolution and norm."""
    x = relu(conv_norm(x))
    for _ in WIDTHS:
        y = relu(conv_norm(x))
        y = relu(conv_norm(y))
        y = conv_norm(y)
        x = relu(y + conv_norm(x))
    return x


def resnet_weights(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Kernels of height x width x inputs x outputs, and that of the last layer."""
    kernels = [
        _normal(i, (kernel, kernel, inputs, outputs))
        for i, (inputs, outputs, kernel, _) in enumerate(convolutions(case.channels))
    ]
    return kernels, _normal(99, (EXPANSION * WIDTHS[-1], CLASSES))


def resnet_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    return images, np.arange(case.shape[0]) % CLASSES


def transformer_weights(case: Case) -> dict[str, np.ndarray]:
    """Kernels of inputs x outputs."""
    n = case.channels
    sizes = {"qkv": (n, 3 * n), "out": (n, n), "up": (n, MLP * n), "down": (MLP * n, n)}
    return {name: _normal(i, size) for i, (name, size) in enumerate(sizes.items())}


def transformer_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The input, and what the output is to be."""
    both = np.random.default_rng(0).standard_normal((2, *case.shape), np.float32)
    return both[0], both[1]


def squared_error(y, target):
    return ((y - target) ** 2).mean()


def training(start, facts=None) -> Program:
    """`start` returns a function that takes a training step and returns the loss."""

    def results():
        step = start()
        return {"losses": np.array([float(step()) for _ in range(CHECKED_STEPS)])}

    return Program({"train step": start()}, results, facts or {})


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    deviation = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
    return deviation * np.random.default_rng(seed).standard_normal(shape, np.float32)
