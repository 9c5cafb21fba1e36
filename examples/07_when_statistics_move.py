"""Decide when statistics move: once for several micro-batches, or not for some inputs.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/07_when_statistics_move.py

First, gradient accumulation: k micro-batches make one update of the parameters, and
should make one of the statistics. Then adversarial training: the network runs on images
that are made to mislead it, to make them and to learn from them, and the statistics are
to be those of real images alone. The same holds for the two kinds of images that a
discriminator sees, and for the inner steps of meta-learning.
"""

import functools
import sys

import digits
import jax
import jax.numpy as jnp
import optax

import jaxnorm

MICRO_BATCHES = 4
STRENGTH = 0.5  # of the attack: how far each pixel may move

# ---- One update for several micro-batches -----------------------------------------


@jax.jit
def after_micro_batches(variables, batches: digits.Digits):
    """Mean gradients and statistics; `batches` have a leading axis of micro-batches."""
    params = variables["params"]

    def one(stats, batch):
        def loss(params):
            return digits.forward({"params": params, "batch_stats": stats}, batch)

        grads, stats = jax.grad(loss, has_aux=True)(params)
        return stats, grads

    stats = jaxnorm.models.accumulate(variables["batch_stats"])
    stats, grads = jax.lax.scan(one, stats, batches)
    stats = jaxnorm.models.commit(stats, momentum=digits.MOMENTUM)
    return jax.tree.map(lambda g: g.mean(0), grads), stats


def compare_updates(variables, batch: digits.Digits) -> None:
    parts = [v.reshape(MICRO_BATCHES, -1, *v.shape[1:]) for v in batch]
    _, gathered = after_micro_batches(variables, digits.Digits(*parts))
    forward = jax.jit(digits.forward)
    _, whole = forward(variables, batch)
    each = variables
    for part in zip(*parts, strict=True):
        _, stats = forward(each, digits.Digits(*part))
        each = each | {"batch_stats": stats}
    # Later layers see what the first makes of a batch, and that differs.
    first = "BatchNorm_0"
    print(
        f"variance after {MICRO_BATCHES} micro-batches, relative to one batch of all:"
    )
    for name, stats in {
        "one update": gathered,
        "one each": each["batch_stats"],
    }.items():
        gap = stats[first]["var"] / whole[first]["var"] - 1
        print(f"    {name}: {float(abs(gap).max()):.1e} off")


# ---- Statistics of real images only -----------------------------------------------


def misled(variables, batch: digits.Digits) -> digits.Digits:
    """The images, with each pixel moved to where the loss grows.

    Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572.
    """

    def loss(images):
        return digits.forward(variables, batch._replace(images=images))[0]

    images = batch.images + STRENGTH * jnp.sign(jax.grad(loss)(batch.images))
    return batch._replace(images=images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def robust_step(optimizer, hold: bool, variables, opt_state, batch):
    """A step on real images and misleading ones."""
    stats = variables["batch_stats"]
    # Held: normalized by their own batch, and forgotten.
    held = jaxnorm.models.freeze(stats, use_running_average=False) if hold else stats
    bad = misled(variables | {"batch_stats": held}, batch)

    def loss(params):
        real, new = digits.forward({"params": params, "batch_stats": stats}, batch)
        after = held if hold else new
        fake, last = digits.forward({"params": params, "batch_stats": after}, bad)
        return real + fake, new if hold else last

    grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    return {"params": params, "batch_stats": stats}, opt_state


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=200)
    train, test = digits.load()
    compare_updates(digits.init(), next(train.batches(128)))

    print("test accuracy after adversarial training, with statistics")
    optimizer = optax.adam(1e-2)
    for name, hold in {"of all images": False, "of real images": True}.items():
        variables = digits.init()
        state = optimizer.init(variables["params"])
        for _, batch in zip(range(steps), train.batches(64), strict=False):
            variables, state = robust_step(optimizer, hold, variables, state, batch)
        print(f"    {name}: {digits.accuracy(variables, test):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
