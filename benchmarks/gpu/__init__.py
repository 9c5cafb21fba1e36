"""The phases of `benchmarks/on_gpu.py`, and what becomes of their results.

Each phase is a module with `items(settings)`, in order of value: what a deadline cuts
off are the last ones. `work` runs them, a process for each phase, and writes what they
find as lines of JSON; `summary` and `decide` read these, and need no JAX.
"""
