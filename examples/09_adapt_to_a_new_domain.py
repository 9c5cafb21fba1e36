"""Adapt a trained network to another domain by its statistics alone, without labels.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/09_adapt_to_a_new_domain.py

The network was trained on digits; the new domain are digits of low contrast on a grey
ground. It shows the accuracy there with statistics between those of the two domains
(AdaBN, Li et al., 2016, https://arxiv.org/abs/1603.04779), with those of one small
batch that count as n of n + n0 examples (Schneider et al., 2020,
https://arxiv.org/abs/2006.16971), and with a set of statistics for each domain.
"""

import sys

import digits
import jax
import optax

import jaxnorm

PRIOR = 16  # the examples that the trained statistics count as


def faded(data: digits.Digits) -> digits.Digits:
    return data._replace(images=0.4 + 0.3 * data.images)


@jax.jit
def adapted(variables, images, alpha):
    """The statistics, moved by alpha from the trained ones to those of some images."""
    gathering = variables | {
        "batch_stats": jaxnorm.models.accumulate(variables["batch_stats"])
    }
    _, new = digits.Net().apply(gathering, images, True, mutable=["batch_stats"])
    return jaxnorm.models.commit(new["batch_stats"], momentum=1 - alpha)


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=200)
    train, test = digits.load()
    variables = digits.fit(digits.init(), train.batches(64), steps, optax.adam(1e-2))
    unlabelled, target = faded(train).images, faded(test)

    def on_target(stats) -> str:
        return f"{digits.accuracy(variables | {'batch_stats': stats}, target):.3f}"

    print(f"accuracy on digits: {digits.accuracy(variables, test):.3f}")
    print("on faded digits, with statistics moved by alpha to those of faded ones:")
    for alpha in (0.0, 0.5, 1.0):
        print(f"    {alpha}: {on_target(adapted(variables, unlabelled, alpha))}")

    print(f"moved by n / (n + {PRIOR}) to those of n images only:")
    for n in (4, 16, 64):
        stats = adapted(variables, unlabelled[:n], n / (n + PRIOR))
        print(f"    {n}: {on_target(stats)}")

    # Both domains, on one set of parameters.
    domains = {
        "digits": variables["batch_stats"],
        "faded": adapted(variables, unlabelled, 1.0),
    }
    print("each with its own statistics, and all with those of both together:")
    both = jaxnorm.models.merge(list(domains.values()))
    for name, data in {"digits": test, "faded": target}.items():
        own = digits.accuracy(variables | {"batch_stats": domains[name]}, data)
        shared = digits.accuracy(variables | {"batch_stats": both}, data)
        print(f"    {name}: {own:.3f}, {shared:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
