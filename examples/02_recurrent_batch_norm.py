"""Read handwritten digits four pixels at a time, in an LSTM with recurrent batch norm.

From the root of the repository, in some ten seconds each on two CPU cores:

    python examples/02_recurrent_batch_norm.py
    python examples/02_recurrent_batch_norm.py --norm none

As in Cooijmans et al. (2016, https://arxiv.org/abs/1603.09025), three norms have
statistics of their own for each step: of what the gates get from the input, of what
they get from the state, and of the cell. With --norm shared, all steps share them.

An image is a sequence of up to 16 steps and ends with its last ink. Sequences are of
different length, and masks keep what follows their ends out of the statistics.

The last line is the accuracy on images never trained on, by the running statistics.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets
from tqdm import tqdm

import jaxnorm

STEPS, PIXELS, HIDDEN, CLASSES = 16, 4, 64, 10
BATCH_SIZE, RATE = 128, 0.01

# Steps after the first `max_steps` share the last statistics: with 1, all share them.
NORMS = {
    "recurrent": jaxnorm.RecurrentBatchNorm(max_steps=STEPS, momentum=0.9),
    "shared": jaxnorm.RecurrentBatchNorm(max_steps=1, momentum=0.9),
    "none": None,
}


def initialize(norm: jaxnorm.Norm | None, seed: int) -> tuple[dict, dict]:
    """Parameters and statistics; each norm has those under its name."""
    keys = jax.random.split(jax.random.key(seed), 3)
    orthogonal = jax.nn.initializers.orthogonal()
    params: dict[str, Any] = {
        "input_weight": orthogonal(keys[0], (PIXELS, 4 * HIDDEN)),
        "state_weight": orthogonal(keys[1], (HIDDEN, 4 * HIDDEN)),
        # Of the input, forget and output gates and the candidate; only the second is
        # open to begin with.
        "gate_bias": jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0]), HIDDEN),
        "head": orthogonal(keys[2], (HIDDEN, CLASSES)),
    }
    if norm is None:
        return params, {}
    sizes = {"input": (4 * HIDDEN,), "state": (4 * HIDDEN,), "cell": (HIDDEN,)}
    params |= {name: norm.init_params(shape) for name, shape in sizes.items()}
    # The gates have a bias already.
    del params["input"]["bias"], params["state"]["bias"]
    return params, {name: norm.init_stats(shape) for name, shape in sizes.items()}


def lstm(norm: jaxnorm.Norm | None, params, stats, batch, train: bool):
    """The state at the end of each sequence, and the new statistics."""

    def one_step(carry, now):
        (state, cell, stats), (step, pixels) = carry, now
        stats, going_on = dict(stats), (step < batch["length"])[:, None]

        def normalized(name, x):
            if norm is None:
                return x
            y, stats[name] = norm(
                x,
                params[name],
                stats[name],
                use_running_average=not train,
                mask=going_on,
                step=step,
            )
            return y

        gates = normalized("input", pixels @ params["input_weight"])
        gates += normalized("state", state @ params["state_weight"])
        i, f, o, new = jnp.split(gates + params["gate_bias"][None], 4, axis=-1)
        new = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(new)
        out = jax.nn.sigmoid(o) * jnp.tanh(normalized("cell", new))
        # A sequence that has ended keeps its last state.
        state, cell = jnp.where(going_on, out, state), jnp.where(going_on, new, cell)
        return (state, cell, stats), None

    zeros = jnp.zeros((len(batch["pixels"]), HIDDEN))
    steps = jnp.arange(STEPS), batch["pixels"].swapaxes(0, 1)
    (state, _, stats), _ = jax.lax.scan(one_step, (zeros, zeros, stats), steps)
    return state, stats


def loss_fn(params, stats, batch, norm, train: bool):
    state, stats = lstm(norm, params, stats, batch, train)
    logits, labels = state @ params["head"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (stats, (logits.argmax(-1) == labels).mean())


def load_digits() -> tuple[dict, dict]:
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = (images / 16).astype(np.float32).reshape(-1, STEPS, PIXELS)
    last_ink_first = np.any(pixels > 0, axis=2)[:, ::-1]
    length = STEPS - np.argmax(last_ink_first, axis=1)
    data = {"pixels": pixels, "length": length, "label": labels}
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = ({k: v[i] for k, v in data.items()} for i in np.split(order, [-360]))
    return train, test


def fit(norm: jaxnorm.Norm | None, data: dict, steps: int, seed: int):
    """Parameters and statistics after `steps` batches."""
    rate = optax.cosine_decay_schedule(RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    @jax.jit
    def train_step(params, stats, opt_state, batch):
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (stats, _)), grads = grad_fn(params, stats, batch, norm, train=True)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    params, stats = initialize(norm, seed)
    opt_state, rng = optimizer.init(params), np.random.default_rng(seed)
    bar = tqdm(range(steps), "training", leave=False, disable=None)
    for _ in bar:
        rows = rng.choice(len(data["label"]), BATCH_SIZE, replace=False)
        batch = {k: v[rows] for k, v in data.items()}
        params, stats, opt_state, loss = train_step(params, stats, opt_state, batch)
        bar.set_postfix(loss=f"{loss:.4f}")
    return params, stats


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=Path(__file__).name, description="Read digits with an LSTM.")
    parser.add_argument("--norm", default="recurrent", choices=NORMS)
    parser.add_argument("--steps", default=300, type=int, help="batches to train on")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if not 0 <= options.seed < 2**32:
        parser.error("--seed must be from 0 to 2**32 - 1")

    (train, test), norm = load_digits(), NORMS[options.norm]
    params, stats = fit(norm, train, options.steps, options.seed)
    if norm is not None:
        deviations = jnp.sqrt(stats["cell"]["var"].mean(axis=1))
        print("deviation of the cell, by step:", *(f"{d:.2f}" for d in deviations))
    evaluate = jax.jit(partial(loss_fn, norm=norm, train=False))
    _, (_, accuracy) = evaluate(params, stats, test)
    print(f"test accuracy with running statistics: {accuracy:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
