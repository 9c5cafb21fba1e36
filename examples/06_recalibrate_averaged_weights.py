"""Average the weights of training, and recalibrate the statistics for the average.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/06_recalibrate_averaged_weights.py

Averaged weights (stochastic weight averaging, or an exponential moving average) give
activations that no training step has seen. The statistics of the last step do not fit
them, and neither does an average of the statistics.
"""

import sys

import digits
import jax
import numpy as np
import optax
from tqdm import tqdm

import jaxnorm


def training_mode(variables, batch):
    """The new statistics: what `recalibrate` needs to know of a model."""
    return digits.forward(variables, batch)[1]


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=60)
    train, test = digits.load()
    variables = digits.fit(digits.init(), train.batches(64), 20, optax.adam(1e-2))

    # At a high, constant rate the weights go far from one step to the next.
    averages = {policy: variables for policy in ("average", "copy", "recalibrate")}
    seen = 0

    def add(variables, loss):
        nonlocal seen
        seen += 1
        for policy, average in averages.items():
            averages[policy] = ema(average, variables, seen / (seen + 1), policy)

    ema = jax.jit(
        lambda average, new, decay, policy: jaxnorm.models.ema(
            average, new, decay, batch_stats=policy
        ),
        static_argnums=3,
    )
    high = optax.adam(3e-2)
    last = digits.fit(variables, train.batches(64, seed=1), steps, high, add)
    print(f"accuracy of the last step: {digits.accuracy(last, test):.3f}")
    print("of the average of all steps, with")
    print(f"    averaged statistics: {digits.accuracy(averages['average'], test):.3f}")
    print(f"    those of the last step: {digits.accuracy(averages['copy'], test):.3f}")

    average = averages["recalibrate"]
    rows = np.array_split(np.arange(len(train.labels)), 10)  # of uneven size
    batches = [digits.Digits(train.images[i], train.labels[i]) for i in rows]
    stats = jaxnorm.models.recalibrate(
        training_mode,
        average,
        batches,
        layer_by_layer=True,
        progress=lambda batches: tqdm(batches, leave=False, disable=None),
    )
    recalibrated = average | {"batch_stats": stats}
    print(f"    recalibrated ones: {digits.accuracy(recalibrated, test):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
