"""The module APIs of Flax behind one interface, for tests of what both must do.

A layer is a class name and settings. Its variables are a plain tree in both APIs, as
Linen has them: {"params": {name: array}, "batch_stats": {name: array}}.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
FEATURES = 6
SHAPE = (4, 3, 4, FEATURES)

# What a class needs in both APIs before it can be called.
NEEDED: dict[str, dict[str, Any]] = {
    "BatchNorm": {"use_running_average": False},
    "Norm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
}
# The settings that the generic module is tested with.
SETTINGS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"momentum": 0.9},
    "GroupNorm": {"num_groups": 2},
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A class of `lib`, which is Flax's namespace or jaxnorm's, and its arguments."""

    lib: ModuleType
    name: str
    kwargs: Mapping[str, Any]

    def with_(self, **kwargs: Any):
        return dataclasses.replace(self, kwargs={**self.kwargs, **kwargs})

    def make(self) -> Any:
        """The module of Flax."""
        raise NotImplementedError

    def init(self, x, **call) -> dict[str, Any]:
        """Its variables at first."""
        raise NotImplementedError

    def apply(self, variables, x, **call) -> tuple[Any, dict[str, Any]]:
        """Output and variables after the call."""
        raise NotImplementedError

    def output(self, x, **call) -> tuple[Any, dict[str, Any]]:
        """As `apply`, on the variables that it has at first."""
        raise NotImplementedError

    def variables(self, x=None, seed=0) -> dict[str, Any]:
        """Its variables, off their initial values and positive."""
        x = sample() if x is None else x
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape).astype(a.dtype)),
            jax.eval_shape(self.init, x),
        )

    def promotion(self):
        """Flax may promote ranks, jaxnorm must not need to."""
        theirs = self.lib.__name__.startswith("flax")
        return jax.numpy_rank_promotion("allow" if theirs else "raise")


class LinenLayer(Layer):
    def make(self) -> nn.Module:
        kwargs = {k: v for k, v in self.kwargs.items() if k != "num_features"}
        return getattr(self.lib, self.name)(**kwargs)

    def init(self, x, **call):
        return self.output(x, **call)[1]

    def output(self, x, **call):
        with self.promotion():
            y, new = self.make().init_with_output(jax.random.key(0), x, **call)
        return y, {"params": {}, "batch_stats": {}, **new}

    def apply(self, variables, x, **call):
        with self.promotion():
            y, new = self.make().apply(variables, x, mutable=["batch_stats"], **call)
        return y, {**variables, **new}


class NNXLayer(Layer):
    def make(self) -> nnx.Module:
        kwargs = {"num_features": FEATURES, "rngs": nnx.Rngs(0), **self.kwargs}
        return getattr(self.lib, self.name)(**kwargs)

    def read(self, module) -> dict[str, Any]:
        """The variables of the module."""
        return {k: nnx.to_pure_dict(nnx.state(module, v)) for k, v in KINDS.items()}

    def write(self, module, variables) -> None:
        for kind, values in variables.items():
            state = nnx.state(module, KINDS[kind])
            nnx.replace_by_pure_dict(state, values)
            nnx.update(module, state)

    def init(self, x, **call):
        return self.read(self.make())

    def output(self, x, **call):
        return self._call(self.make(), x, **call)

    def apply(self, variables, x, **call):
        module = self.make()
        self.write(module, variables)
        return self._call(module, x, **call)

    def _call(self, module, x, **call):
        with self.promotion():
            return module(x, **call), self.read(module)


KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


@dataclasses.dataclass(frozen=True)
class Api:
    name: str
    flax: ModuleType
    own: ModuleType
    layer: type[Layer]

    def __repr__(self) -> str:
        return self.name  # in the names of tests

    def ours(self, name: str, **kwargs: Any) -> Layer:
        return self.layer(self.own, name, {**NEEDED.get(name, {}), **kwargs})

    def theirs(self, name: str, **kwargs: Any) -> Layer:
        """Flax's layer, with the variance that is right."""
        kwargs = {**NEEDED.get(name, {}), "use_fast_variance": False, **kwargs}
        return self.layer(self.flax, name, kwargs)

    def generic(self, name: str, **kwargs: Any) -> Layer:
        """The generic module, of the settings of this name."""
        norm = getattr(jaxnorm, name)(**SETTINGS.get(name, {}))
        return self.ours("Norm", **{"norm": norm, **kwargs})


def initial(layers, x):
    """The variables of each layer at first, from one compiled program, of which the
    forward pass is no part."""
    return jax.jit(lambda: [layer.init(x) for layer in layers])()


def applied(layers, variables, x, **call):
    """What each layer makes of the same variables, from one compiled program."""

    def run(variables, x):
        return [layer.apply(variables, x, **call) for layer in layers]

    return jax.jit(run)(variables, x)


LINEN = Api("linen", nn, jaxnorm.linen, LinenLayer)
NNX = Api("nnx", nnx, jaxnorm.nnx, NNXLayer)

both = pytest.mark.parametrize("api", [LINEN, NNX], ids=str)
names = pytest.mark.parametrize("name", NAMES)


def assert_extends(flax_function, our_function):
    """Flax's parameters first, unchanged; the rest keyword-only and optional."""
    flax_parameters = list(inspect.signature(flax_function).parameters.values())
    our_parameters = list(inspect.signature(our_function).parameters.values())
    count = len(flax_parameters)
    for f, o in zip(flax_parameters, our_parameters, strict=False):
        assert (o.name, o.kind) == (f.name, f.kind)
        assert o.default is f.default or o.default == f.default, f.name
    assert len(our_parameters) >= count
    for o in our_parameters[count:]:
        assert o.kind is inspect.Parameter.KEYWORD_ONLY, o.name
        assert o.default is not inspect.Parameter.empty, o.name


def sample(shape=SHAPE, seed=0):
    """Float32 values whose mean is not 0 and whose deviation is not 1."""
    x = np.random.default_rng(seed).normal(1, 2, shape)
    return jnp.asarray(x.astype(np.float32))


def sample_mask():
    """Every fifth element is masked: along each axis of SHAPE at least two are not."""
    return jnp.asarray((np.arange(np.prod(SHAPE)) % 5 > 0).reshape(SHAPE))


def assert_close(got, want, tolerance=1e-5):
    """Equal trees of finite numbers, up to a few hundred float32 roundoffs."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.shape == w.shape
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        # Apart from the comparison, to which NaN equals NaN.
        assert np.isfinite(g).all() and np.isfinite(w).all()
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def assert_identical(got, want):
    """Equal trees: names, shapes, dtypes and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert np.isfinite(np.asarray(g, np.float64)).all()
        assert np.array_equal(g, w)
