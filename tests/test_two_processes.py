"""Two processes, joined over loopback, compute what one process does."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import Mesh
from norms import assert_close
from synced_step import arrays, step

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one():
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, errors) in zip(processes, outputs, strict=True):
        assert p.returncode == 0, errors[-3000:]
    results = [
        json.loads(line.removeprefix("RESULT "))
        for out, _ in outputs
        for line in out.splitlines()
        if line.startswith("RESULT ")
    ]
    assert len(results) == 2
    one = step(Mesh(np.array(jax.devices()[:1]), ("data",)), *arrays())
    for name, value in one.items():
        if name in ("y", "dx"):
            pieces = sorted(piece for r in results for piece in r[name])
            assert [start for start, _ in pieces] == [0, 2, 4, 6]
            together = np.concatenate([np.array(rows) for _, rows in pieces])
            assert_close(together, value, summed=value.size, size=10)
        else:
            for r in results:
                assert_close(r[name], value, summed=24, size=10)
