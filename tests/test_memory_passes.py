"""On an H100 and a TPU v5e, no norm takes more passes over memory than it did."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory_passes.py"
COMPILERS = {
    "h100": ("jax-cuda13-plugin", "nvidia-cuda-nvcc"),
    "v5e": ("libtpu",),
}


def installed(name):
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("target", COMPILERS)
def test_no_norm_takes_more_passes_than_recorded(target):
    """In a process of its own: these tests run on virtual devices, and strictly."""
    missing = [name for name in COMPILERS[target] if not installed(name)]
    if missing:
        extra = f"pip install -e '.[passes-{target}]'"
        pytest.skip(f"needs {' and '.join(missing)} to compile for it: {extra}")
    command = [sys.executable, str(SCRIPT), "--target", target, "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
