"""Grids of visual tokens made smaller: which tokens meet at each new place, and how much each of them counts.

A position of the text is then a weighted sum of at most four visual tokens. All of it follows from sizes, so that the
host decides it and the device only adds up: no shape of the model depends on a picture.
"""

from collections.abc import Callable

import numpy as np

from lvlm_jax.processing.schema import NEWLINE, TAPS, Blend
from lvlm_jax.shapes import Float, Int

Grid = Int[np.ndarray, "rows cols"]


def bilinear(grid: Grid, rows: int, cols: int) -> Blend:
    """A grid of token numbers at another size, in reading order: between the four tokens around each new place.

    Places are the middles of cells, and a smaller grid skips tokens (no antialiasing), as the torch library's
    ``interpolate(mode="bilinear")`` has it.
    """
    (up, down, low), (left, right, far) = _neighbours(grid.shape[0], rows), _neighbours(grid.shape[1], cols)
    corners = [grid[np.ix_(r, c)] for r in (up, down) for c in (left, right)]
    weights = [np.outer(r, c) for r in (1 - low, low) for c in (1 - far, far)]
    return Blend(
        np.stack(corners, axis=-1).reshape(-1, TAPS).astype(np.int32),
        np.stack(weights, axis=-1).reshape(-1, TAPS).astype(np.float32),
    )


def _neighbours(size: int, count: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(the cell at or before each of `count` places along `size` cells, the next one, how much the next counts)."""
    places = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32(size / count) - np.float32(0.5)
    places = np.maximum(places, np.float32(0))
    before = np.minimum(places.astype(np.int64), size - 1)
    return before, np.minimum(before + 1, size - 1), (places - before).astype(np.float32)


def _half_bilinear(grid: Grid) -> Blend:
    return bilinear(grid, *(-(-side // 2) for side in grid.shape))


def _half_average(grid: Grid) -> Blend:
    rows, cols = (side // 2 for side in grid.shape)
    squares = grid[: 2 * rows, : 2 * cols].reshape(rows, 2, cols, 2).swapaxes(1, 2).reshape(-1, TAPS)
    return Blend(squares.astype(np.int32), np.full(squares.shape, 1 / TAPS, np.float32))


POOLS: dict[str, Callable[[Grid], Blend] | None] = {
    "none": None,
    "bilinear": _half_bilinear,
    "average": _half_average,
    "corner": _half_average,
}
"""Name -> a grid of half the side: rounded up and interpolated (LLaVA-OneVision), or rounded down, the mean of each
square of four; or the first of each square, where a model has averaged before its connector (LLaVA-NeXT-Video)."""


def pooled_side(side: int, pool: str) -> int:
    """The side of a square grid after a pool of `POOLS`."""
    return {"none": side, "bilinear": -(-side // 2)}.get(pool, side // 2)


def end_rows(
    index: Int[np.ndarray, "rows n"], blend: Blend | None = None
) -> tuple[Int[np.ndarray, " m"], Blend | None]:
    """A newline after each row of positions: (the positions one after another, the blend that goes with them)."""
    rows = len(index)
    ended = np.concatenate([index, np.full((rows, 1), NEWLINE)], axis=1).reshape(-1).astype(np.int32)
    if blend is None:
        return ended, None
    more = lambda x: np.pad(x.reshape(rows, -1, TAPS), ((0, 0), (0, 1), (0, 0))).reshape(-1, TAPS)  # noqa: E731
    return ended, Blend(more(blend.index), more(blend.weight))


def taps(
    image_index: Int[np.ndarray, " n"], blend: Blend | None = None
) -> tuple[Int[np.ndarray, "n 4"], Float[np.ndarray, "n 4"]]:
    """`Batch.blend_index` and `Batch.blend_weight` of some positions; one visual token alone counts whole.

    Args:
      image_index: as `Batch.image_index`.
      blend: in the numbers of the group's visual tokens.
    """
    index, weight = np.zeros((2, len(image_index), TAPS))
    index[:, 0], weight[:, 0] = np.maximum(image_index, 0), image_index >= 0
    if blend is not None:
        several = blend.weight.any(axis=1)
        index[several], weight[several] = blend.index[several], blend.weight[several]
    return index.astype(np.int32), weight.astype(np.float32)
