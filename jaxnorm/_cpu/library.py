"""Which kernels for CPUs this machine has: loaded on the first question."""

import ctypes
import functools
import importlib.metadata
import os
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


def problem() -> str | None:
    """Why there are no kernels for CPUs, and what to do; None if they are loaded."""
    return _load()[1]


def name() -> str:
    """The instruction set of the library that is loaded, such as "x86-64-v3"; "" where
    there is a problem."""
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
    files = {level: path for level in LEVELS if (path := _file(level))}
    if not files:
        return "", (
            "jaxnorm was installed without its kernels for CPUs, for want of a C++ "
            "compiler: install one, then jaxnorm again"
        )
    try:
        level = _best(files) if wanted == "1" else wanted
        if level not in files:
            return "", f"there is no library for {level} among {', '.join(files)}"
        _register(ctypes.CDLL(str(files[level])))
    except (OSError, AttributeError) as error:
        return "", f"the kernels for CPUs cannot be loaded: {error}"
    return level, None


def _file(level: str) -> Path | None:
    """The library for `level`: beside this file, or where an editable install has
    put it."""
    name = f"kernels-{level}.so"
    paths = [Path(__file__).parent / name]
    try:
        installed = importlib.metadata.distribution("jaxnorm")
        paths.append(Path(str(installed.locate_file(f"jaxnorm/_cpu/{name}"))))
    except importlib.metadata.PackageNotFoundError:
        pass  # a checkout on the path alone
    return next((path for path in paths if path.exists()), None)


def _best(files: dict[str, Path]) -> str:
    """The best of the levels in `files` that the processor has."""
    (*_, least) = files
    level = ctypes.CDLL(str(files[least])).jaxnorm_level()
    known = [v for v in files if v == "plain" or int(v[-1]) <= level]
    return known[0] if known else least


def _register(library: ctypes.CDLL) -> None:
    for handler in HANDLERS:
        function = jax.ffi.pycapsule(getattr(library, handler))
        jax.ffi.register_ffi_target(handler, function, platform="cpu")
