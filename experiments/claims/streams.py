"""Batch norm is unfit for online learning from small batches of changing size.

**Said by** Ba, Kiros and Hinton ([2016](https://arxiv.org/abs/1607.06450)), section 1:
batch norm "cannot be applied to online learning tasks", and Chiley et al.
([2019](https://arxiv.org/abs/1905.05894)), whose online norm is to replace it there.

**Set-up.** A stream of 3,000 images, each seen once: a dense net of two layers of 128
is first tested on the images that come, by its running statistics, and then trained on
them, by gradient descent without momentum. They come one at a time, in twos, or in
batches of 2 to 16 at random. "Running" is batch norm that normalizes by its running
statistics also in training, as `jaxnorm.models.freeze(use_running_average=True,
update=True)` has it. Single images are left out for batch norm, which refuses them, as
each variance would be that of one value, for renorm, and for running statistics, which
such a batch leaves as they are. The error is that of the second half of the stream.

**Scale.** Ba et al. show no experiment of it; Chiley et al. train ResNets on CIFAR-10
and ImageNet with single examples. Here: a small dense net and a short stream.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
import optax
from jax import lax

import jaxnorm
from experiments import data, figures, fit
from experiments.nets import NORMS, Dense
from experiments.results import Table, mean_and_spread
from experiments.runs import RATES, Options, Run, all_tuned, thinned
from experiments.verdict import Comparison

DATA = ("fashion", "digits")
SIZES = {"one": (1, 1), "two": (2, 2), "2 to 16": (2, 16)}
ARMS: dict[str, jaxnorm.Norm] = {
    "none": NORMS["none"],
    "batch": NORMS["batch"],
    "renorm": NORMS["renorm"],
    "running": NORMS["batch"],
    "layer": NORMS["layer"],
    "group": NORMS["group"],
    "online": jaxnorm.OnlineNorm(),
}
NOT_SINGLE = ("batch", "renorm", "running")
LENGTH, DEPTH, WIDTH = 3000, 2, 128


def arm(norm: str, sizes: str) -> dict:
    return {"norm": norm, "sizes": sizes}


def errs_more(sizes: str, left: str, right: str, least: float) -> Comparison:
    return Comparison(
        f"images in batches of {sizes}: {left} errs more than {right}, by more than "
        f"{least:g} points",
        "error",
        arm(left, sizes),
        arm(right, sizes),
        more_than=least,
    )


RULE = {
    "two": errs_more("two", "batch", "none", 1.0),
    "mixed": errs_more("2 to 16", "batch", "none", 1.0),
}
BESIDE = {
    "renorm": errs_more("2 to 16", "batch", "renorm", 1.0),
    "layer": errs_more("2 to 16", "batch", "layer", 1.0),
    "running": errs_more("2 to 16", "batch", "running", 1.0),
    "one_online": errs_more("one", "online", "none", 1.0),
    "one_layer": errs_more("one", "layer", "none", 1.0),
}
SENTENCE = """In the second half of a stream of 3,000 images that come in twos, batch
norm errs on {two.left:.1f} % and no norm on {two.right:.1f} %; in batches of 2 to 16,
batch norm on {mixed.left:.1f} %, no norm on {mixed.right:.1f} %, batch renorm on
{renorm.right:.1f} %, running statistics on {running.right:.1f} %, layer norm on
{layer.right:.1f} %. Of single images, which batch norm refuses, layer norm errs on
{one_layer.left:.1f} %, online norm on {one_online.left:.1f} % and no norm on
{one_online.right:.1f} %."""


def measure(options: Options) -> list[Run]:
    images = data.images(options.data, options.data_dir)
    length = min(options.steps(LENGTH), len(images.train.labels) - 16)
    arms = [
        (arm(norm, sizes), streamer(norm, sizes, images.train, length))
        for sizes in SIZES
        for norm in ARMS
        if not (sizes == "one" and norm in NOT_SINGLE)
    ]
    # Without momentum and for single images, lower rates than elsewhere.
    rates = [rate / 10 for rate in RATES]
    return all_tuned(arms, options.rates(rates), options.seed_range(3))


def streamer(norm: str, sizes: str, images: data.Split, length: int):
    net = Dense(ARMS[norm], DEPTH, WIDTH)

    def train(rate: float, seed: int):
        rows, valid = batches(*SIZES[sizes], length, len(images.labels), seed)
        params, stats = fit.initialize(net, images.inputs.shape[1:], seed)
        if norm == "running":
            stats = jaxnorm.models.freeze(stats, use_running_average=True, update=True)
        wrong = stream(net, params, stats, rate, images, (rows, valid))
        found = np.asarray(wrong)[valid]
        error = 100 * float(found[len(found) // 2 :].mean())
        return {"error": error, "validation": error}, thinned(found * 100.0, 40)

    return train


def batches(least: int, most: int, length: int, size: int, seed: int):
    """The rows of each batch up to the longest, and which of them are there."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(least, most + 1, length)
    counts = counts[: np.searchsorted(counts.cumsum(), length) + 1]
    valid = np.arange(most) < counts[:, None]
    rows = np.zeros(valid.shape, np.int32)
    rows[valid] = rng.permutation(size)[: valid.sum()]
    return rows, valid


@partial(jax.jit, static_argnums=0)
def stream(net, params, stats, rate, images: data.Split, batches):
    """Whether each image of each batch is answered wrongly before it is trained on."""
    # Online norm renews its controls itself, by a step of rate 1.
    optimizer = optax.multi_transform(
        {"parameter": optax.sgd(rate), "control": optax.sgd(1.0)},
        jaxnorm.models.control_labels,
    )

    def loss_fn(params, stats, batch: data.Split, valid):
        logits, stats = net(params, stats, batch.inputs, True, mask=valid[:, None])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return each.mean(where=valid), stats

    def step(state, now):
        (params, stats, opt_state), (rows, valid) = state, now
        batch = images.take(rows)
        logits, _ = net(params, stats, batch.inputs, False, mask=valid[:, None])
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, batch, valid)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, stats, opt_state), logits.argmax(-1) != batch.labels

    return lax.scan(step, (params, stats, optimizer.init(params)), batches)[1]


def values(runs: Sequence[Run], kind: dict) -> list[float]:
    return [run.metrics["error"] for run in runs if run.is_of(kind)]


def tables(runs: Sequence[Run]) -> list[Table]:
    rows = []
    for norm in ARMS:
        found = [values(runs, arm(norm, sizes)) for sizes in SIZES]
        rows.append([norm, *(mean_and_spread(v) if v else "-" for v in found)])
    title = "Error in percent on images before they are trained on, second half"
    return [Table(title, ["Norm", *SIZES], rows)]


def draw(runs: Sequence[Run]):
    figure, axes = figures.panels(3)
    for ax, sizes in zip(axes, SIZES, strict=True):
        for norm in ARMS:
            curves = [run.curve for run in runs if run.is_of(arm(norm, sizes))]
            if curves:
                x = np.linspace(0, LENGTH, len(curves[0]))
                figures.band(ax, x, np.array(curves), norm, marker="")
        title = f"images in batches of {sizes}: error (%)"
        figures.name_axes(ax, title, "images seen", "", ylim=(15, 95))
    axes[-1].legend()
    return figure
