"""The size at which a picture of any shape has at most so many patches: NaFlex, as SigLIP 2 has it.

Source: SigLIP 2 (arXiv 2502.14786), section 2.4. Only width and height are read, so that lengths are known before
anything is decoded.
"""

import math

_SMALLEST, _LARGEST, _ENOUGH = 1e-6, 100.0, 1e-5


def fitted(width: int, height: int, patch: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns) of patches of a picture: as many as fit into `max_patches`, in nearly its own shape.

    Each side is scaled alike and rounded up to whole patches. The scale is found by halving an interval, as the
    released processor finds it, for sizes hang on where that search ends.
    """

    def sides(scale: float) -> tuple[int, int]:
        return tuple(max(1, math.ceil(side * scale / patch)) for side in (height, width))

    low, high = _SMALLEST, _LARGEST
    while high - low >= _ENOUGH:
        middle = (low + high) / 2
        rows, cols = sides(middle)
        low, high = (middle, high) if rows * cols <= max_patches else (low, middle)
    return sides(low)
