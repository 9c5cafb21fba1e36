"""Go on training in JAX what PyTorch has trained, and hand it back.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/08_from_pytorch.py

The file beside this one is the state dict of a small network for handwritten digits
(tests/golden/torch_digits.py), with the logits of torch for the images that it was not
trained on. --checkpoint takes another file of the same network. A checkpoint does not
say which settings its norms had: `jaxnorm.models.norm_settings` has torch's, and with
them the running statistics go on moving as they did.
"""

import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from safetensors.numpy import load_file

import jaxnorm
from jaxnorm.linen import BatchNorm

FILE = Path(__file__).with_suffix(".safetensors")
SETTINGS = jaxnorm.models.norm_settings("torch", eps=1e-5, momentum=0.1)


class Block(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        # torch pads both sides, where "SAME" would pad one with this stride.
        others: Any = {"padding": 1, "use_bias": False, "name": "conv"}
        conv = nn.Conv(self.features, (3, 3), self.stride, **others)
        norm = BatchNorm(use_running_average=not train, name="bn", **SETTINGS)
        return nn.relu(norm(conv(x)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = Block(12, 1, name="blocks_0")(x, train)
        x = Block(24, 2, name="blocks_1")(x, train)
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


def torch_name(path: str) -> str:
    """ "blocks_0/conv" is "blocks.0.conv" in torch."""
    return path.replace("_", ".").replace("/", ".")


def main(argv: list[str] | None = None) -> int:
    parser = digits.Parser(__file__, "From PyTorch to JAX and back.")
    parser.add_argument("--checkpoint", default=FILE, type=Path, help="safetensors")
    path = parser.parse_args(argv).checkpoint
    if not path.is_file():
        parser.error(f"--checkpoint {path} is not a file")

    images, labels = digits.load_all()  # torch has not seen the last 360
    state_dict = load_file(path)
    expected = state_dict.pop("expected_logits", None)
    template = jax.eval_shape(Net().init, jax.random.key(0), images)
    variables, report = jaxnorm.models.from_checkpoint(
        "torch", state_dict, template, rename=torch_name
    )
    print(report)

    logits: Any = Net().apply(variables, images[-360:])
    if expected is not None:
        print(f"largest difference from torch: {jnp.abs(logits - expected).max():.1e}")
    print(f"test accuracy: {(logits.argmax(-1) == labels[-360:]).mean():.3f}")

    losses: list[float] = []
    variables = digits.fit(
        variables,
        itertools.repeat(digits.Digits(images[:256], labels[:256])),
        steps=2,
        optimizer=optax.sgd(0.01, momentum=0.9),
        after_step=lambda _, loss: losses.append(float(loss)),
        loss=functools.partial(digits.forward, net=Net()),
    )
    print(f"losses of fine-tuning: {losses[0]:.4f} {losses[1]:.4f}")
    back = jaxnorm.models.to_checkpoint("torch", variables, rename=torch_name)
    alike = back.keys() == state_dict.keys()
    print(f"back in torch: {len(back)} arrays, keys alike: {alike}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
