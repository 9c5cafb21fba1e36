"""Times jaxnorm's Linen classes beside Flax's, on the device at hand.

    python benchmarks/against_flax.py

Both do the same work in one run, in an order drawn anew each round, so that what else
the machine does hits both alike. Prints the lower quartile of each, in milliseconds,
and the ratio; float32.
"""

import jax
from flax import linen as flax_linen
from timing import milliseconds

from jaxnorm import linen as jaxnorm_linen

ROUNDS = 30
LIBRARIES = {"flax": flax_linen, "jaxnorm": jaxnorm_linen}
CASES = {
    "batch norm": ("BatchNorm", (8192, 256), {"use_running_average": False}),
    "batch norm, images": (
        "BatchNorm",
        (32, 28, 28, 128),
        {"use_running_average": False},
    ),
    "batch norm, channels first": (
        "BatchNorm",
        (32, 128, 28, 28),
        {"use_running_average": False, "axis": 1},
    ),
    "batch norm, evaluation": (
        "BatchNorm",
        (32, 28, 28, 128),
        {"use_running_average": True},
    ),
    "layer norm": ("LayerNorm", (4096, 1024), {}),
    "RMS norm": ("RMSNorm", (4096, 1024), {}),
    "group norm": ("GroupNorm", (8, 64, 64, 128), {}),
    "instance norm": ("InstanceNorm", (8, 64, 64, 128), {}),
}


def programs(library, name, shape, options):
    """The forward pass, and the gradient by input and parameters, ready to call."""
    module = getattr(library, name)(**options)
    x, weights = jax.random.normal(jax.random.key(0), (2, *shape))
    variables = dict(module.init(jax.random.key(1), x))

    def forward(variables, x):
        return module.apply(variables, x, mutable=["batch_stats"])

    def loss(params, x):
        y, updates = forward(variables | {"params": params}, x)
        return (y * weights).sum(), updates

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    forward = jax.jit(forward)
    return {
        "forward": lambda: forward(variables, x),
        "forward and gradient": lambda: gradient(variables["params"], x),
    }


def main():
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; milliseconds")
    print(f"{'':28}{'':22}{'flax':>8}{'jaxnorm':>9}{'ratio':>7}")
    for case, (name, shape, options) in CASES.items():
        calls = {
            (library, work): call
            for library, module in LIBRARIES.items()
            for work, call in programs(module, name, shape, options).items()
        }
        times = milliseconds(calls, ROUNDS)
        for work in ("forward", "forward and gradient"):
            flax, ours = (times[library, work] for library in LIBRARIES)
            print(f"{case:28}{work:22}{flax:8.2f}{ours:9.2f}{ours / flax:7.2f}")


if __name__ == "__main__":
    main()
