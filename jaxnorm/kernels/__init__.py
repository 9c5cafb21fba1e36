"""Pallas kernels for GPUs, by block pattern and not by method. None has run on a GPU.

`rows` normalizes rows and differentiates that; `columns` takes sums over columns;
`support` says which of them fits where. Importing these imports no part of Pallas.
"""
