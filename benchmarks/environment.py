"""What the numbers were measured with."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from floor import cores

# Else the allocator hands large arrays back to the system, and whoever allocates first
# pays for the page faults of all.
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": "10000000000",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_freed_memory() -> None:
    """Starts this program anew, with an allocator that keeps what is freed."""
    if not KEEP.keys() <= os.environ.keys():
        os.environ.update(KEEP)
        os.execv(sys.executable, [sys.executable, *sys.argv])


def describe(packages: list[str]) -> dict:
    found = ["numpy", "jax", "jaxlib", *packages]
    versions = {name: importlib.metadata.version(name) for name in dict.fromkeys(found)}
    versions["jaxnorm"] += f" ({revision()})"
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | versions,
    }


def cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def revision() -> str:
    """Of the repository that this file is in."""
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return done.stdout.strip() or "not in a repository"
