"""Batch norm in a recurrent net fails, unless each step has its own statistics.

**Said by** Laurent et al. ([2015](https://arxiv.org/abs/1510.01378)), who found that
batch norm of the hidden-to-hidden transition does not help training. Cooijmans et al.
([2016](https://arxiv.org/abs/1603.09025)) name the conjecture that it makes gradients
explode, by scaling again at each step, and have it work, with statistics of each step
and a scale that starts at 0.1.

**Set-up.** An LSTM of 64 units reads scikit-learn's digits, four pixels at a time, up
to the last ink, with masks for what follows: 200 steps of Adam in batches of 128, five
rates from 0.001 to 0.1, clipped gradients. Without a norm; with batch norm of what the
gates get from the input only ("vertical"); with batch norm of input, state and cell
("shared": one set of statistics for all steps, "per step": one for each). The gradient:
a tanh net of 64 units that starts from orthogonal weights, its loss differentiated by
the state after each of 16 steps, before any training, without a norm and with batch
norm of the state by the statistics of the batch at that step, for scales from 0.1 to
1.5. "Growth" is log10 of the gradient at the first step over that at the last; above 0
it explodes. In training every step normalizes by the batch at that step; what is
shared, or not, are the running statistics, which the test uses.

**Scale.** It answers to figure 1 (gradients) and table 1 (sequential MNIST) of
Cooijmans et al., with 16 steps in the place of 784.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

import jaxnorm
from experiments import data, figures, fit
from experiments.nets import NORMS
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned, thinned
from experiments.verdict import Comparison

DATA = ("digits",)
STEPS, HIDDEN, BATCH = 16, 64, 128
RATES, SCALES = (0.001, 0.003, 0.01, 0.03, 0.1), (0.1, 0.5, 1.0, 1.5)
PER_STEP = jaxnorm.RecurrentBatchNorm(max_steps=STEPS, momentum=0.9)
# Steps after the first `max_steps` share the last statistics: with 1, all share them.
SHARED = jaxnorm.RecurrentBatchNorm(max_steps=1, momentum=0.9)
PLACES = ("input", "state", "cell")
ARMS: dict[str, dict[str, jaxnorm.Norm]] = {
    "none": {},
    "vertical": {"input": SHARED},
    "shared": dict.fromkeys(PLACES, SHARED),
    "per step": dict.fromkeys(PLACES, PER_STEP),
}


def errs(says: str, left: str, right: str, **limit: float) -> Comparison:
    return Comparison(says, "error", {"norm": left}, {"norm": right}, **limit)


RULE = {
    "shared": errs(
        "statistics shared by all steps cost more than 1 point of test error against "
        "no norm",
        "shared",
        "none",
        more_than=1.0,
    ),
    "per_step": errs(
        "statistics of each step save more than 1 point of test error against shared "
        "ones",
        "shared",
        "per step",
        more_than=1.0,
    ),
    "explodes": Comparison(
        "tanh net with batch norm of scale 1: the gradient at the first step is more "
        "than 10 times that at the last (growth above 1)",
        "growth",
        {"gradient": "batch", "scale": 1.0},
        more_than=1.0,
    ),
}
BESIDE = {
    "fixed": errs(
        "statistics of each step err less than 1 point more than no norm",
        "per step",
        "none",
        less_than=1.0,
    ),
    "vertical": errs(
        "statistics of the input alone cost more than 1 point against no norm",
        "vertical",
        "none",
        more_than=1.0,
    ),
    "vanishes": Comparison(
        "tanh net: with batch norm of scale 0.1 the gradient shrinks faster than "
        "without a norm",
        "growth",
        {"gradient": "none"},
        {"gradient": "batch", "scale": 0.1},
        more_than=0.0,
    ),
}
SENTENCE = """An LSTM errs on {shared.right:.1f} % of the test digits without a norm, on
{shared.left:.1f} % with batch norm whose statistics all steps share, and on
{per_step.right:.1f} % where each step has its own; the gradient of a tanh net at its
first step is 10^{explodes.left:.1f} times that at its last with batch norm of scale 1,
10^{vanishes.right:.1f} times with a scale of 0.1, and 10^{vanishes.left:.1f} times
without a norm."""


def measure(options: Options) -> list[Run]:
    parts = data.sequences("digits")
    steps, seeds = options.steps(200), options.seed_range(5)
    arms = [({"norm": name}, trainer(name, steps, parts)) for name in ARMS]
    runs = all_tuned(arms, options.rates(RATES), seeds)
    kinds = [("none", 1.0), *(("batch", scale) for scale in SCALES)]
    bar = tqdm(kinds, "gradients", leave=False, disable=None)
    return runs + [growth(*k, seed, parts[0]) for k in bar for seed in seeds]


def orthogonal(rng: np.random.Generator, fan_in: int, fan_out: int) -> jax.Array:
    """Rows or columns, whichever are fewer, are orthonormal."""
    size = max(fan_in, fan_out), min(fan_in, fan_out)
    values, _ = np.linalg.qr(rng.normal(size=size))
    values = values if fan_in >= fan_out else values.T
    return jnp.asarray(values, jnp.float32)


def initialize(name: str, seed: int) -> tuple[dict, dict]:
    """Parameters and statistics; each norm has those under its place."""
    rng = np.random.default_rng(seed)
    params: dict[str, Any] = {
        "input_weight": orthogonal(rng, 4, 4 * HIDDEN),
        "state_weight": orthogonal(rng, HIDDEN, 4 * HIDDEN),
        # Of the input, forget and output gates and the candidate; the second is open.
        "gate_bias": jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0]), HIDDEN),
        "head": orthogonal(rng, HIDDEN, 10),
    }
    sizes = {"input": (4 * HIDDEN,), "state": (4 * HIDDEN,), "cell": (HIDDEN,)}
    norms = ARMS[name]
    params |= {place: norm.init_params(sizes[place]) for place, norm in norms.items()}
    for place in {"input", "state"} & norms.keys():
        del params[place]["bias"]  # the gates have one
    return params, {k: norm.init_stats(sizes[k]) for k, norm in norms.items()}


def lstm(name: str, params, stats, batch: data.Sequences, train: bool):
    """The state at the end of each sequence, and the new statistics."""

    def one_step(carry, now):
        (state, cell, stats), (step, x) = carry, now
        stats, going_on = dict(stats), (step < batch.lengths)[:, None]
        how = {"use_running_average": not train, "mask": going_on, "step": step}

        def normalized(place, x):
            if place in stats:
                norm = ARMS[name][place]
                x, stats[place] = norm(x, params[place], stats[place], **how)
            return x

        gates = normalized("input", x @ params["input_weight"])
        gates += normalized("state", state @ params["state_weight"])
        i, f, o, new = jnp.split(gates + params["gate_bias"][None], 4, axis=-1)
        new = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(new)
        out = jax.nn.sigmoid(o) * jnp.tanh(normalized("cell", new))
        # A sequence that has ended keeps its last state.
        state, cell = jnp.where(going_on, out, state), jnp.where(going_on, new, cell)
        return (state, cell, stats), None

    zeros = jnp.zeros((len(batch.labels), HIDDEN))
    steps = jnp.arange(STEPS), batch.inputs.swapaxes(0, 1)
    (state, _, stats), _ = lax.scan(one_step, (zeros, zeros, stats), steps)
    return state, stats


def loss_fn(params, stats, batch: data.Sequences, name: str):
    state, stats = lstm(name, params, stats, batch, True)
    return fit.cross_entropy(state @ params["head"], batch.labels), stats


@partial(jax.jit, static_argnums=(0, 1))
def train_step(name: str, steps: int, state: fit.State, rate, data_, rows):
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = grad_fn(state.params, state.stats, data_.take(rows), name)
    updates, opt_state = adam(rate, steps).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return fit.State(params, stats, opt_state), loss


def adam(rate, steps: int) -> optax.GradientTransformation:
    rates = optax.cosine_decay_schedule(rate, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates))


@partial(jax.jit, static_argnums=0)
def error(name: str, params, stats, split: data.Sequences):
    """Percent wrong, by the running statistics."""
    state, _ = lstm(name, params, stats, split, False)
    return 100 * ((state @ params["head"]).argmax(-1) != split.labels).mean()


def trainer(name: str, steps: int, parts: list[data.Sequences]):
    train_set, validation, test = parts

    def train(rate: float, seed: int):
        params, stats = initialize(name, seed)
        state = fit.State(params, stats, adam(0.0, steps).init(params))
        losses = []
        for rows in fit.orders(seed, len(train_set.labels), BATCH, steps):
            state, loss = train_step(name, steps, state, rate, train_set, rows)
            losses.append(loss)
        found = {
            "error": float(error(name, state.params, state.stats, test)),
            "validation": float(error(name, state.params, state.stats, validation)),
        }
        return found, thinned([float(loss) for loss in losses])

    return train


def growth(norm: str, scale: float, seed: int, train: data.Sequences) -> Run:
    """The gradient by the state after each step, before any training."""
    rows = next(fit.orders(seed, len(train.labels), BATCH, 1))
    rng = np.random.default_rng(seed)
    sizes = ((4, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10))
    weights = [orthogonal(rng, *size) for size in sizes]
    norms = np.asarray(gradients(norm, scale, weights, train.take(rows)))
    found = {"growth": float(np.log10(norms[0] / norms[-1]))}
    return Run({"gradient": norm, "scale": scale}, seed, found, norms.tolist())


@partial(jax.jit, static_argnums=0)
def gradients(norm: str, scale, weights, batch: data.Sequences):
    """The norm of the gradient of the loss by the state of a tanh net, by step."""
    from_input, from_state, head = weights
    params = {k: scale * v for k, v in NORMS[norm].init_params((HIDDEN,)).items()}
    stats = NORMS[norm].init_stats((HIDDEN,))

    def loss(moves):
        state = jnp.zeros((len(batch.labels), HIDDEN))
        for step, move in enumerate(moves):
            x = batch.inputs[:, step] @ from_input + state @ from_state
            state = jnp.tanh(NORMS[norm](x, params, stats)[0]) + move
        return fit.cross_entropy(state @ head, batch.labels)

    moves = jnp.zeros((STEPS, len(batch.labels), HIDDEN))
    return jnp.linalg.norm(jax.grad(loss)(moves), axis=(1, 2))


def tables(runs: Sequence[Run]) -> list[Table]:
    errors = [[name, mean_and_spread(values(runs, {"norm": name}))] for name in ARMS]
    growths = [
        [name, mean_and_spread(values(runs, kind, "growth"), 2)]
        for name, kind in KINDS.items()
    ]
    return [
        Table("LSTM: test error in percent", ["Norm", "Error"], errors),
        Table("tanh net: growth of the gradient", ["Norm", "log10"], growths),
    ]


def values(runs: Sequence[Run], kind: dict, metric: str = "error") -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of(kind)]


KINDS = {"none": {"gradient": "none"}} | {
    f"batch, scale {scale:g}": {"gradient": "batch", "scale": scale} for scale in SCALES
}


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(2, width=4.0)
    figures.bars(axes[0], {name: values(runs, {"norm": name}) for name in ARMS})
    figures.name_axes(axes[0], "LSTM: test error (%)", "", "")
    for name, kind in KINDS.items():
        curves = np.array([run.curve for run in runs if run.is_of(kind)])
        figures.band(axes[1], range(1, STEPS + 1), curves, name, marker="")
    title = "tanh net: gradient by the state"
    figures.name_axes(axes[1], title, "step", "", yscale="log")
    axes[1].legend()
    return figure
