"""Which kernels for CPUs this machine has: loaded on the first question."""

import ctypes
import functools
import importlib.metadata
import os
import threading
from pathlib import Path

import jax.ffi

LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "plain")  # the best first
SWITCH = "JAXNORM_CPU_KERNELS"
HANDLERS = (
    "jaxnorm_moments",
    "jaxnorm_sums",
    "jaxnorm_row_norm",
    "jaxnorm_row_gradient",
)
_lock = threading.Lock()  # a cache alone lets two threads load at once


def problem() -> str | None:
    """Why there are no kernels for CPUs, and what to do; None if they are loaded."""
    with _lock:
        return _load()[1]


def name() -> str:
    """The instruction set of the library that is loaded, such as "x86-64-v3"; "" where
    there is a problem."""
    with _lock:
        return _load()[0]


@functools.cache
def _load() -> tuple[str, str | None]:
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1", *LEVELS):
        raise ValueError(
            f"{SWITCH}={wanted!r} is none of 0 (no kernels), 1 (the best there are) "
            f"and {', '.join(LEVELS)} (those): set it to one of these, or not at all"
        )
    if wanted == "0":
        return "", f"the environment variable {SWITCH} is 0"
    files = _files()
    if not files:
        return "", (
            "jaxnorm was installed without its kernels for CPUs, for want of a C++ "
            "compiler that builds them: install GCC 12 or later, then jaxnorm again"
        )
    try:
        usable = _usable(files)
        level = next((v for v in usable if wanted in ("1", v)), None)
        if level is None:
            return "", _why_none(wanted, files, usable)
        _register(ctypes.CDLL(str(files[level])))
    except (OSError, AttributeError) as error:
        return "", (
            f"the kernels for CPUs cannot be loaded ({error}): install jaxnorm again, "
            "on this machine"
        )
    return level, None


def _files() -> dict[str, Path]:
    """The libraries that there are, the best first."""
    for folder in _folders():
        paths = {level: folder / f"kernels-{level}.so" for level in LEVELS}
        if found := {level: path for level, path in paths.items() if path.exists()}:
            return found
    return {}


def _folders() -> list[Path]:
    """Where libraries may be, the first one first: beside this file, or, where a
    checkout is imported, in the environment that it was installed into."""
    folders = [Path(__file__).parent]
    try:
        installed = importlib.metadata.distribution("jaxnorm")
    except importlib.metadata.PackageNotFoundError:
        return folders  # a checkout on the path alone
    return [*folders, Path(str(installed.locate_file("jaxnorm/_cpu")))]


def _usable(files: dict[str, Path]) -> list[str]:
    """Those levels of `files` that the processor has, the best first."""
    (*_, least) = files
    has = ctypes.CDLL(str(files[least])).jaxnorm_level()
    return [level for level in files if level == "plain" or int(level[-1]) <= has]


def _why_none(wanted: str, files: dict[str, Path], usable: list[str]) -> str:
    if wanted in LEVELS and wanted not in files:
        return (
            f"{SWITCH} is {wanted}, and jaxnorm was installed with {', '.join(files)} "
            "alone: set it to one of these, or not at all"
        )
    if usable:
        return (
            f"{SWITCH} is {wanted}, and the processor has {', '.join(usable)} alone: "
            "set it to one of these, or not at all"
        )
    return f"the processor has none of the instruction sets {', '.join(files)}"


def _register(library: ctypes.CDLL) -> None:
    for handler in HANDLERS:
        function = jax.ffi.pycapsule(getattr(library, handler))
        jax.ffi.register_ffi_target(handler, function, platform="cpu")
