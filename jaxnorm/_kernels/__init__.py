"""Pallas kernels for GPUs, by block pattern and not by method. None has run on a GPU.

`rows` is the gradient of normalized rows; `columns` takes its sums over columns;
`support` says which of them fits where. Importing these imports no part of Pallas.
"""
