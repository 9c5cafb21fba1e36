"""Batch norm lets deep nets of sigmoids and tanhs train.

**Said by** Ioffe and Szegedy ([2015](https://arxiv.org/abs/1502.03167)), section 1:
batch norm "makes it possible to use saturating nonlinearities by preventing the network
from getting stuck in the saturated modes"; section 4.2.1 trains an Inception of
sigmoids to 69.8 % on ImageNet, which without it never did better than chance.

**Set-up.** Dense nets of 3, 10 and 20 layers of 100 units, between input and head;
batches of 100, 300 steps of gradient descent with momentum 0.9 and a rate that falls as
a cosine. Sigmoid and tanh, each without a norm, with batch norm and with layer norm
before the activation. Weights start with variance 1 / fan-in. "Norm of the gradient" is
that of the loss with respect to the weights of each layer, before the first step.

**Scale.** It answers to figure 3 of the paper (the curve "BN-x5-Sigmoid"), with small
dense nets and small images in the place of an Inception net on ImageNet.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, figures, fit
from experiments.nets import NORMS, Dense
from experiments.results import Table, mean_and_spread
from experiments.runs import SWEEP, Options, Run, all_tuned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
DEPTHS, WIDTH = (3, 10, 20), 100
ACTIVATIONS, ARMS = ("sigmoid", "tanh"), ("none", "batch", "layer")


def arm(activation: str, depth: int, norm: str) -> dict:
    return {"activation": activation, "depth": depth, "norm": norm}


def saves(activation: str, depth: int, norm: str, least: float) -> Comparison:
    return Comparison(
        f"{depth} layers of {activation}: {norm} norm saves more than {least:g} points "
        "of test error against no norm",
        "error",
        arm(activation, depth, "none"),
        arm(activation, depth, norm),
        more_than=least,
    )


RULE = {
    "sigmoid": saves("sigmoid", 20, "batch", 5.0),
    "tanh": saves("tanh", 20, "batch", 5.0),
}
BESIDE = {
    "sigmoid_3": saves("sigmoid", 3, "batch", 1.0),
    "tanh_3": saves("tanh", 3, "batch", 1.0),
    "sigmoid_layer": saves("sigmoid", 20, "layer", 5.0),
    "tanh_layer": saves("tanh", 20, "layer", 5.0),
}
SENTENCE = """20 layers of sigmoids err on {sigmoid.left:.1f} % of the test images
without a norm, on {sigmoid_layer.right:.1f} % with layer norm and on
{sigmoid.right:.1f} % with batch norm; 20 layers of tanhs on {tanh.left:.1f} %,
{tanh_layer.right:.1f} % and {tanh.right:.1f} %."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    plan = fit.Plan(options.steps(300), batch=100)
    arms = [
        (arm(a, d, n), fit.trainer(Dense(NORMS[n], d, WIDTH, a), plan, images))
        for a in ACTIVATIONS
        for d in options.some(DEPTHS)
        for n in ARMS
    ]
    runs = all_tuned(arms, options.rates(), options.seed_range(3))
    batch = images.train.take(np.arange(plan.batch))
    return runs + [gradients(a, n, batch) for a in ACTIVATIONS for n in ARMS]


def gradients(activation: str, norm: str, batch: data.Split) -> Run:
    """The norm of the gradient of each layer's weights before any step."""
    net = Dense(NORMS[norm], 20, WIDTH, activation)
    params, stats = fit.initialize(net, batch.inputs.shape[1:], 0)
    grads = jax.grad(partial(fit.loss_fn, net), has_aux=True)(params, stats, batch)[0]
    by_layer = [grads["first"]["weight"], *grads["hidden"]["weight"]]
    norms = [float(jnp.linalg.norm(layer)) for layer in by_layer]
    return Run(arm(activation, 20, norm), 0, {}, norms, stage="start")


def errors(runs: Sequence[Run], activation: str, norm: str) -> dict[int, list[float]]:
    """The test errors of all seeds, by depth."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.is_of({"activation": activation, "norm": norm}):
            found.setdefault(run.arm["depth"], []).append(run.metrics["error"])
    return dict(sorted(found.items()))


def tables(runs: Sequence[Run]) -> list[Table]:
    kinds = [(a, n) for a in ACTIVATIONS for n in ARMS]
    rows = [
        [a, n, *(mean_and_spread(v) for v in errors(runs, a, n).values())]
        for a, n in kinds
    ]
    depths = [f"{depth} layers" for depth in errors(runs, *kinds[0])]
    swept = [
        [a, n, *(f"{v:.1f}" for v in sweep(runs, a, n).values())] for a, n in kinds
    ]
    rates = [f"{rate:g}" for rate in sweep(runs, *kinds[0])]
    title = "20 layers: test error in percent by rate, one run"
    return [
        Table("Test error in percent", ["Units", "Norm", *depths], rows),
        Table(title, ["Units", "Norm", *rates], swept),
    ]


def sweep(runs: Sequence[Run], activation: str, norm: str) -> dict[float, float]:
    """The test error of 20 layers at each rate that was tried."""
    kind = arm(activation, 20, norm)
    return {
        run.arm["rate"]: run.metrics["error"]
        for run in runs
        if run.stage == SWEEP and kind.items() <= run.arm.items()
    }


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(3)
    for ax, activation in zip(axes, ACTIVATIONS, strict=False):
        for norm in ARMS:
            found = errors(runs, activation, norm)
            figures.band(ax, [*found], np.array([*found.values()]).T, norm)
        title = f"{activation}: test error (%)"
        figures.name_axes(ax, title, "layers", "", xscale="log", ylim=(0, 95))
        figures.plain_ticks(ax, DEPTHS)
    for run in runs:
        if run.stage == "start" and run.arm["activation"] == "sigmoid":
            name = run.arm["norm"]
            axes[2].semilogy(run.curve, label=name, color=figures.COLORS[name])
    figures.name_axes(axes[2], "sigmoid: gradient at the start", "layer", "")
    axes[0].legend()
    return figure
