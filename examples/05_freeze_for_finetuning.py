"""Fine-tune a network on one example at a time, with its batch norms frozen.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/05_freeze_for_finetuning.py

The network was trained on digits, and learns to read them turned by 90 degrees, one at
a time. The statistics of one image are no estimate of anything: it shows the accuracy
after fine-tuning with norms that go on as they did, and with the switches of `freeze`.
"""

import sys

import digits
import jax
import numpy as np
import optax

import jaxnorm

BATCH_SIZE = 1


def turned(data: digits.Digits) -> digits.Digits:
    return data._replace(images=np.rot90(data.images, axes=(1, 2)).copy())


def finetuned(variables, train, steps, switches):
    """Variables after fine-tuning all but what is frozen."""
    stats = variables["batch_stats"]
    optimizer = optax.sgd(0.02)
    if switches is not None:
        stats = jaxnorm.models.freeze(stats, **switches)
        # The third switch: whether scale and bias train.
        optimizer = optax.multi_transform(
            {"frozen": optax.set_to_zero(), "trainable": optimizer},
            jaxnorm.models.frozen_labels,
        )
    batches = train.batches(BATCH_SIZE, seed=1)
    variables = variables | {"batch_stats": stats}
    return digits.fit(variables, batches, steps, optimizer)


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=400)
    train, test = digits.load()
    variables = digits.fit(digits.init(), train.batches(128), steps, optax.adam(1e-2))
    train, other = turned(train), turned(test)
    print(f"accuracy on digits: {digits.accuracy(variables, test):.3f}")
    print(
        f"on turned ones, before fine-tuning: {digits.accuracy(variables, other):.3f}"
    )

    ways = {
        "statistics of each image": None,
        "frozen statistics": {"use_running_average": True, "update": False},
        "running statistics, which move": {
            "use_running_average": True,
            "update": True,
        },
    }
    print("after fine-tuning on one image at a time, normalized by")
    for name, switches in ways.items():
        tuned = finetuned(variables, train, steps, switches)
        print(f"    {name}: {digits.accuracy(tuned, other):.3f}")
        if name == "frozen statistics":
            old = variables["batch_stats"], scales(variables)
            new = jaxnorm.models.unfreeze(tuned["batch_stats"]), scales(tuned)
            same = jax.tree.map(np.array_equal, old, new)
            print(f"    (their norms are bit for bit as before: {all_true(same)})")
    return 0


def scales(variables):
    params = variables["params"]
    return {k: params[k] for k in variables["batch_stats"]}


def all_true(tree) -> bool:
    return all(jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())
