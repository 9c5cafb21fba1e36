"""In which order are the axes of a kernel?"""

import numpy as np


def relayout(kernel: np.ndarray, source: str, target: str) -> np.ndarray:
    """`kernel`, whose axes are those of `source`, with the axes of `target`.

    Layouts are those of `Convention`, such as "OIS".

    >>> import numpy as np
    >>> relayout(np.ones((8, 4, 3, 5)), "OIS", "SIO").shape
    (3, 5, 4, 8)
    """
    labels, wanted = (_labels(v, kernel.ndim) for v in (source, target))
    moved = kernel.transpose([labels.index(v) for v in wanted])
    if ("s" in source) == ("s" in target):
        return moved
    space = tuple(i for i, v in enumerate(wanted) if v not in ("I", "O"))
    return np.flip(moved, space)


def _labels(layout: str, ndim: int) -> list[str]:
    """A label for each axis; those of space are numbered."""
    space = [str(i) for i in range(ndim - 2)]
    return [v for c in layout.upper() for v in (space if c == "S" else [c])]
