"""Sequences want layer norm, as padding dilutes the statistics of batch norm.

**Said** where layer norm is preferred for language, as by Shen et al.
([2020](https://arxiv.org/abs/2003.07845)), who trace batch norm's failure there to its
statistics; that padding spoils them is a usual explanation.

**Set-up.** Utterances of nine speakers, 7 to 29 steps of 12 coefficients, padded with
zeros: a net of two one-dimensional convolutions of 32 features, each followed by its
norm and relu, the mean over the valid steps, and a head; batches of 32, 200 steps. The
norm gets no mask, trained with padding to 29 and to 116 steps, or a mask of the valid
steps. Each trained net is tested with padding to 29, 58 and 116. The first convolution,
before training, also gives the variance that batch norm sees with padding, over that of
the valid steps alone. The running statistics have a momentum of 0.9. (A first run had
0.99, of which 13 % were still their start at the end.)

**Scale.** No figure of a paper corresponds to it; transformers on text may differ,
where batch norm has other problems than padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxnorm
from experiments import data, figures, fit
from experiments.nets import Tree, norms, weights
from experiments.results import Table, mean_and_spread
from experiments.runs import Options, Run, all_tuned, thinned
from experiments.verdict import Comparison

DATA = ("vowels", "digits")
NORMS = norms(momentum=0.9)
ARMS = ("none", "batch", "layer", "instance")
WAYS = {"short": "no mask, trained with little padding", "long": "no mask, with much"}
WAYS |= {"mask": "mask"}
TIMES = (1, 2, 4)  # the length of the padded sequences, in that of the longest


def arm(norm: str, way: str) -> dict:
    return {"norm": norm, "way": way}


def compare(says: str, metric: str, left: dict, right: dict, **limit) -> Comparison:
    return Comparison(says, metric, left, right, **limit)


RULE = {
    "variance": Comparison(
        "padded to 4 times the longest, the variance that batch norm sees is less than "
        "half of that of the valid steps",
        "ratio",
        {"times": 4},
        less_than=0.5,
    ),
    "batch": compare(
        "trained and tested with much padding and without a mask, batch norm errs "
        "more than layer norm, by more than 1 point",
        "error_4",
        arm("batch", "long"),
        arm("layer", "long"),
        more_than=1.0,
    ),
}
BESIDE = {
    "moved": compare(
        "trained with little padding and without a mask, tested with much, batch norm "
        "errs more than layer norm, by more than 1 point",
        "error_4",
        arm("batch", "short"),
        arm("layer", "short"),
        more_than=1.0,
    ),
    "masked": compare(
        "with a mask batch norm errs less than 1 point more than layer norm",
        "error_4",
        arm("batch", "mask"),
        arm("layer", "mask"),
        less_than=1.0,
    ),
    "instance": compare(
        "instance norm, trained with little padding and without a mask, tested with "
        "much, errs more than with a mask, by more than 5 points",
        "error_4",
        arm("instance", "short"),
        arm("instance", "mask"),
        more_than=5.0,
    ),
}
SENTENCE = """Padded to 4 times the longest sequence, batch norm without a mask sees
{variance.left:.2f} of the variance of the valid steps; trained and tested so, it errs
on {batch.left:.1f} % and layer norm on {batch.right:.1f} %; trained with little padding
and tested with much, batch norm on {moved.left:.1f} %, layer norm on {moved.right:.1f}
% and instance norm on {instance.left:.1f} %; with a mask {masked.left:.1f},
{masked.right:.1f} and {instance.right:.1f} %."""


@dataclass(frozen=True)
class Conv1d:
    """Two convolutions over time, each with norm and relu; then the mean over time."""

    norm: jaxnorm.Norm
    masked: bool
    width: int = 32
    classes: int = 10

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        width = self.width
        kernels = {
            "layer_0": weights(rng, 5, shape[-1], width),
            "layer_1": weights(rng, 5, width, width),
        }
        params: Tree = {
            name: {"weight": kernel, "norm": self.norm.init_params((width,))}
            for name, kernel in kernels.items()
        }
        params["head"] = weights(rng, width, self.classes)
        return params, {name: self.norm.init_stats((width,)) for name in kernels}

    def __call__(self, params: Tree, stats: Tree, batch: data.Sequences, train: bool):
        """Logits and new statistics."""
        valid = valid_steps(batch)
        x, new, mask = batch.inputs, {}, valid if self.masked else None
        for name in stats:
            x = convolve(x, params[name]["weight"])
            how = {"use_running_average": not train, "mask": mask}
            x, new[name] = self.norm(x, params[name]["norm"], stats[name], **how)
            x = jax.nn.relu(x)
        return x.mean(1, where=valid) @ params["head"], new


def valid_steps(batch: data.Sequences) -> Array:
    """Which steps are there, (N, steps, 1)."""
    steps = jnp.arange(batch.inputs.shape[1])
    return (steps[None] < batch.lengths[:, None])[..., None]


def convolve(x: Array, kernel: Array) -> Array:
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=layout)


def measure(options: Options) -> list[Run]:
    parts = data.sequences(options.data, options.data_dir)
    steps = options.steps(200)
    arms = [
        (arm(norm, way), trainer(norm, way, steps, parts))
        for norm in ARMS
        for way in WAYS
    ]
    seeds = options.seed_range(5)
    runs = all_tuned(arms, options.rates(), seeds)
    return runs + [diluted(t, seed, parts[0]) for t in TIMES for seed in seeds]


def trainer(norm: str, way: str, steps: int, parts: list[data.Sequences]):
    net, plan = Conv1d(NORMS[norm], way == "mask"), fit.Plan(steps, 32)
    longest = parts[0].inputs.shape[1]
    train_set, validation, test = parts
    times = 4 if way == "long" else 1
    train_set, validation = (
        part.padded(times * longest) for part in (train_set, validation)
    )

    def train(rate: float, seed: int):
        state, losses = plan.start(net, train_set.inputs.shape[1:], seed), []
        for rows in fit.orders(seed, len(train_set.labels), plan.batch, steps):
            state, loss = step(net, plan, state, rate, train_set, rows)
            losses.append(loss)
        found = {"validation": error(net, state, validation)}
        for t in TIMES:
            found[f"error_{t}"] = error(net, state, test.padded(t * longest))
        found = {name: float(value) for name, value in found.items()}
        return found, thinned([float(loss) for loss in losses])

    return train


@partial(jax.jit, static_argnums=(0, 1))
def step(net: Conv1d, plan: fit.Plan, state: fit.State, rate, sequences, rows):
    batch = sequences.take(rows)

    def loss_fn(params):
        logits, stats = net(params, state.stats, batch, True)
        return fit.cross_entropy(logits, batch.labels), stats

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return plan.moved(state, grads, stats, rate), loss


@partial(jax.jit, static_argnums=0)
def error(net: Conv1d, state: fit.State, sequences: data.Sequences) -> Array:
    """Percent wrong, by the running statistics."""
    logits, _ = net(state.params, state.stats, sequences, False)
    return 100 * (logits.argmax(-1) != sequences.labels).mean()


def diluted(times: int, seed: int, train: data.Sequences) -> Run:
    """The variance of the first convolution's features with padding, over that of the
    valid steps: the mean over features."""
    padded = train.padded(times * train.inputs.shape[1])
    kernel = weights(np.random.default_rng(seed), 5, train.inputs.shape[2], 32)
    x = convolve(padded.inputs, kernel)
    valid = valid_steps(padded)
    ratio = x.var((0, 1)) / x.var((0, 1), where=valid)
    share = 1 - float(valid.mean())
    return Run({"times": times}, seed, {"ratio": float(ratio.mean()), "share": share})


def values(runs: Sequence[Run], kind: dict, metric: str) -> list[float]:
    return [run.metrics[metric] for run in runs if run.is_of(kind)]


def tables(runs: Sequence[Run]) -> list[Table]:
    errors = [
        [norm, name]
        + [mean_and_spread(values(runs, arm(norm, way), f"error_{t}")) for t in TIMES]
        for norm in ARMS
        for way, name in WAYS.items()
    ]
    ratios = [
        [str(t)]
        + [
            mean_and_spread(values(runs, {"times": t}, m), 2)
            for m in ("share", "ratio")
        ]
        for t in TIMES
    ]
    tested = [f"Tested at {t} times the longest" for t in TIMES]
    head = ["Padded to, in the longest", "Share of padding", "Variance seen, over true"]
    return [
        Table("Test error in percent", ["Norm", "Norm gets", *tested], errors),
        Table("Dilution of the variance by padding", head, ratios),
    ]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(4, width=2.8)
    for ax, (way, title) in zip(axes, WAYS.items(), strict=False):
        for norm in ARMS:
            found = [values(runs, arm(norm, way), f"error_{t}") for t in TIMES]
            figures.band(ax, TIMES, np.array(found).T, norm)
        figures.name_axes(
            ax, f"{title}:\ntest error (%)", "padded to", "", ylim=(0, 60)
        )
    ratios = [values(runs, {"times": t}, "ratio") for t in TIMES]
    shares = [values(runs, {"times": t}, "share")[0] for t in TIMES]
    figures.band(axes[-1], shares, np.array(ratios).T, "batch")
    title = "variance seen by batch norm,\nover that of valid steps"
    figures.name_axes(axes[-1], title, "share of padding", "", ylim=(0, 1.05))
    axes[0].legend()
    return figure
