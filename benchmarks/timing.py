"""How long several programs take, side by side."""

import time

import jax
import numpy as np


def milliseconds(calls, rounds):
    """The lower quartile of each call's times, the calls taking turns at random."""
    times = {key: [] for key in calls}
    rng = np.random.default_rng(0)
    for _ in range(rounds + 2):
        for i in rng.permutation(len(calls)):
            key = list(calls)[i]
            start = time.perf_counter()
            jax.block_until_ready(calls[key]())
            times[key].append(time.perf_counter() - start)
    return {k: 1e3 * float(np.quantile(t[2:], 0.25)) for k, t in times.items()}
