"""Where do the data come from? Nothing is downloaded: what is missing is named."""

import gzip
import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

FASHION = Path("/usr/share/datasets/fashion-mnist")
TRAIN_SIZE, VALIDATION_SIZE = 20_000, 5_000


class MissingData(Exception):
    """A data set that is not on this machine; the message says what brings it."""


class Split(NamedTuple):
    inputs: jax.Array
    labels: jax.Array

    @property
    def size(self) -> int:
        return len(self.labels)

    def take(self, rows) -> "Split":
        return Split(self.inputs[rows], self.labels[rows])


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split


def images(name: str, data_dir: Path | None = None) -> Data:
    """Images (N, height, width, 1) of mean 0 and deviation 1, of 10 classes."""
    parts = digits() if name == "digits" else fashion(data_dir)
    mean, deviation = parts[0][0].mean(), parts[0][0].std()
    return Data(*(split((x - mean) / deviation, y) for x, y in parts))


def split(inputs: np.ndarray, labels: np.ndarray) -> Split:
    return Split(jnp.asarray(inputs, jnp.float32), jnp.asarray(labels, jnp.int32))


def digits():
    """The digits of scikit-learn, each pixel repeated: 16 by 16."""
    return [
        (pixels.reshape(-1, 8, 8, 1).repeat(2, 1).repeat(2, 2), labels)
        for pixels, labels in digit_parts()
    ]


def digit_parts() -> list[tuple[np.ndarray, np.ndarray]]:
    """1,000 digits to train on, 398 to choose rates by, and 398 to test on."""
    pixels, labels = arrays(datasets.load_digits)
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.split(order, [1000, 1398, 1796])[:3]
    return [(pixels[rows], labels[rows]) for rows in parts]


def arrays(load: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of a data set of scikit-learn."""
    inputs, labels = load(return_X_y=True)
    return inputs, labels


def fashion(data_dir: Path | None):
    """The first 20,000 images of Fashion-MNIST to train on, the next 5,000 to choose
    rates by, and the 10,000 of its test set."""
    folder = find_fashion(data_dir)
    train, test = (read_fashion(folder, part) for part in ("train", "t10k"))
    ends = [TRAIN_SIZE, TRAIN_SIZE + VALIDATION_SIZE]
    parts = zip(*(np.split(values, ends) for values in train), strict=True)
    return [*list(parts)[:2], test]


def find_fashion(data_dir: Path | None) -> Path:
    folders = [FASHION]
    if data_dir:
        folders = [data_dir, data_dir / "fashion-mnist"]
    for folder in folders:
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return folder
    raise MissingData(
        f"Fashion-MNIST is not in {folders[-1]}: install the Debian package "
        "dataset-fashion-mnist, give its folder with --data-dir, or use --data digits"
    )


def read_fashion(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    return pixels[..., None].astype(np.float32), read_idx(
        folder / f"{part}-labels-idx1-ubyte.gz"
    )


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the format IDX: its rank, its shape, its elements."""
    with gzip.open(path) as file:
        content = file.read()
    ends = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:ends], ">i4")
    return np.frombuffer(content[ends:], np.uint8).reshape(shape)


class Sequences(NamedTuple):
    """Sequences (N, longest, features), and how long each is."""

    inputs: jax.Array
    lengths: jax.Array
    labels: jax.Array

    def padded(self, length: int) -> "Sequences":
        """With zeros up to `length` steps."""
        more = length - self.inputs.shape[1]
        inputs = jnp.pad(self.inputs, ((0, 0), (0, more), (0, 0)))
        return self._replace(inputs=inputs)

    def take(self, rows) -> "Sequences":
        return Sequences(*(values[rows] for values in self))


def sequences(name: str, data_dir: Path | None = None) -> list[Sequences]:
    """Sequences to train on, to choose rates by, and to test on."""
    if name == "digits":
        return digit_sequences()
    train, test = (read_vowels(data_dir, part) for part in ("TRAIN", "TEST"))
    # A fifth of the training set, of all speakers.
    held = np.arange(len(train.labels)) % 5 == 0
    return [train.take(~held), train.take(held), test]


def digit_sequences() -> list[Sequences]:
    """Digits, four pixels at a time, up to the last ink."""
    parts = []
    for pixels, labels in digit_parts():
        steps = (pixels / 16).astype(np.float32).reshape(-1, 16, 4)
        lengths = 16 - np.any(steps > 0, axis=2)[:, ::-1].argmax(1)
        parts.append(as_sequences(steps, lengths, labels))
    return parts


def as_sequences(inputs, lengths, labels) -> Sequences:
    return Sequences(
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(labels, jnp.int32),
    )


def read_vowels(data_dir: Path | None, part: str) -> Sequences:
    """Utterances of nine speakers: 12 coefficients a step, 7 to 29 steps."""
    lines = vowels_text(data_dir, part).split("@data")[1].strip().splitlines()
    series, labels = [], []
    for line in lines:
        *features, label = line.split(":")
        series.append(np.array([[float(v) for v in f.split(",")] for f in features]).T)
        labels.append(int(label) - 1)
    lengths = [len(steps) for steps in series]
    inputs = np.zeros((len(series), 29, 12), np.float32)
    for row, steps in zip(inputs, series, strict=True):
        row[: len(steps)] = steps
    return as_sequences(inputs, lengths, labels)


def vowels_text(data_dir: Path | None, part: str) -> str:
    name = f"aeon/datasets/data/JapaneseVowels/JapaneseVowels_{part}.ts"
    for wheel in sorted(data_dir.glob("aeon-*.whl")) if data_dir else ():
        return zipfile.ZipFile(wheel).read(name).decode()
    for folder in aeon_folders():
        return (folder.parent / name).read_text()
    raise MissingData(
        f"Japanese Vowels is not in {data_dir or 'this environment'}: fetch the wheel "
        "that holds it, pip download --no-deps aeon, and give its folder with "
        "--data-dir, or use --data digits"
    )


def aeon_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("aeon")
    yield from map(Path, spec.submodule_search_locations or ()) if spec else ()


class Table(NamedTuple):
    """Features of different scales, and classes."""

    inputs: np.ndarray
    labels: np.ndarray


def tables() -> dict[str, Table]:
    """Wine (178 of 13 features) and breast cancer (569 of 30), from scikit-learn."""
    loaders = {"wine": datasets.load_wine, "breast cancer": datasets.load_breast_cancer}
    return {name: Table(*arrays(load)) for name, load in loaders.items()}
