"""Fold the batch norms of a trained network into its convolutions, for inference.

From the root of the repository, in some twenty seconds on two CPU cores:

    python examples/04_fold_for_inference.py

1. Trains a small convolutional net with batch norm on handwritten digits.
2. Finds the pairs of layer and norm in a trace of the model, and folds them.
3. Runs the model without norms on what comes out: the same answers, sooner.
"""

import functools
import sys
import time
from typing import Any

import digits
import flax.linen as nn
import jax
import numpy as np
import optax

import jaxnorm
from jaxnorm.linen import BatchNorm

BATCH_SIZE, RUNS = 128, 300


class Net(nn.Module):
    """The model with norms, and without them the one that folded variables fit."""

    norms: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 16, 32, 32):
            x = nn.Conv(features, (3, 3), use_bias=not self.norms)(x)
            if self.norms:
                x = BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.mean((1, 2)))


def milliseconds(calls: list[Any]) -> np.ndarray:
    """The lower quartile of each call's times, taking turns."""
    times = np.empty((RUNS + 1, len(calls)))
    for i, j in np.ndindex(times.shape):
        start = time.perf_counter()
        jax.block_until_ready(calls[j]())
        times[i, j] = time.perf_counter() - start
    return 1e3 * np.quantile(times[1:], 0.25, axis=0)  # the first compiles


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=150)
    (train, test), net, plain = digits.load(), Net(), Net(norms=False)
    variables = digits.fit(
        digits.init(net=net),
        train.batches(BATCH_SIZE),
        steps,
        optax.adam(0.01),
        loss=functools.partial(digits.forward, net=net),
    )

    image = test.images[:1]
    pairs = jaxnorm.models.find_pairs(net.apply, variables, image)
    print(*(f"{pair.norm} goes into {pair.layer}" for pair in pairs), sep="\n")
    folded = jaxnorm.models.fold(variables, pairs)
    before: Any = functools.partial(jax.jit(net.apply), variables)
    after: Any = functools.partial(jax.jit(plain.apply), folded)
    logits = np.stack([before(test.images), after(test.images)])
    accuracies = (logits.argmax(-1) == test.labels).mean(1)
    difference = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    times = milliseconds([lambda: before(image), lambda: after(image)])
    for i, name in enumerate(("with norms", "folded")):
        print(f"{name}: test accuracy {accuracies[i]:.3f}, {times[i]:.3f} ms an image")
    print(f"largest difference, of the largest value: {difference:.1e}")
    print(f"time folded / with norms: {times[1] / times[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
