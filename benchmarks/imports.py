"""How long each library takes to import, in a fresh process each."""

import subprocess
import sys
import time

import numpy as np


def seconds(statements: dict[str, str], rounds: int) -> dict[str, float]:
    """The median for each statement, in an order drawn anew each round."""
    taken = {name: [] for name in statements}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(statements)):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", statements[name]], check=True)
            taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in taken.items()}
