"""Fold the batch norms of a trained network into its convolutions, for inference.

From the root of the repository, in some twenty seconds on two CPU cores:

    python examples/04_fold_for_inference.py

1. Trains a small convolutional net with batch norm on handwritten digits.
2. Finds the pairs of layer and norm in a trace of the model, and folds them.
3. Runs the model without norms on what comes out: the same answers, sooner.
"""

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn import datasets

import jaxnorm
from jaxnorm.linen import BatchNorm

BATCH_SIZE, TEST, RUNS = 128, 360, 300


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


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and what they show, in an order of no meaning."""
    data: Any = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order, ..., None] / 16).astype(np.float32), data.target[order]


def train(images: np.ndarray, digits: np.ndarray, steps: int) -> dict[str, Any]:
    """The variables after so many batches."""
    net, optimizer, rng = Net(), optax.adam(0.01), np.random.default_rng(0)
    held: Any = jax.jit(net.init)(jax.random.key(0), images[:1])
    state = held["params"], held["batch_stats"], optimizer.init(held["params"])

    def loss_fn(params, stats, x, y):
        held = {"params": params, "batch_stats": stats}
        logits, new = net.apply(held, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return loss.mean(), new["batch_stats"]

    @jax.jit
    def train_step(params, stats, opt_state, x, y):
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state

    for _ in range(steps):
        rows = rng.choice(len(digits), BATCH_SIZE, replace=False)
        state = train_step(*state, images[rows], digits[rows])
    return {"params": state[0], "batch_stats": state[1]}


def milliseconds(calls: list[Any]) -> np.ndarray:
    """The lower quartile of each call's times, taking turns."""
    times = np.empty((RUNS + 1, len(calls)))
    for i, j in np.ndindex(times.shape):
        start = time.perf_counter()
        jax.block_until_ready(calls[j]())
        times[i, j] = time.perf_counter() - start
    return 1e3 * np.quantile(times[1:], 0.25, axis=0)  # the first compiles


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=Path(__file__).name, description="Folds batch norms.")
    parser.add_argument("--steps", default=150, type=int, help="batches to train on")
    steps = parser.parse_args(argv).steps
    if steps < 1:
        parser.error("--steps must be at least 1")
    images, digits = load_digits()
    variables = train(images[:-TEST], digits[:-TEST], steps)
    shown, answers = images[-TEST:], digits[-TEST:]

    pairs = jaxnorm.models.find_pairs(Net().apply, variables, shown[:1])
    print(*(f"{pair.norm} goes into {pair.layer}" for pair in pairs), sep="\n")
    folded = jaxnorm.models.fold(variables, pairs)
    before: Any = functools.partial(jax.jit(Net().apply), variables)
    after: Any = functools.partial(jax.jit(Net(norms=False).apply), folded)
    logits = np.stack([before(shown), after(shown)])
    accuracies = (logits.argmax(-1) == answers).mean(1)
    difference = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    times = milliseconds([lambda: before(shown[:1]), lambda: after(shown[:1])])
    for i, name in enumerate(("with norms", "folded")):
        print(f"{name}: test accuracy {accuracies[i]:.3f}, {times[i]:.3f} ms an image")
    print(f"largest difference, of the largest value: {difference:.1e}")
    print(f"time folded / with norms: {times[1] / times[0]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
