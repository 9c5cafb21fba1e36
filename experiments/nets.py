"""Two small nets that take their norm as a value, and nothing else that differs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

import jaxnorm

Tree = dict[str, Any]
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}


class NoNorm(jaxnorm.StatelessNorm):
    """The bias alone, in the place of a norm."""

    param_names = ("bias",)
    center = False
    axis: int = -1

    def axes(self, shape: tuple[int, ...]) -> jaxnorm.Axes:
        return jaxnorm.Axes.over(shape, (), self.axis)

    def transform(
        self,
        x: Array,
        params: Mapping[str, Any],
        *,
        mask: ArrayLike | None,
        dtype: DTypeLike | None,
    ) -> Array:
        y = x + jnp.expand_dims(params["bias"], range(x.ndim - 1))
        return y if mask is None else jnp.where(mask, y, 0)


def norms(momentum: float = 0.99) -> dict[str, jaxnorm.Norm]:
    """The names and settings that all experiments share."""
    return {
        "none": NoNorm(),
        "batch": jaxnorm.BatchNorm(momentum=momentum),
        "renorm": jaxnorm.BatchRenorm(momentum=momentum),
        "layer": jaxnorm.LayerNorm(),
        "group": jaxnorm.GroupNorm(num_groups=4),
        "instance": jaxnorm.InstanceNorm(),
        "switchable": jaxnorm.SwitchableNorm(momentum=momentum),
    }


NORMS = norms()


def ghost(size: int, momentum: float = 0.99) -> jaxnorm.Norm:
    return jaxnorm.GhostBatchNorm(size=size, momentum=momentum)


def weights(rng: np.random.Generator, *shape: int) -> Array:
    """Normal, of variance 1 / fan-in; the last axis is the output."""
    values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    return jnp.asarray(values, jnp.float32)


@dataclass(frozen=True)
class Dense:
    """Layers of one width, each followed by its norm and activation, and a head.

    With `after`, the norm follows the activation.
    """

    norm: jaxnorm.Norm
    depth: int = 3
    width: int = 256
    activation: str = "relu"
    after: bool = False
    classes: int = 10

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        pixels, width = int(np.prod(shape)), self.width
        hidden = [weights(rng, width, width) for _ in range(self.depth - 1)]
        params: Tree = {
            "first": {"weight": weights(rng, pixels, width)},
            "hidden": {"weight": jnp.stack(hidden)},
            "head": weights(rng, width, self.classes),
            "head_bias": jnp.zeros(self.classes),
        }
        norm = self.norm.init_params((width,))
        stats = self.norm.init_stats((width,))
        params["first"]["norm"] = norm
        params["hidden"]["norm"] = repeated(norm, self.depth - 1)
        return params, {"first": stats, "hidden": repeated(stats, self.depth - 1)}

    def __call__(self, params: Tree, stats: Tree, x: Array, train: bool, **inputs):
        """Logits and new statistics."""

        def layer(x, now):
            now_params, now_stats = now
            return self.layer(now_params, now_stats, x, train, **inputs)

        x = x.reshape(len(x), -1)
        x, first = layer(x, (params["first"], stats["first"]))
        x, hidden = lax.scan(layer, x, (params["hidden"], stats["hidden"]))
        logits = x @ params["head"] + params["head_bias"][None]
        return logits, {"first": first, "hidden": hidden}

    def layer(self, params: Tree, stats: Tree, x: Array, train: bool, **inputs):
        def norm(x):
            how = {"use_running_average": not train, **inputs}
            return self.norm(x, params["norm"], stats, **how)

        x, activation = x @ params["weight"], ACTIVATIONS[self.activation]
        if self.after:
            return norm(activation(x))
        x, stats = norm(x)
        return activation(x), stats


def repeated(tree: Tree, times: int) -> Tree:
    """The tree, stacked along a leading axis."""
    return jax.tree.map(lambda v: jnp.asarray(np.stack([v] * times)), tree)


@dataclass(frozen=True)
class Conv:
    """Three convolutions of stride 2, each followed by its norm and relu; then the mean
    over space, and a head. The kernels may be standardized."""

    norm: jaxnorm.Norm
    widths: tuple[int, ...] = (16, 32, 64)
    standardized: bool = False
    classes: int = 10

    def init(
        self, rng: np.random.Generator, shape: tuple[int, ...]
    ) -> tuple[Tree, Tree]:
        sizes = zip((shape[-1], *self.widths), self.widths, strict=False)
        params: Tree = {
            f"layer_{i}": {
                "weight": weights(rng, 3, 3, fan_in, fan_out),
                "norm": self.norm.init_params((fan_out,)),
            }
            for i, (fan_in, fan_out) in enumerate(sizes)
        }
        params["head"] = weights(rng, self.widths[-1], self.classes)
        params["head_bias"] = jnp.zeros(self.classes)
        stats = {
            f"layer_{i}": self.norm.init_stats((width,))
            for i, width in enumerate(self.widths)
        }
        return params, stats

    def __call__(self, params: Tree, stats: Tree, x: Array, train: bool, **inputs):
        """Logits and new statistics."""
        new = {}
        for name in stats:
            x = self.convolve(x, params[name]["weight"])
            how = {"use_running_average": not train, **inputs}
            x, new[name] = self.norm(x, params[name]["norm"], stats[name], **how)
            x = jax.nn.relu(x)
        logits = x.mean((1, 2)) @ params["head"] + params["head_bias"][None]
        return logits, new

    def convolve(self, x: Array, kernel: Array) -> Array:
        if self.standardized:
            kernel = jaxnorm.weight_standardize(kernel, scaled=True)
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=layout
        )


NETS = {"dense": Dense, "conv": Conv}
