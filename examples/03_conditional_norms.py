"""Scale and bias per example: style transfer, conditional norms, modulation.

From the root of the repository, in some ten seconds on two CPU cores:

    python examples/03_conditional_norms.py

Where jaxnorm takes a scale and bias, it takes one for each example, too, of shape
(batch, features). Methods that differ in where these come from need no class:

- Adaptive instance norm (Huang and Belongie, 2017, https://arxiv.org/abs/1703.06868)
  takes them from the features of another image, whose style the result has.
- Conditional norms (de Vries et al., 2017, https://arxiv.org/abs/1707.00683) look them
  up. Here the question "is this a 3?" acts on a network through its norms alone.
- Modulation, as in diffusion transformers (Peebles and Xie, 2022,
  https://arxiv.org/abs/2212.09748), computes them: from the level of noise to remove.

Each prints how well it works, and what there is without it.
"""

import sys
from typing import Any

import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jaxnorm

BATCH_SIZE = 128

# ---- Adaptive instance norm -------------------------------------------------------


def style_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each feature of each example, over space."""
    m = jaxnorm.moments(x, jaxnorm.InstanceNorm().axes(x.shape))
    shape = x.shape[0], x.shape[-1]
    deviation = jnp.sqrt(m.var + 1e-6)  # finite gradient at 0, as in the norm itself
    return m.mean.reshape(shape), deviation.reshape(shape)


def adaptive_instance_norm(content: jax.Array, style: jax.Array) -> jax.Array:
    """`content` with the moments of `style`, an image that may be of another size."""
    mean, deviation = style_of(style)
    return jaxnorm.instance_norm(content, deviation, mean)


@jax.jit
def largest_gap(x: jax.Array, style: jax.Array) -> jax.Array:
    """How far mean and deviation of `x` are from those of `style`, at most."""
    pairs = zip(style_of(x), style_of(style), strict=True)
    return jnp.stack([jnp.abs(a - b) for a, b in pairs]).max()


def two_images(rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """Features of four images and of four others, with moments of their own."""
    mean, deviation = rng.uniform(1, 9, (2, 4, 1, 1, 8))
    content = rng.standard_normal((4, 16, 16, 8))
    style = mean + deviation * rng.standard_normal((4, 10, 12, 8))
    return jnp.asarray(content, jnp.float32), jnp.asarray(style, jnp.float32)


# ---- Conditional norms ------------------------------------------------------------


class AnswerNet(nn.Module):
    """Says no or yes to one of ten questions about an image."""

    @nn.compact
    def __call__(self, images, question):
        def norm(x):
            # The table holds what is added to a scale of 1 and a bias of 0.
            init = nn.initializers.zeros
            table = nn.Embed(10, 2 * x.shape[-1], embedding_init=init)
            scale, bias = jnp.split(table(question), 2, axis=-1)
            return jaxnorm.group_norm(x, 1 + scale, bias, num_groups=4)

        x = nn.relu(norm(nn.Dense(64)(images)))
        x = nn.relu(norm(nn.Dense(64)(x)))
        return nn.Dense(2)(x)


def ask(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple:
    """Images, "is it this digit?", and answers: for each image a yes and a no."""
    others = (labels + rng.integers(1, 10, len(labels))) % 10
    answers = np.repeat([1, 0], len(labels))
    return np.tile(images, (2, 1)), np.append(labels, others), answers


def right_answers(steps: int) -> dict[str, float]:
    """What part of the answers is right, after training, on images not trained on."""
    train, test = (d._replace(images=d.images.reshape(-1, 64)) for d in digits.load())
    network = AnswerNet()
    apply: Any = jax.jit(network.apply)

    def loss(variables, batch):
        images, question, answers = batch
        logits: Any = network.apply({"params": variables["params"]}, images, question)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        return losses.mean(), {}

    def right(told: bool) -> float:
        rng = np.random.default_rng(0)

        def asked(data: digits.Digits) -> tuple:
            images, question, answers = ask(data.images, data.labels, rng)
            return images, question * told, answers

        variables = jax.jit(network.init)(jax.random.key(0), *train)
        variables = {**variables, "batch_stats": {}}
        batches = map(asked, train.batches(BATCH_SIZE // 2))
        variables = digits.fit(variables, batches, steps, optax.adam(0.01), loss=loss)
        images, question, answers = asked(test)
        params = {"params": variables["params"]}
        given = apply(params, images, question).argmax(-1)
        return float((given == answers).mean())

    # Where all are told question 0, they share its scale and bias.
    return {"the same norm for all": right(False), "a norm for each": right(True)}


# ---- Modulation -------------------------------------------------------------------


def modulated_rms_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """`rms(x) * (1 + scale) + shift`: (batch, tokens, features), (batch, features)."""
    x = jaxnorm.rms_norm(x, scale, zero_centered_scale=True)
    return x + shift[:, None]


class Denoiser(nnx.Module):
    """A block of a diffusion transformer, less its attention; at first the identity."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        wide, zeros = 4 * features, nnx.initializers.zeros
        self.level = nnx.Linear(1, wide, rngs=rngs)
        self.modulation = nnx.Linear(wide, 3 * features, kernel_init=zeros, rngs=rngs)
        self.up = nnx.Linear(features, wide, rngs=rngs)
        self.down = nnx.Linear(wide, features, rngs=rngs)

    def __call__(self, x, level):
        condition = nnx.silu(self.level(level[:, None]))
        scale, shift, gate = jnp.split(self.modulation(condition), 3, axis=-1)
        y = self.down(nnx.gelu(self.up(modulated_rms_norm(x, scale, shift))))
        return x + gate[:, None] * y


def noisy_tokens(rng: np.random.Generator) -> tuple:
    """Tokens, the same with noise, and how much of it there is in each example."""
    tokens, noise = rng.standard_normal((2, BATCH_SIZE, 4, 16), np.float32)
    level = rng.uniform(0, 2, BATCH_SIZE).astype(np.float32)
    return tokens, tokens + level[:, None, None] * noise, level


def noise_left(steps: int) -> dict[str, float]:
    """Mean squares of what is left of the noise, by what is done against it."""
    model = Denoiser(16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.003), wrt=nnx.Param)

    @nnx.jit
    def error(model, tokens, noisy, level):
        return ((model(noisy, level) - tokens) ** 2).mean()

    @nnx.jit
    def train_step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(error)(model, *batch))

    rng = np.random.default_rng(0)
    tokens, noisy, level = noisy_tokens(rng)
    errors = {"before training": error(model, tokens, noisy, level)}
    for _ in tqdm(range(steps), "noise", leave=False, disable=None):
        train_step(model, optimizer, noisy_tokens(rng))
    errors["told the levels of others"] = error(model, tokens, noisy, level[::-1])
    errors["told the level"] = error(model, tokens, noisy, level)
    # Of tokens and noise that are normal, noisy / (1 + level**2) is the best estimate.
    errors["at best"] = (level**2 / (1 + level**2)).mean()
    return {name: float(value) for name, value in errors.items()}


# ---- All of them -------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    steps = digits.read_steps(__file__, argv, default=300)
    print("adaptive instance norm: largest difference from the style's moments")
    content, style = two_images(np.random.default_rng(0))
    after = adaptive_instance_norm(content, style)
    print(f"    before: {largest_gap(content, style):.1e}")
    print(f"    after: {largest_gap(after, style):.1e}")
    print("conditional group norm: right answers to yes-or-no questions")
    for name, value in right_answers(steps).items():
        print(f"    {name}: {value:.3f}")
    print("modulated RMS norm: mean square of the noise that is left")
    for name, value in noise_left(steps).items():
        print(f"    {name}: {value:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
