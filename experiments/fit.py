"""How is a net trained, and how is it tested?"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from experiments.data import Data, Split
from experiments.nets import Tree
from experiments.runs import Train, thinned

CHANCE = 90.0  # percent wrong, of ten classes
AT_ONCE = 5000  # images of a test


class State(NamedTuple):
    params: Any
    stats: Any
    opt_state: Any


@dataclass(frozen=True)
class Plan:
    """Gradient descent with momentum, at a constant rate or one that falls to 0."""

    steps: int
    batch: int = 64
    schedule: str = "cosine"
    momentum: float = 0.9

    def optimizer(self, rate) -> optax.GradientTransformation:
        rates = optax.constant_schedule(rate)
        if self.schedule == "cosine":
            rates = optax.cosine_decay_schedule(rate, self.steps)
        return optax.sgd(rates, self.momentum or None)

    def start(self, net, shape: tuple[int, ...], seed: int) -> State:
        params, stats = initialize(net, shape, seed)
        return State(params, stats, self.optimizer(0.0).init(params))

    def moved(self, state: State, grads, stats, rate) -> State:
        """The state after a step along `grads`."""
        updates, opt_state = self.optimizer(rate).update(
            grads, state.opt_state, state.params
        )
        return State(optax.apply_updates(state.params, updates), stats, opt_state)


def initialize(net, shape: tuple[int, ...], seed: int) -> tuple[Tree, Tree]:
    return net.init(np.random.default_rng(seed), shape)


def loss_fn(net, params, stats, batch: Split, train: bool = True, **inputs):
    """The mean cross-entropy, and the new statistics."""
    logits, stats = net(params, stats, batch.inputs, train, **inputs)
    return cross_entropy(logits, batch.labels), stats


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def step(net, plan: Plan, state: State, rate, data: Split, rows) -> tuple[State, Array]:
    """The state after one batch, and its loss."""
    value_and_grad = jax.value_and_grad(partial(loss_fn, net), has_aux=True)
    batch = data.take(rows)
    (loss, stats), grads = value_and_grad(state.params, state.stats, batch)
    return plan.moved(state, grads, stats, rate), loss


def orders(seed: int, size: int, batch: int, steps: int) -> Iterator[np.ndarray]:
    """The rows of each batch: one permutation of the data after another."""
    rng, whole = np.random.default_rng(seed), size // batch
    epochs = (rng.permutation(size)[: whole * batch] for _ in itertools.count())
    batches = (rows.reshape(whole, batch) for rows in epochs)
    return itertools.islice(itertools.chain.from_iterable(batches), steps)


class Fitted(NamedTuple):
    params: Tree
    stats: Tree
    losses: list[float]


def fit(net, plan: Plan, data: Split, rate: float, seed: int) -> Fitted:
    """Trains; the seed sets the weights and the order of the data."""
    state = plan.start(net, data.inputs.shape[1:], seed)
    losses = []
    for rows in orders(seed, len(data.labels), plan.batch, plan.steps):
        state, loss = step(net, plan, state, rate, data, rows)
        losses.append(loss)
    return Fitted(state.params, state.stats, [float(loss) for loss in losses])


@partial(jax.jit, static_argnums=0)
def wrong_and_loss(net, params, stats, data: Split) -> tuple[Array, Array]:
    """The share of wrong answers and the loss, by the running statistics."""
    logits, _ = net(params, stats, data.inputs, False)
    wrong = (logits.argmax(-1) != data.labels).mean()
    return wrong, cross_entropy(logits, data.labels)


def tested(net, fitted: Fitted, data: Split) -> tuple[float, float]:
    """Percent wrong, and the loss. A net that has diverged answers by chance."""
    parts = [data.take(slice(i, i + AT_ONCE)) for i in range(0, data.size, AT_ONCE)]
    found = [wrong_and_loss(net, fitted.params, fitted.stats, part) for part in parts]
    wrong, loss = np.average(found, 0, [part.size for part in parts])
    return (100 * float(wrong), float(loss)) if np.isfinite(loss) else (CHANCE, np.nan)


def metrics(net, fitted: Fitted, data: Data) -> dict[str, float]:
    error, loss = tested(net, fitted, data.test)
    validation, _ = tested(net, fitted, data.validation)
    return {"error": error, "loss": loss, "validation": validation}


def trainer(net, plan: Plan, data: Data, more: Callable | None = None) -> Train:
    """How an arm trains and what is measured; `more` adds to that."""

    def train(rate: float, seed: int):
        fitted = fit(net, plan, data.train, rate, seed)
        found = metrics(net, fitted, data)
        return found | (more(net, fitted) if more else {}), thinned(fitted.losses)

    return train
