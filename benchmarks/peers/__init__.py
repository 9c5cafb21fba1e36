"""The libraries compared: one file each, and one line here."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from cases import Case

FILES = ("jaxnorm", "flax_linen", "flax_nnx", "haiku", "equinox", "keras", "torch")


class Unsupported(Exception):
    """The library cannot do this; the message says why."""


class Program(NamedTuple):
    """What one library does in one case, ready to be timed and checked."""

    calls: Mapping[str, Callable[[], Any]]  # by the name of the work
    results: Callable[[], dict[str, np.ndarray]]  # to be compared
    facts: Mapping[str, float]  # compile_seconds, temp_bytes, residual_bytes


class Peer(NamedTuple):
    """A library: what it builds for each norm and model, and how that is run.

    `norms` hold a function of the case or, for what the library lacks, the reason.
    `program` runs what such a function has built. `models` are functions from a case
    to a Program.
    """

    name: str
    package: str
    statement: str  # that imports it
    norms: Mapping[str, Callable[[Case], Any] | str]
    program: Callable[[Any, "Problem"], Program]
    models: Mapping[str, Callable[[Case], Program]] = {}

    def build(self, case: Case) -> Program:
        """Raises Unsupported where the library lacks what the case needs."""
        if case.op in self.models:
            return self.models[case.op](case)
        norm = self.norms.get(case.op, "the whole model is not built with it")
        if isinstance(norm, str):
            raise Unsupported(norm)
        return self.program(norm(case), problem(case))


class Problem(NamedTuple):
    """The data of a case, in float32; arrays have `case.array_shape`."""

    case: Case
    x: np.ndarray
    dy: np.ndarray  # what the gradient of the result is
    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]  # running ones


def problem(case: Case) -> Problem:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    n = case.channels
    params = {"scale": 1 + 0.2 * normal(n), "bias": normal(n)}
    stats = {"mean": 0.5 + 0.1 * normal(n), "var": 2 + normal(n) ** 2}
    params = {k: params[k] for k in case.features}
    x = 0.5 + 2 * normal(*case.array_shape)
    return Problem(case, x, normal(*case.array_shape), params, stats)


def load(names: list[str] | None = None) -> tuple[list[Peer], dict[str, str]]:
    """The peers of these names, or all; and of those not installed, the reason."""
    peers, missing = [], {}
    for file in FILES:
        if names is not None and file not in names:
            continue
        try:
            peers.append(importlib.import_module(f"peers.{file}").PEER)
        except ModuleNotFoundError as error:
            missing[file] = f"{error.name} is not installed"
    return peers, missing
