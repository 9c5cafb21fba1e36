"""What the examples share: digits, a small network, training, and a command line."""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn import datasets
from tqdm import tqdm

from jaxnorm.linen import BatchNorm

MOMENTUM = 0.9
Variables = dict[str, Any]  # "params" and "batch_stats"
Loss = Callable[[Variables, Any], tuple[jax.Array, Any]]  # and the new statistics


class Net(nn.Module):
    """Three convolutions, each with a batch norm."""

    @nn.compact
    def __call__(self, x, train):
        for features, stride in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(features, (3, 3), stride, use_bias=False)(x)
            norm = BatchNorm(use_running_average=not train, momentum=MOMENTUM)
            x = nn.relu(norm(x))
        return nn.Dense(10)(x.mean((1, 2)))


NET = Net()


class Digits(NamedTuple):
    images: np.ndarray  # float32, (N, 8, 8, 1), from 0 to 1
    labels: np.ndarray  # int32, (N,)

    def batches(self, size: int, seed: int = 0) -> Iterator["Digits"]:
        """Random batches without end."""
        rng = np.random.default_rng(seed)
        while True:
            rows = rng.choice(len(self.labels), size, replace=False)
            yield Digits(self.images[rows], self.labels[rows])


def load_all() -> Digits:
    """All 1797 digits, in an order of no meaning."""
    images, labels = map(np.asarray, datasets.load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(images))
    return Digits(images[order], labels[order].astype(np.int32))


def load() -> tuple[Digits, Digits]:
    """1437 digits to train on and 360 to test on."""
    images, labels = load_all()
    return Digits(images[360:], labels[360:]), Digits(images[:360], labels[:360])


def init(seed: int = 0, net: nn.Module = NET) -> Variables:
    return jax.jit(net.init, static_argnums=2)(
        jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), False
    )


def forward(
    variables: Variables, batch: Digits, net: nn.Module = NET
) -> tuple[jax.Array, Any]:
    """The loss in training mode, and the new statistics."""
    logits, new = net.apply(variables, batch.images, True, mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return loss.mean(), new["batch_stats"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(loss: Loss, optimizer, variables: Variables, opt_state, batch):
    """The variables after a step, the state of the optimizer, and the loss before."""
    params, stats = variables["params"], variables["batch_stats"]

    def of_params(params):
        return loss({"params": params, "batch_stats": stats}, batch)

    (value, stats), grads = jax.value_and_grad(of_params, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "batch_stats": stats}, opt_state, value


def fit(
    variables: Variables,
    batches: Iterable[Any],
    steps: int,
    optimizer,
    after_step: Callable[[Variables, jax.Array], None] = lambda variables, loss: None,
    loss: Loss = forward,
) -> Variables:
    """The variables after some steps; each is shown to `after_step`, with its loss."""
    opt_state = optimizer.init(variables["params"])
    numbers = tqdm(range(steps), leave=False, disable=None)
    for _, batch in zip(numbers, batches, strict=False):
        variables, opt_state, value = step(loss, optimizer, variables, opt_state, batch)
        after_step(variables, value)
    return variables


@functools.partial(jax.jit, static_argnames="net")
def accuracy(variables: Variables, digits: Digits, net: nn.Module = NET) -> jax.Array:
    """The share of right answers, by the running statistics."""
    logits: Any = net.apply(variables, digits.images, False)
    return (logits.argmax(-1) == digits.labels).mean()


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line of a file."""

    def __init__(self, file: str, description: str | None = None):
        super().__init__(Path(file).name, description=description)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def read_steps(file: str, argv: list[str] | None, default: int) -> int:
    """The number of steps that the command line asks for."""
    parser = Parser(file)
    parser.add_argument("--steps", default=default, type=int, help="to train for")
    steps = parser.parse_args(argv).steps
    if steps < 1:
        parser.error("--steps must be at least 1")
    return steps
