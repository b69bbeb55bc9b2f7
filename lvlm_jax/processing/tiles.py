"""Pictures of any resolution: which tiles one is cut into, and which visual token fills each of its positions.

All of it follows from a picture's width and height, so that texts are measured without decoding a picture. One
picture is the whole of it at the tower's size and then its tiles, a vision row each. Its positions are the whole
picture's tokens, and after them the tiles' tokens in reading order over the tiled picture, without the rows or columns
that are padding, a learned newline after each row. Source: LLaVA-NeXT (LLaVA 1.6) and the torch library's port of it.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.schema import NEWLINE
from lvlm_jax.shapes import Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The sizes that a picture may be fitted into and cut from.

    pinpoints: (height, width) in pixels, multiples of a tile's side; the first of equally good ones is taken, so their
    order counts. (The LLaVA authors write (width, height): turn theirs round.) unpad: how a side without its padding
    comes to whole tokens: "round" rounds to 7 decimals before it cuts, as the torch library does; "truncate" only cuts,
    as the authors do, which for some sizes is one row or column less.
    """

    pinpoints: tuple[tuple[int, int], ...]
    unpad: Literal["round", "truncate"] = "round"

    def __post_init__(self) -> None:
        if not self.pinpoints or any(len(pair) != 2 or min(pair) < 1 for pair in self.pinpoints):
            raise ValueError(f"pinpoints {self.pinpoints}: at least one (height, width) in pixels")
        if self.unpad not in ("round", "truncate"):
            raise ValueError(f"unpad {self.unpad!r} is unknown; choose 'round' or 'truncate'")

    def resolution(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the pinpoint that keeps most of a picture's pixels, and of those wastes the fewest.

        Raises ImageError for a picture so narrow that nothing of it is left at any of them.
        """
        best, most, least = None, 0, math.inf
        for rows, cols in self.pinpoints:
            scale = min(cols / width, rows / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if kept > most or (kept == most and rows * cols - kept < least):
                best, most, least = (rows, cols), kept, rows * cols - kept
        if best is None or not most:
            raise ImageError(
                f"<picture of {width} x {height}>: it is so narrow that at every pinpoint one side shrinks to nothing; "
                "cut it, or leave it out"
            )
        return best

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the picture inside its pinpoint, aspect kept; the rest is padding, half on each side."""
        rows, cols = self.resolution(width, height)
        across, down = cols / width, rows / height
        if across < down:
            return min(math.ceil(height * across), rows), cols
        return rows, min(math.ceil(width * down), cols)


@dataclasses.dataclass(frozen=True)
class Span:
    """The positions that one picture takes.

    rows: vision rows it needs. index int32[n]: which of its rows*Q visual tokens fills each position, or `NEWLINE`.
    """

    rows: int
    index: Int[np.ndarray, " n"]


def whole(visual_tokens: int) -> Span:
    """A picture that takes one vision row, all of it."""
    return Span(1, np.arange(visual_tokens, dtype=np.int32))


def span(width: int, height: int, tiles: Tiles, tile: int, visual_tokens: int) -> Span:
    """The positions of a picture of `width` x `height` pixels.

    Args:
      tile: side of a tile in pixels. visual_tokens: Q of a tile, a square number.
    """
    side = math.isqrt(visual_tokens)
    if side * side != visual_tokens:
        raise ValueError(f"{visual_tokens} visual tokens of a tile are no square, so tiles do not make one grid")
    high, wide = (size // tile for size in tiles.resolution(width, height))
    rows, cols = high * side, wide * side
    top, left = _padding(width, height, rows, cols, tiles.unpad)
    r, c = np.meshgrid(np.arange(top, rows - top), np.arange(left, cols - left), indexing="ij")
    number = 1 + r // side * wide + c // side
    index = number * visual_tokens + r % side * side + c % side
    index = np.concatenate([index, np.full((len(index), 1), NEWLINE)], axis=1)
    base = np.arange(visual_tokens)
    return Span(1 + high * wide, np.concatenate([base, index.reshape(-1)]).astype(np.int32))


def _padding(width: int, height: int, rows: int, cols: int, unpad: str) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) of a tiled picture's tokens that are padding."""
    whole_part = (lambda x: int(round(x, 7))) if unpad == "round" else int
    if width / height > cols / rows:
        return (rows - whole_part(height * (cols / width))) // 2, 0
    return 0, (cols - whole_part(width * (rows / height))) // 2
