"""Batch norm trains well because it reduces internal covariate shift.

**Said by** Ioffe and Szegedy ([2015](https://arxiv.org/abs/1502.03167)), title and
section 2: the change of a layer's inputs while the layers before it train is what batch
norm reduces, and why training is fast. Santurkar et al.
([2018](https://arxiv.org/abs/1805.11604)) deny it: batch norm followed by noise, whose
mean and scale change at each step, brings the shift back and trains as well; batch norm
makes the loss smoother instead.

**Set-up.** A dense net of 5 layers of 100 tanhs, batches of 100, 600 steps at a
constant rate of 0.1 and of 0.5: without a norm, with batch norm, and with batch norm
whose output gets noise: each feature of each layer is multiplied by a number from 0.5
to 1.5 and moved by one from -0.5 to 0.5, new at each step. Every tenth step measures,
on 1,000 training images, the drift of the input of the fifth tanh over one step (the
mean over features of the change of the mean, in deviations), and the range of the loss
of a batch along its gradient, at steps of up to twice the rate. "Loss" is the mean over
the last 60 steps.

**Scale.** It answers to figures 1, 2 and 4 of Santurkar et al., with a small dense net
in the place of VGG on CIFAR-10.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments import data, figures, fit
from experiments.nets import NORMS, Dense, Tree
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, thinned, timed
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
ARMS = ("none", "batch", "noisy batch")
RATES, EVERY = (0.1, 0.5), 10
ALONG = (0.25, 0.5, 1.0, 1.5, 2.0)  # steps along the gradient, in units of the rate


def arm(norm: str, rate: float = 0.1) -> dict:
    return {"norm": norm, "rate": rate}


RULE = {
    "premise": Comparison(
        "rate 0.1: without a norm the input of layer 5 drifts more per step than with "
        "batch norm, by more than 0.02 deviations",
        "drift",
        arm("none"),
        arm("batch"),
        more_than=0.02,
    ),
    "gain": Comparison(
        "rate 0.1: with the shift brought back by noise, the gain is gone: the "
        "training loss is lower than without a norm by less than 0.02",
        "loss",
        arm("none"),
        arm("noisy batch"),
        less_than=0.02,
    ),
}
BESIDE = {
    "noise_drifts": Comparison(
        "rate 0.1: batch norm with noise drifts more than no norm at all",
        "drift",
        arm("noisy batch"),
        arm("none"),
        more_than=0.0,
    ),
    "cost": Comparison(
        "rate 0.1: noise after batch norm costs more than 0.02 of training loss",
        "loss",
        arm("noisy batch"),
        arm("batch"),
        more_than=0.02,
    ),
    "smoother": Comparison(
        "rate 0.1: the loss along the gradient ranges more widely without a norm than "
        "with noisy batch norm",
        "range",
        arm("none"),
        arm("noisy batch"),
        more_than=0.0,
    ),
}
SENTENCE = """At rate 0.1 the input of layer 5 drifts by {premise.left:.3f} deviations
per step without a norm, by {premise.right:.3f} with batch norm and by
{noise_drifts.left:.3f} with batch norm and noise; the training loss after 600 steps is
{gain.left:.3f}, {cost.right:.3f} and {gain.right:.3f}."""


NET = {name: Dense(NORMS[name.split()[-1]], 5, 100, "tanh") for name in ARMS}


def measure(options: Options) -> list[Run]:
    train = data.images(options.data, options.data_dir).train
    kinds = [(n, r, s) for n in ARMS for r in RATES for s in options.seed_range(5)]
    bar = tqdm(kinds, "runs", leave=False, disable=None)
    return [one_run(*kind, train, options.steps(600)) for kind in bar]


def one_run(norm: str, rate: float, seed: int, train: data.Split, steps: int) -> Run:
    net, noisy = NET[norm], norm.startswith("noisy")
    plan = fit.Plan(steps, 100, "constant")
    state, probe = plan.start(net, train.inputs.shape[1:], seed), train.inputs[:1000]
    losses, drifts, ranges = [], [], []
    key = jax.random.key(seed)
    with timed() as seconds:
        for i, rows in enumerate(fit.orders(seed, len(train.labels), 100, steps)):
            now, after = (jax.random.fold_in(key, j) for j in (i, i + 1))
            batch, before = train.take(rows), state
            new, loss = step(net, noisy, plan, state, rate, batch, now)
            losses.append(loss)
            if i % EVERY == 0:
                ends = ((before, now), (new, after))
                first, second = (last_input(net, noisy, s, probe, k) for s, k in ends)
                drifts.append(drift(first, second))
                ranges.append(range_along(net, noisy, before, rate, batch, now))
            state = new
        losses, drifts, ranges = (
            [float(v) for v in values] for values in (losses, drifts, ranges)
        )
        found = {
            "loss": float(np.mean(losses[-60:])),
            "drift": float(np.mean(drifts)),
            "range": float(np.mean(ranges)),
        }
        return Run(arm(norm, rate), seed, found, thinned(losses, 40), seconds=seconds())


def forward(net: Dense, noisy: bool, params: Tree, stats: Tree, x, key):
    """Logits, new statistics, and what the last tanh gets."""
    hidden = (params["hidden"], stats["hidden"])
    rest = [nth(hidden, i) for i in range(net.depth - 1)]
    x, new, y = x.reshape(len(x), -1), [], x
    for i, (p, s) in enumerate([(params["first"], stats["first"]), *rest]):
        y, s = net.norm(x @ p["weight"], p["norm"], s)
        y = noise(jax.random.fold_in(key, i), y) if noisy else y
        x = jnp.tanh(y)
        new.append(s)
    hidden = jax.tree.map(lambda *v: jnp.stack(v), *new[1:])
    logits = x @ params["head"] + params["head_bias"][None]
    return logits, {"first": new[0], "hidden": hidden}, y


def nth(tree, i: int):
    return jax.tree.map(lambda v: v[i], tree)


def noise(key, y):
    """Each feature, scaled and moved at random."""
    scale, shift = jax.random.uniform(key, (2, 1, y.shape[1]), minval=-0.5, maxval=0.5)
    return y * (1 + scale) + shift


def loss_fn(params, net, noisy, stats, batch: data.Split, key):
    logits, new, _ = forward(net, noisy, params, stats, batch.inputs, key)
    return fit.cross_entropy(logits, batch.labels), new


@partial(jax.jit, static_argnums=(0, 1, 2))
def step(net, noisy, plan: fit.Plan, state: fit.State, rate, batch, key):
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, stats), grads = value_and_grad(
        state.params, net, noisy, state.stats, batch, key
    )
    return plan.moved(state, grads, stats, rate), loss


@partial(jax.jit, static_argnums=(0, 1))
def last_input(net, noisy, state: fit.State, x, key):
    return forward(net, noisy, state.params, state.stats, x, key)[2]


@jax.jit
def drift(first, second):
    """How far the mean of each feature moves, in deviations; the mean over features."""
    moved = jnp.abs(second.mean(0) - first.mean(0))
    return (moved / (first.std(0) + 1e-6)).mean()


@partial(jax.jit, static_argnums=(0, 1))
def range_along(net, noisy, state: fit.State, rate, batch, key):
    """The highest less the lowest loss of the batch along its gradient."""
    stats = state.stats
    grads = jax.grad(loss_fn, has_aux=True)(
        state.params, net, noisy, stats, batch, key
    )[0]

    def moved(size):
        params = jax.tree.map(lambda p, g: p - size * rate * g, state.params, grads)
        return loss_fn(params, net, noisy, stats, batch, key)[0]

    losses = jnp.stack([moved(size) for size in ALONG])
    return losses.max() - losses.min()


def values(runs: Sequence[Run], metric: str, **settings) -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of(settings)]


def tables(runs: Sequence[Run]) -> list[Table]:
    rows = [
        [f"{rate:g}", norm]
        + [
            mean_and_spread(values(runs, metric, norm=norm, rate=rate), 3)
            for metric in ("loss", "drift", "range")
        ]
        for rate in RATES
        for norm in ARMS
    ]
    head = [
        "Rate",
        "Norm",
        "Training loss",
        "Drift per step",
        "Range along the gradient",
    ]
    return [Table("Means over the training", head, rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(3)
    for norm in ARMS:
        curves = [run.curve for run in runs if run.is_of(arm(norm))]
        x = np.linspace(0, 600, len(curves[0]))
        style = {"color": COLORS[norm], "marker": ""}
        figures.band(axes[0], x, np.array(curves), norm, **style)
    figures.name_axes(axes[0], "training loss, rate 0.1", "step", "", yscale="log")
    for ax, metric, title in zip(axes[1:], ("drift", "range"), TITLES, strict=True):
        found = {norm: values(runs, metric, **arm(norm)) for norm in ARMS}
        figures.bars(ax, found)
        figures.name_axes(ax, title, "", "")
    axes[0].legend()
    return figure


TITLES = ("drift of layer 5's input per step", "range of the loss along the gradient")
COLORS = {**figures.COLORS, "noisy batch": "#e6550d"}
