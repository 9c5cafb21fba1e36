"""The data of example 01: images in memory, checked, shifted and cut into batches."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from digits import Digits


class BadInput(ValueError):
    """Options or files that cannot be used; the message is for the user."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


def load_npz(path: Path) -> tuple[Digits, Digits]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as npz:
            arrays = {key: npz[key] for key in keys if key in npz}
    except FileNotFoundError:
        raise BadInput(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise BadInput(f"{path} is no readable npz file: {error}") from None
    missing = [key for key in keys if key not in arrays]
    require(not missing, f"{path} lacks {', '.join(missing)}")
    try:
        train = checked(arrays, "x_train", "y_train")
        test = checked(arrays, "x_test", "y_test")
        shapes = [split.images.shape[1:] for split in (train, test)]
        require(shapes[0] == shapes[1], f"x_train and x_test hold images of {shapes}")
        known = test.labels.max() <= train.labels.max()
        require(known, "y_test has labels above the largest of y_train")
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    return train, test


def checked(arrays: dict[str, np.ndarray], x: str, y: str) -> Digits:
    images, labels = arrays[x], arrays[y]
    is_byte = images.dtype == np.uint8
    is_float = np.issubdtype(images.dtype, np.floating)
    is_integer = np.issubdtype(labels.dtype, np.integer)
    require(is_byte or is_float, f"{x} is {images.dtype}, not uint8 or floating point")
    require(is_integer, f"{y} is {labels.dtype}, not integer")
    require(images.ndim in (3, 4), f"{x} has shape {images.shape}, not (N, H, W[, C])")
    require(labels.ndim == 1, f"{y} has shape {labels.shape}, not (N,)")
    same = len(images) == len(labels)
    require(same, f"{len(images)} images in {x}, but {len(labels)} labels in {y}")
    require(images.size > 0, f"{x} is empty")
    require(0 <= labels.min(), f"{y} has negative labels")
    require(labels.max() < 2**16, f"{y} has labels above {2**16 - 1}")
    inside = is_byte or bool(np.all((0 <= images) & (images <= 1)))
    require(inside, f"{x} has floating point pixels that are NaN or outside [0, 1]")
    images = images.astype(np.float32) / (255 if is_byte else 1)
    return Digits(images.reshape(*images.shape[:3], -1), labels.astype(np.int32))


def checksum(*splits: Digits) -> int:
    value = 0
    for array in (array for split in splits for array in split):
        value = zlib.crc32(array.tobytes(), value)
    return value


def shifted(split: Digits, rng: np.random.Generator) -> Digits:
    """Every image moved by up to one pixel each way."""
    height, width = split.images.shape[1:3]
    padded = np.pad(split.images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    moves = rng.integers(3, size=(len(padded), 2))
    moved = [
        image[y : y + height, x : x + width]
        for image, (y, x) in zip(padded, moves, strict=True)
    ]
    return Digits(np.stack(moved), split.labels)


def batches(split: Digits, order: np.ndarray, size: int) -> Iterator[dict]:
    """Batches of one fixed shape; the last is padded, and its padding not valid."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padding = (0, size - len(rows))
        yield {
            "image": np.pad(split.images[rows], (padding, (0, 0), (0, 0), (0, 0))),
            "label": np.pad(split.labels[rows], padding),
            "valid": np.arange(size) < len(rows),
        }
