"""What the device and its memory are, and how fast: what nothing can be faster than."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from environment import revision

from gpu import clock
from gpu.plan import Settings
from gpu.work import Item, Row

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "liger_kernel")
QUERY = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def items(settings: Settings) -> Iterator[Item]:
    yield Item("device", lambda: [_device()])
    yield Item("ceilings", lambda: _ceilings(settings))


def _device() -> Row:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "capability": str(getattr(device, "compute_capability", "none")),
        "card": _card(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jaxnorm": _revision()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _revision() -> str:
    try:
        return revision()
    except OSError:
        return "unknown, as there is no git"


def _card() -> str:
    """What the driver says of the card now; nothing is set."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "no nvidia-smi"
    options = [f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run([command, *options], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip()


def _ceilings(settings: Settings) -> Iterator[Row]:
    """GB/s of a copy, of reading and of writing; the microseconds of a launch."""
    plan = settings.plan
    # Not zeros, which some memories compress.
    x = jax.random.normal(jax.random.key(0), (plan.buffer // 4,))
    for name, f, args, moved in (
        ("copy", jnp.negative, (x,), 2),
        ("read", jnp.sum, (x,), 1),
        ("write", lambda v: jnp.broadcast_to(v, x.shape), (x[0],), 1),
    ):
        call = clock.rotating(jax.jit(f), args, 0)
        bandwidth = moved * x.nbytes / clock.microseconds(call, plan) / 1000
        yield {"ceiling": name, "value": bandwidth}
    small = clock.rotating(jax.jit(lambda v: v + 1), (x[:8],), 0)
    yield {"ceiling": "launch_us", "value": clock.by_clock(small, plan)}
    yield {"ceiling": "by_cupti", "value": clock.kernel_times(small, plan) is not None}
    yield {"card_after": _card()}
