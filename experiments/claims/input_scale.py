"""Features of different scales slow training down; standardizing mends it.

**Said by** LeCun, Bottou, Orr and Müller (1998, "Efficient BackProp", section 4.3):
inputs should be shifted to mean 0 and scaled to the same variance, as the eigenvalues
of the Hessian otherwise differ widely and gradient descent is as slow as the flattest
direction.

**Set-up.** Softmax regression by gradient descent on all training rows at once, from
weights of 0, on wine (13 features, deviations from 0.1 to 300) and breast cancer (30
features): raw, and standardized by `jaxnorm.Standardizer` fitted to the training rows.
20 random splits, a quarter of the rows to test on. Eight rates, in units of 1 / L,
where L is half the largest eigenvalue of the mean of `x x'`, a bound of the curvature;
each arm runs at the one of the lowest final loss. "Condition" is the ratio of the
largest to the smallest eigenvalue; "steps to loss 0.1" counts at most the 1,000 steps
that were run.

**Scale.** The text has no experiment of its own to compare with; this is the problem it
describes, in full.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

import jaxnorm
from experiments import data, figures, fit
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, thinned, timed
from experiments.verdict import Comparison

DATA = ("tables",)
SETS, SCALES = ("wine", "breast cancer"), ("raw", "standardized")
RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
GOAL, SPECTRUM = 0.1, "spectrum"


def arm(name: str, scale: str) -> dict:
    return {"set": name, "scale": scale}


def raw_exceeds(name: str, metric: str, says: str, least: float) -> Comparison:
    raw, standardized = (arm(name, scale) for scale in SCALES)
    return Comparison(f"{name}: {says}", metric, raw, standardized, more_than=least)


def condition(name: str) -> Comparison:
    says = "raw features have more than 10 times the condition number (log10 above 1)"
    return raw_exceeds(name, "log10_condition", says, 1.0)


def steps(name: str) -> Comparison:
    says = f"raw features need more than 100 steps more to a training loss of {GOAL}"
    return raw_exceeds(name, "steps", says, 100.0)


def error(name: str) -> Comparison:
    says = "raw features cost more than 1 point of test error"
    return raw_exceeds(name, "error", says, 1.0)


RULE = {
    "wine": condition("wine"),
    "cancer": condition("breast cancer"),
    "wine_steps": steps("wine"),
    "cancer_steps": steps("breast cancer"),
}
BESIDE = {"wine_error": error("wine"), "cancer_error": error("breast cancer")}
SENTENCE = """Standardizing lowers the condition number from 10^{wine.left:.1f} to
10^{wine.right:.1f} for wine and from 10^{cancer.left:.1f} to 10^{cancer.right:.1f} for
breast cancer; a training loss of 0.1 takes {wine_steps.right:.0f} and
{cancer_steps.right:.0f} steps in the place of {wine_steps.left:.0f} and
{cancer_steps.left:.0f} (of at most 1,000), and the test error is {wine_error.right:.1f}
and {cancer_error.right:.1f} % in the place of {wine_error.left:.1f} and
{cancer_error.left:.1f} %."""


def measure(options: Options) -> list[Run]:
    found, count = data.tables(), 2 if options.quick else options.seeds or 20
    kinds = [(name, scale) for name in SETS for scale in SCALES]
    bar = tqdm(kinds, "arms", leave=False, disable=None)
    return [
        one
        for kind in bar
        for one in of_arm(*kind, found[kind[0]], range(count), options.steps(1000))
    ]


def of_arm(name: str, scale: str, table: data.Table, seeds: range, steps: int):
    with timed() as seconds:
        splits = [split(table, scale, seed) for seed in seeds]
        x, y, test_x, test_y = (np.stack(part) for part in zip(*splits, strict=True))
        spectra = np.array([np.linalg.eigvalsh(v.T @ v / len(v)) for v in x])
        curvatures = spectra[:, -1].astype(np.float32) / 2
        rates = np.array(RATES, np.float32)[:, None] / curvatures
        weights, losses = descend(
            steps, int(y.max()) + 1, x.astype(np.float32), y, rates
        )
        best = int(np.argmin(np.nan_to_num(losses[..., -1], nan=np.inf).mean(1)))
        weights, losses = np.asarray(weights)[best], np.asarray(losses)[best]
        wrong = ((test_x @ weights).argmax(-1) != test_y).mean(1)
        taken = seconds() / len(seeds)
    return [
        Run(
            arm(name, scale) | {"rate": RATES[best]},
            seed,
            {
                "error": 100 * float(wrong[i]),
                "steps": steps_to_goal(losses[i]),
                "log10_condition": log_condition(spectra[i]),
                "loss": float(losses[i, -1]),
            },
            thinned(losses[i], 40),
            seconds=taken,
        )
        for i, seed in enumerate(seeds)
    ] + [Run(arm(name, scale), 0, {}, spectra[0].tolist(), stage=SPECTRUM)]


def split(table: data.Table, scale: str, seed: int):
    """Training rows and test rows, with a feature of ones for the bias."""
    order = np.random.default_rng(seed).permutation(len(table.labels))
    cut = len(order) // 4
    test, train = order[:cut], order[cut:]
    x, test_x = table.inputs[train], table.inputs[test]
    if scale == "standardized":
        moments = jaxnorm.Standardizer.fit(x)
        x, test_x = (np.asarray(moments.apply(v), np.float64) for v in (x, test_x))
    x, test_x = (np.pad(v, ((0, 0), (0, 1)), constant_values=1) for v in (x, test_x))
    return x, table.labels[train], test_x, table.labels[test]


@partial(jax.jit, static_argnums=(0, 1))
def descend(steps: int, classes: int, x, y, rates):
    """Weights and losses after gradient descent, for each rate and each split."""

    def one(rate, x, y):
        def loss_fn(weights):
            return fit.cross_entropy(x @ weights, y)

        def step(weights, _):
            loss, grads = jax.value_and_grad(loss_fn)(weights)
            return weights - rate * grads, loss

        return lax.scan(step, jnp.zeros((x.shape[1], classes)), length=steps)

    return jax.vmap(jax.vmap(one), (0, None, None))(rates, x, y)


def steps_to_goal(losses: np.ndarray) -> float:
    reached = np.flatnonzero(losses < GOAL)
    return float(reached[0] if len(reached) else len(losses))


def log_condition(spectrum: np.ndarray) -> float:
    return float(np.log10(spectrum[-1] / spectrum[0]))


def values(runs: Sequence[Run], kind: dict, metric: str) -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of(kind)]


COLUMNS = {"log10_condition": 1, "steps": 0, "error": 1, "loss": 3}


def tables(runs: Sequence[Run]) -> list[Table]:
    rows = [
        [name, scale]
        + [
            mean_and_spread(values(runs, arm(name, scale), m), d)
            for m, d in COLUMNS.items()
        ]
        for name in SETS
        for scale in SCALES
    ]
    head = ["Data", "Features", "log10 of the condition", "Steps to loss 0.1"]
    return [Table("20 splits", [*head, "Test error (%)", "Final training loss"], rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(4, width=3.0)
    for i, name in enumerate(SETS):
        spectrum_ax, loss_ax = axes[2 * i : 2 * i + 2]
        for scale, color in zip(SCALES, ("#bc3754", "#1f77b4"), strict=True):
            kind = arm(name, scale)
            (one,) = (
                r for r in runs if r.stage == SPECTRUM and kind.items() <= r.arm.items()
            )
            spectrum_ax.semilogy(one.curve[::-1], ".-", color=color, label=scale)
            curves = np.array([run.curve for run in runs if run.is_of(kind)])
            x = np.linspace(0, 1000, curves.shape[1])
            figures.band(loss_ax, x, curves, scale, color=color, marker="")
        figures.name_axes(spectrum_ax, f"{name}: curvatures", "direction", "")
        figures.name_axes(loss_ax, f"{name}: training loss", "step", "", yscale="log")
    axes[0].legend()
    return figure
