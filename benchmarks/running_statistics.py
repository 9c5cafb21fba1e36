"""Errors of running statistics beside brax, stable-baselines3 and Keras, as a table.

From the root of the repository, in about a minute on two CPU cores:

    pip install -e . brax stable-baselines3 keras
    python benchmarks/running_statistics.py

Each library gets the same batches one by one, and then standardizes the last of them.
Compared are deviation and output with NumPy's in float64, of all batches at once. Of
brax these are `running_statistics.update` and `normalize`; of stable-baselines3
`RunningMeanStd.update` and, as `VecNormalize` has it, `(x - mean) / sqrt(var + 1e-8)`;
of Keras `Normalization`, adapted to all batches as one array, as it takes batches only
where TensorFlow is installed. JAX has its 32 bits, the default. It writes
benchmarks/results/running_statistics.md; what is not installed is left out.
"""

import argparse
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm

RESULT = Path(__file__).parent / "results" / "running_statistics.md"
HEAD = """Largest errors over 4 features: of the deviation, relative, and of the output,
in deviations. Rounding to float32 alone makes errors of 6e-8. Written by
`python benchmarks/running_statistics.py` with {versions}, on the CPU.

"""


class Stream(NamedTuple):
    title: str
    batches: list[np.ndarray]
    weights: list[np.ndarray] | None = None  # of each example
    decay: float = 1.0


def streams(scale: int) -> Iterator[Stream]:
    """Each of some thousands of batches, or a `scale` of them."""
    rng = np.random.default_rng(0)

    def normal(count: int, size: int, dtype: Any = np.float32, **kwargs: Any):
        for _ in range(max(count // scale, 2)):
            yield rng.normal(size=(size, 4), **kwargs).astype(dtype)

    yield Stream("mean 0, deviation 1", [*normal(2000, 64)])
    yield Stream("mean 1e4, deviation 1", [*normal(2000, 64, loc=1e4)])
    yield Stream("mean 1e6, deviation 10", [*normal(2000, 64, loc=1e6, scale=10)])
    yield Stream("mean 1e4, one example a batch", [*normal(20_000, 1, loc=1e4)])
    level = np.linspace(0, 1e4, max(2000 // scale, 2), dtype=np.float32)
    rising = [x + v for x, v in zip(normal(2000, 64), level, strict=True)]
    yield Stream("mean rising to 1e4", rising)
    yield Stream("2^25 elements, mean 100", [*normal(32, 2**20, loc=100)])
    seconds = normal(2000, 64, np.float64, loc=1.7e9, scale=10)
    yield Stream("float64, 1.7e9, deviation 10", [*seconds])
    batches = [*normal(2000, 64)]
    weights = [rng.random(64).astype(np.float32) for _ in batches]
    yield Stream("weights from 0 to 1", batches, weights)
    yield Stream("forgotten by 0.99", rising, decay=0.99)


def exact(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Deviation, and the last batch standardized, in float64."""
    ages = np.arange(len(stream.batches))[::-1]
    ones = [np.ones(len(x)) for x in stream.batches]
    each = zip(stream.weights or ones, ages, strict=True)
    weights = np.concatenate([w * stream.decay ** float(age) for w, age in each])
    x = np.concatenate(stream.batches).astype(np.float64)
    mean = np.average(x, 0, weights)
    deviation = np.sqrt(np.average((x - mean) ** 2, 0, weights))
    return deviation, (stream.batches[-1] - mean) / deviation


def of_jaxnorm(stream: Stream) -> tuple[Any, Any]:
    weighted = stream.weights is not None
    decay = None if stream.decay == 1 else stream.decay
    wide = stream.batches[0].dtype == np.float64

    def update(inputs: Any, x: Any, weights: Any) -> Any:
        weights = weights[:, None] if weighted else None
        return inputs.update(x, weights=weights, decay=decay)

    update = update if wide else jax.jit(update)
    inputs = jaxnorm.Standardizer.init(4)
    for i, x in enumerate(stream.batches):
        inputs = update(inputs, x, stream.weights[i] if stream.weights else None)
    return inputs.deviation, inputs.apply(stream.batches[-1])


def of_brax() -> Callable[[Stream], tuple[Any, Any] | None]:
    brax = importlib.import_module("brax.training.acme.running_statistics")

    def run(stream: Stream) -> tuple[Any, Any] | None:
        if stream.decay != 1:
            return None
        update = jax.jit(lambda s, x, w: brax.update(s, x, weights=w))
        state = brax.init_state(jnp.zeros(4))
        for i, x in enumerate(stream.batches):
            weights = stream.weights[i] if stream.weights else None
            state = update(state, jnp.asarray(x), weights)
        return state.std, brax.normalize(jnp.asarray(stream.batches[-1]), state)

    return run


def of_stable_baselines3() -> Callable[[Stream], tuple[Any, Any] | None]:
    name = "stable_baselines3.common.running_mean_std"
    running_mean_std = importlib.import_module(name)

    def run(stream: Stream) -> tuple[Any, Any] | None:
        if stream.decay != 1 or stream.weights:
            return None
        seen = running_mean_std.RunningMeanStd(shape=(4,))
        for x in stream.batches:
            seen.update(x)
        deviation = np.sqrt(seen.var + 1e-8)
        y = (stream.batches[-1] - seen.mean) / deviation
        return np.sqrt(seen.var), y.astype(np.float32)

    return run


def of_keras() -> Callable[[Stream], tuple[Any, Any] | None]:
    keras = importlib.import_module("keras")

    def run(stream: Stream) -> tuple[Any, Any] | None:
        if stream.decay != 1 or stream.weights:
            return None
        layer = keras.layers.Normalization()
        layer.adapt(np.concatenate(stream.batches))
        deviation = np.sqrt(np.asarray(layer.variance).reshape(4))
        return deviation, layer(stream.batches[-1])

    return run


PEERS = {
    "jaxnorm": lambda: of_jaxnorm,
    "brax": of_brax,
    "stable-baselines3": of_stable_baselines3,
    "keras": of_keras,
}


def installed(names: list[str]) -> dict[str, Callable[[Stream], Any]]:
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name]()
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
    return found


def errors(stream: Stream, run: Callable[[Stream], Any]) -> str:
    """Of deviation and output, as one cell."""
    made = run(stream)
    if made is None:
        return "-"
    pairs = zip(made, exact(stream), strict=True)
    (deviation, right), (y, expected) = ((np.asarray(a, float), b) for a, b in pairs)
    found = abs(deviation / right - 1).max(), abs(y - expected).max()
    return ", ".join(f"{v:.0e}".replace("e-0", "e-").replace("e+0", "e") for v in found)


def versions(names: list[str]) -> str:
    version = importlib.metadata.version
    return ", ".join(f"{name} {version(name)}" for name in [*names, "jax"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--libraries", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--scale", type=int, default=1, help="so many times less data")
    args = parser.parse_args()
    runs = installed(args.libraries)
    lines = [["Stream", *runs], ["---"] * (1 + len(runs))]
    for stream in streams(args.scale):
        lines.append([stream.title, *(errors(stream, run) for run in runs.values())])
        print(*lines[-1], sep=" | ", flush=True)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    args.out.write_text(HEAD.format(versions=versions([*runs])) + table + "\n")


if __name__ == "__main__":
    main()
