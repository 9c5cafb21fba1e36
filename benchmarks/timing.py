"""How long several programs take, side by side."""

import time

import jax
import numpy as np

WARM_UP = 2


def samples(calls, rounds, seconds=0.0):
    """The times of each call, in seconds, the calls taking turns at random.

    Each timed call follows an untimed one of the same program, so that it finds caches
    and threads as its own library leaves them. There are `rounds` rounds, and more, up
    to ten times as many, until `seconds` have passed.
    """
    times = {key: [] for key in calls}
    rng = np.random.default_rng(0)
    begin, done = time.perf_counter(), -WARM_UP
    while done < rounds or (done < 10 * rounds and _since(begin) < seconds):
        for i in rng.permutation(len(calls)):
            key = list(calls)[i]
            jax.block_until_ready(calls[key]())
            start = time.perf_counter()
            result = jax.block_until_ready(calls[key]())
            times[key].append(_since(start))
            del result  # outside of the time taken
        done += 1
    return {key: taken[WARM_UP:] for key, taken in times.items()}


def _since(start):
    return time.perf_counter() - start


def milliseconds(calls, rounds):
    """The lower quartile of each call's times, the calls taking turns at random."""
    times = samples(calls, rounds)
    return {key: 1e3 * float(np.quantile(t, 0.25)) for key, t in times.items()}
