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

import sys
from functools import partial
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def loss_fn(variables, batch, norm, train: bool = True):
    """The loss, and what goes with it: the new statistics and the right answers."""
    params, stats = variables["params"], variables["batch_stats"]
    state, stats = lstm(norm, params, stats, batch, train)
    logits, labels = state @ params["head"], batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), stats, (logits.argmax(-1) == labels).mean()


def sequences(data: digits.Digits) -> dict[str, np.ndarray]:
    """Images as sequences that end with their last ink."""
    pixels = data.images.reshape(-1, STEPS, PIXELS)
    last_ink_first = np.any(pixels > 0, axis=2)[:, ::-1]
    length = STEPS - np.argmax(last_ink_first, axis=1)
    return {"pixels": pixels, "length": length, "label": data.labels}


def fit(norm: jaxnorm.Norm | None, data: digits.Digits, steps: int, seed: int):
    """Parameters and statistics after `steps` batches."""
    rate = optax.cosine_decay_schedule(RATE, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    params, stats = initialize(norm, seed)
    return digits.fit(
        {"params": params, "batch_stats": stats},
        map(sequences, data.batches(BATCH_SIZE, seed)),
        steps,
        optimizer,
        loss=lambda variables, batch: loss_fn(variables, batch, norm)[:2],
    )


def main(argv: list[str] | None = None) -> int:
    parser = digits.Parser(__file__, "Read digits with an LSTM.")
    parser.add_argument("--norm", default="recurrent", choices=NORMS)
    parser.add_argument("--steps", default=300, type=int, help="batches to train on")
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if not 0 <= options.seed < 2**32:
        parser.error("--seed must be from 0 to 2**32 - 1")

    (train, test), norm = digits.load(), NORMS[options.norm]
    variables = fit(norm, train, options.steps, options.seed)
    if norm is not None:
        deviations = jnp.sqrt(variables["batch_stats"]["cell"]["var"].mean(axis=1))
        print("deviation of the cell, by step:", *(f"{d:.2f}" for d in deviations))
    evaluate = jax.jit(partial(loss_fn, norm=norm, train=False))
    *_, accuracy = evaluate(variables, sequences(test))
    print(f"test accuracy with running statistics: {accuracy:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
