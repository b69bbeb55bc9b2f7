"""Pictures at their own resolution: their size, the order of their patches, the vision rows and positions they take.

A picture is scaled to whole tokens, within limits of its area. Several share a vision row of P patches, each a segment
of it; so many frames of a video as the tower reads at once are one picture. Patches stand token by token, and window by
window where the tower has windows: the language model reads a picture's tokens in reading order all the same, since
each of its positions names the token that fills it. Sizes follow from width and height alone.
Source: Qwen2-VL (arXiv 2409.12191), section 2.1, and the torch library's processors.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.picture import ImageError
from lvlm_jax.processing.schema import TEXT, Batch
from lvlm_jax.shapes import Float, Int

Grid = tuple[int, int, int]
"""(times, rows, columns) of patches."""

ASPECT = 200
"""The most that one side of a picture may be times the other."""

ROW = 5120
"""Patches of a vision row where nobody says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native:
    """How a picture keeps its shape.

    min_pixels, max_pixels: the area that it is brought to, if it has less or more; a vision row's patches are a limit,
    too. min_frame, max_frame: the same of a frame of a video; None as of a picture. max_clip: of a video's pictures
    (`frames` frames each) together, from which each has an equal share, at least `min_frame` and a twentieth. merge:
    side of the square of patches that becomes one token. frames: of a video, how many the tower reads as one; a still
    picture is there as often. window: side of the tower's windows, in patches. rate: time positions that a second of a
    video is long (Qwen2.5-VL); None counts one for each `frames` frames.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    min_frame: int | None = None
    max_frame: int | None = None
    max_clip: int | None = None
    merge: int = 2
    frames: int = 2
    window: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        for low, high in ((self.min_pixels, self.max_pixels), self.frame_limits):
            if not 0 < low <= high:
                raise ValueError(f"a picture of at least {low} and at most {high} pixels: the limits are no interval")
        if min(self.merge, self.frames) < 1:
            raise ValueError(f"merge={self.merge}, frames={self.frames}: at least 1")
        if self.window is not None and (self.window < 1 or self.window % self.merge):
            raise ValueError(f"window={self.window} patches are no multiple of merge={self.merge}, so tokens are cut")

    @property
    def frame_limits(self) -> tuple[int, int]:
        """The least and the most pixels of a frame of a video."""
        return self.min_frame or self.min_pixels, self.max_frame or self.max_pixels

    def grid(self, width: int, height: int, patch: int, max_patches: int, moving: int = 0) -> tuple[int, int]:
        """(rows, columns) of patches that a picture of `width` x `height` pixels is scaled to.

        Args:
          moving: of how many frames of a video it is one; 0 for a still picture.

        Raises:
          ImageError: a picture too narrow for that, or one that a vision row does not hold however it is scaled.
        """
        low, high = self.frame_limits if moving else (self.min_pixels, self.max_pixels)
        if moving and self.max_clip is not None:
            high = max(min(high, self.max_clip * self.frames // moving), int(low * 1.05))
        high = min(high, max_patches * patch**2)
        rows, cols = (side // patch for side in fitted(width, height, patch * self.merge, min(low, high), high))
        if rows * cols > max_patches:
            raise ImageError(
                f"<picture of {width} x {height}>: takes {rows} x {cols} patches, but a vision row holds "
                f"{max_patches}; cut it, or raise max_patches"
            )
        return rows, cols


def fitted(width: int, height: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) of a picture whose sides are multiples of `factor` and whose area is between two limits.

    Raises:
      ImageError: a side more than 200 times the other.

    Source: `smart_resize` of the authors' qwen-vl-utils.
    """
    if max(width, height) > ASPECT * min(width, height):
        raise ImageError(
            f"<picture of {width} x {height}>: one side is more than {ASPECT} times the other, which these models do "
            "not read; cut it"
        )
    # Python's round: halves go to the even number, as theirs do.
    rows, cols = (round(side / factor) * factor for side in (height, width))
    if rows * cols > most:
        shrink = math.sqrt(height * width / most)
        rows, cols = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * cols < least:
        grow = math.sqrt(least / (height * width))
        rows, cols = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, cols


def order(rows: int, cols: int, merge: int, window: int | None = None) -> Int[np.ndarray, " P"]:
    """The patches of a picture in the order in which the tower reads them, each by its number in reading order."""
    r, c = (x.ravel() for x in np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"))
    side = window or max(rows, cols)
    # The last key counts most: windows, then tokens, then the patches of a token.
    return np.lexsort((c, r, c // merge, r // merge, c // side, r // side)).astype(np.int32)


def token_places(rows: int, cols: int, merge: int, window: int | None = None) -> Int[np.ndarray, " Q"]:
    """Where each token of a picture, in reading order, stands in what the tower gives."""
    own = order(rows // merge, cols // merge, 1, None if window is None else window // merge)
    return np.argsort(own).astype(np.int32)


def cut(
    frames: Float[np.ndarray, "frames height width 3"], patch: int, native: Native
) -> tuple[Float[np.ndarray, "N P C"], Int[np.ndarray, "N P 2"]]:
    """Normalised frames -> (patches, positions) of the pictures they are, each so many frames as are read as one.

    A patch's values are in (frame, row, column, channel) order; the last frame is repeated where they do not divide.
    """
    missing = -len(frames) % native.frames
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    rows, cols = frames.shape[1] // patch, frames.shape[2] // patch
    times = len(frames) // native.frames
    x = frames.reshape(times, native.frames, rows, patch, cols, patch, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    at = order(rows, cols, native.merge, native.window)
    patches = x.reshape(times, rows * cols, -1)[:, at]
    positions = np.stack(np.divmod(at, cols), axis=-1).astype(np.int32)
    return np.ascontiguousarray(patches), np.broadcast_to(positions, (times, *positions.shape))


Place = tuple[int, int, int]
"""A picture's vision row within its example, its first patch in it, and how many it has."""


@dataclasses.dataclass
class Packer:
    """The vision rows of one conversation, filled as its pictures come: each goes into the first that has room."""

    max_patches: int
    native: Native
    used: list[int] = dataclasses.field(default_factory=list)

    def add(self, grid: Grid) -> tuple[Int[np.ndarray, " n"], tuple[Place, ...], int]:
        """(the visual token that fills each position of a picture or video, where its parts stand, new vision rows).

        A token's number is its row's number times the tokens of a row, and its place in the row.
        """
        times, rows, cols = grid
        before, count, group = len(self.used), rows * cols, self.native.merge**2
        own = token_places(rows, cols, self.native.merge, self.native.window)
        places, index = [], []
        for _ in range(times):
            row = next((i for i, used in enumerate(self.used) if used + count <= self.max_patches), len(self.used))
            if row == len(self.used):
                self.used.append(0)
            places.append((row, self.used[row], count))
            index.append((row * self.max_patches + self.used[row]) // group + own)
            self.used[row] += count
        return np.concatenate(index).astype(np.int32), tuple(places), len(self.used) - before


def positions(
    length: int,
    spans: Sequence[tuple[int, int]],
    grids: Sequence[Grid],
    merge: int,
    steps: Sequence[float] = (),
) -> Int[np.ndarray, "n 3"]:
    """(time, row, column) of each position of a conversation.

    Text goes on by one along all three; the tokens of a picture are counted by where they stand in it, from the
    position on where it begins; what follows begins one past the largest of them.

    Args:
      length: positions of the conversation.
      spans: first position of each picture and one past its last; what lies between is text.
      grids: patches of each.
      steps: how many time positions lie between two of a video's times; default 1.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1; steps: Qwen2.5-VL (arXiv 2502.13923), section 2.1.2.
    """
    out, at, start = np.zeros((length, 3), np.int32), 0, 0
    for number, ((first, stop), (times, rows, cols)) in enumerate(zip(spans, grids, strict=True)):
        out[at:first] = start + np.arange(first - at)[:, None]
        start += first - at
        # Theirs multiply and cut off in float32.
        step = np.float32(steps[number] if steps else 1)
        when = (np.arange(times, dtype=np.float32) * step).astype(np.int32)
        grid = np.meshgrid(when, np.arange(rows // merge), np.arange(cols // merge), indexing="ij")
        here = np.stack(grid, axis=-1).reshape(-1, 3)
        if len(here) != stop - first:
            raise ValueError(f"a picture of {len(here)} tokens, but positions {first} to {stop} are another number")
        out[first:stop] = start + here
        at, start = stop, start + int(here.max()) + 1
    out[at:] = start + np.arange(length - at)[:, None]
    return out


def fill(
    batch: Batch,
    group: int,
    places: Iterable[Place],
    slots: Sequence[int],
    patches: Float[np.ndarray, "N P C"],
    where: Int[np.ndarray, "N P 2"],
) -> None:
    """Writes the parts of one picture or video into a batch, each as the next segment of its vision row.

    Args:
      places: of each part in its example (`Packer`). slots: the example's vision rows in the group.

    Raises:
      ImageError: another number of parts or of patches than the places were made for.
    """
    places = list(places)
    if [len(patches), patches.shape[1]] != [len(places), places[0][2]]:
        raise ImageError(
            f"<picture>: has {len(patches)} part(s) of {patches.shape[1]} patches, but its positions were made for "
            f"{len(places)} of {places[0][2]}: the file has changed meanwhile, or encode and the loader were given "
            "different image specs; measure again (lvlm train --restart does)"
        )
    for (own, first, count), values, at in zip(places, patches, where):
        here = (group, slots[own], slice(first, first + count))
        batch.patches[here], batch.patch_positions[here] = values, at
        batch.patch_segments[here] = batch.patch_segments[group, slots[own]].max() + 1


def trimmed(batch: Batch, patches: int, merge: int) -> Batch:
    """The batch with vision rows of so many patches, the first ones; all others must be padding."""
    whole, group = batch.patches.shape[2], merge**2
    old, new = whole // group, patches // group
    index = batch.image_index
    moved = np.where(index == TEXT, TEXT, index // old * new + index % old)
    short = {name: getattr(batch, name)[:, :, :patches] for name in ("patches", "patch_positions", "patch_segments")}
    return batch.replace(image_index=moved.astype(np.int32), **short)


def longest(batch: Batch) -> int:
    """One past the last patch of any vision row that is no padding."""
    used = np.flatnonzero((batch.patch_segments > 0).any((0, 1)))
    return int(used[-1]) + 1 if used.size else 0


# ---------------------------------------------------------------------------------------------------------------------
# preprocessor_config.json

_KIND = "Qwen2VLImageProcessor"

MODELS = ("window_size", "tokens_per_second", "max_patches")
"""What a model's ``vision_config`` says of how pictures are prepared."""


def from_hf(config: Mapping[str, Any], patch: int) -> tuple[Native, int, int] | None:
    """(how a picture keeps its shape, its patches' side, patches of a vision row) from a picture processor's file.

    None where the file is another processor's. `MODELS` names the fields that the public files keep in the model's
    config.json; who reads a folder puts them beside these.
    """
    if not str(config.get("image_processor_type", "")).startswith(_KIND):
        return None
    size, patch = config.get("size") or {}, int(config.get("patch_size") or patch)
    native = Native(
        min_pixels=int(config.get("min_pixels") or size.get("shortest_edge") or 56 * 56),
        max_pixels=int(config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280),
        min_frame=config.get("min_frame_pixels"),
        max_frame=config.get("max_frame_pixels"),
        max_clip=config.get("max_clip_pixels"),
        merge=int(config.get("merge_size", 2)),
        frames=int(config.get("temporal_patch_size", 2)),
        window=config["window_size"] // patch if config.get("window_size") else None,
        rate=None if config.get("tokens_per_second") is None else float(config["tokens_per_second"]),
    )
    return native, patch, int(config.get("max_patches") or ROW)


def to_hf(native: Native, patch: int, max_patches: int) -> dict[str, Any]:
    """The fields of that file; `from_hf` reads them back. Some are ours, and theirs keeps what it does not know."""
    out: dict[str, Any] = {
        "image_processor_type": _KIND,
        "min_pixels": native.min_pixels,
        "max_pixels": native.max_pixels,
        "size": {"shortest_edge": native.min_pixels, "longest_edge": native.max_pixels},
        "patch_size": patch,
        "merge_size": native.merge,
        "temporal_patch_size": native.frames,
        "max_patches": max_patches,
    }
    own = {"min_frame_pixels": native.min_frame, "max_frame_pixels": native.max_frame}
    own |= {"max_clip_pixels": native.max_clip}
    own |= {"window_size": native.window and native.window * patch, "tokens_per_second": native.rate}
    return out | {name: value for name, value in own.items() if value is not None}
