"""Pictures of any resolution: which tiles one is cut into, and which visual token fills each of its positions.

All of it follows from a picture's width and height, so that texts are measured without decoding a picture. One
picture is the whole of it at the tower's size and then its tiles, a vision row each. Its positions are the whole
picture's tokens, and after them the tiles' tokens in reading order over the tiled picture, without the rows or columns
that are padding, a learned newline after each row. Source: LLaVA-NeXT (LLaVA 1.6), LLaVA-OneVision (arXiv 2408.03326,
section 3.2) and the torch library's ports of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.pooling import bilinear, end_rows
from lvlm_jax.processing.schema import NEWLINE, Blend
from lvlm_jax.shapes import Int

_SLACK = 1.1
"""How many times too long a side may be before a grid is made smaller; of the authors' code."""
_PROCESSORS = {"tiles": "LlavaNextImageProcessor", "whole": "LlavaOnevisionImageProcessor"}
_LIMIT = "anyres_max_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The sizes that a picture may be fitted into and cut from.

    pinpoints: (height, width) in pixels, multiples of a tile's side; the first of equally good ones is taken, so their
    order counts. (The LLaVA authors write (width, height): turn theirs round.) unpad: how a side without its padding
    comes to whole tokens: "round" rounds to 7 decimals before it cuts, as the torch library does; "truncate" only cuts,
    as the authors do, which for some sizes is one row or column less. most: a grid of more tokens than so many tiles
    hold is interpolated to fit (``anyres_max_9``); None keeps them all. several: how the pictures of a conversation
    that shows more than one are read: in "tiles" like a single one, or "whole", padded to a square, in one vision row
    with a newline after it (LLaVA-OneVision).
    """

    pinpoints: tuple[tuple[int, int], ...]
    unpad: Literal["round", "truncate"] = "round"
    most: int | None = None
    several: Literal["tiles", "whole"] = "tiles"

    def __post_init__(self) -> None:
        if not self.pinpoints or any(len(pair) != 2 or min(pair) < 1 for pair in self.pinpoints):
            raise ValueError(f"pinpoints {self.pinpoints}: at least one (height, width) in pixels")
        if self.unpad not in ("round", "truncate"):
            raise ValueError(f"unpad {self.unpad!r} is unknown; choose 'round' or 'truncate'")
        if self.several not in _PROCESSORS:
            raise ValueError(f"several {self.several!r} is unknown; choose 'tiles' or 'whole'")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most {self.most}: a grid of at least one tile's tokens; None keeps all of them")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Tiles | None":
        """From the content of preprocessor_config.json (LLaVA-NeXT, LLaVA-OneVision); None where it names none.

        Raises:
          ValueError: pinpoints of another processor.
        """
        if config.get("image_grid_pinpoints") is None:
            return None
        kind = str(config.get("image_processor_type", _PROCESSORS["tiles"]))
        found = [several for several, name in _PROCESSORS.items() if kind.startswith(name)]
        if not found:
            raise ValueError(
                f"preprocessor_config.json: image_grid_pinpoints of a {kind} are not supported; those of a "
                f"{' and of a '.join(_PROCESSORS.values())} are"
            )
        # Theirs keeps the limit with the model, and nine is its class's default.
        limit = config.get("vision_aspect_ratio", f"{_LIMIT}9" if found[0] == "whole" else None)
        pinpoints = tuple((int(height), int(width)) for height, width in config["image_grid_pinpoints"])
        return cls(pinpoints=pinpoints, unpad=config.get("unpad", "round"), most=limit_of(limit), several=found[0])

    def to_hf(self) -> dict[str, Any]:
        """Their fields of preprocessor_config.json; `from_hf` reads them back."""
        out = {
            "image_processor_type": _PROCESSORS[self.several],
            "do_pad": True,
            "image_grid_pinpoints": [list(pair) for pair in self.pinpoints],
        }
        if self.most is not None:
            out["vision_aspect_ratio"] = f"{_LIMIT}{self.most}"
        # Their model always rounds; the field is ours, and theirs keeps fields that it does not know.
        return out if self.unpad == "round" else {**out, "unpad": self.unpad}

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


def limit_of(word: str | None) -> int | None:
    """`Tiles.most` of the public ``vision_aspect_ratio`` (the authors' ``image_aspect_ratio``).

    Raises:
      ValueError: a word that is not known.
    """
    if word in (None, "anyres"):
        return None
    if not str(word).startswith(_LIMIT) or not str(word)[len(_LIMIT) :].isdigit():
        raise ValueError(f"vision_aspect_ratio is {word!r}, which is not supported; supported: 'anyres', '{_LIMIT}9'")
    return int(str(word)[len(_LIMIT) :])


@dataclasses.dataclass(frozen=True)
class Span:
    """The positions that one picture takes.

    rows: vision rows it needs. index int32[n]: which of its rows*Q visual tokens fills each position, or `NEWLINE`.
    blend: the positions that several of them fill; None where there are none.
    """

    rows: int
    index: Int[np.ndarray, " n"]
    blend: Blend | None = None


def whole(visual_tokens: int, newline: bool = False) -> Span:
    """A picture that takes one vision row, all of it."""
    index = np.arange(visual_tokens, dtype=np.int32)
    return Span(1, np.append(index, np.int32(NEWLINE)) if newline else index)


def largest(tiles: Tiles, tile: int, visual_tokens: int) -> tuple[int, int]:
    """(vision rows, positions) that no picture takes more of; `tile` and `visual_tokens` as for `span`."""
    most, side = max(rows * cols for rows, cols in tiles.pinpoints) // tile**2, math.isqrt(visual_tokens)
    kept = most if tiles.most is None else min(most, _SLACK**2 * tiles.most)
    newlines = side * max(rows // tile for rows, _ in tiles.pinpoints)
    return 1 + most, visual_tokens + math.ceil(kept * visual_tokens) + newlines


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
    grid = number * visual_tokens + r % side * side + c % side
    base, rows_needed = np.arange(visual_tokens, dtype=np.int32), 1 + high * wide
    ratio = 0.0 if tiles.most is None else math.sqrt(grid.size / (tiles.most * visual_tokens))
    if ratio <= _SLACK:
        return Span(rows_needed, np.concatenate([base, end_rows(grid)[0]]))
    fewer = [int(count // ratio) for count in grid.shape]
    if not min(fewer):
        raise ImageError(
            f"<picture of {width} x {height}>: its grid of {grid.shape[0]} x {grid.shape[1]} visual tokens is "
            f"interpolated to {fewer[0]} x {fewer[1]}, so nothing of it would be left; cut it, or leave it out"
        )
    blend = bilinear(grid, *fewer)
    index, blend = end_rows(blend.index[:, 0].reshape(fewer), blend)
    before = ((visual_tokens, 0), (0, 0))
    return Span(
        rows_needed,
        np.concatenate([base, index]),
        Blend(np.pad(blend.index, before), np.pad(blend.weight, before)),
    )


def _padding(width: int, height: int, rows: int, cols: int, unpad: str) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) of a tiled picture's tokens that are padding."""
    whole_part = (lambda x: int(round(x, 7))) if unpad == "round" else int
    if width / height > cols / rows:
        return (rows - whole_part(height * (cols / width))) // 2, 0
    return 0, (cols - whole_part(width * (rows / height))) // 2
