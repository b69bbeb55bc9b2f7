"""Encoded examples as the arrays of one batch: rows of text, and the pictures of each group in its vision rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.data.senses import collate_senses
from lvlm_jax.processing import native
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.instruction import PADDING
from lvlm_jax.processing.pooling import taps
from lvlm_jax.processing.schema import NEWLINE, TAPS, TEXT, Batch, Blend, Clip, Encoded, Image
from lvlm_jax.processing.senses import SenseSpec
from lvlm_jax.processing.video import read_rows

Picture = Callable[[Image, int, int], tuple[np.ndarray, np.ndarray]]
"""(picture, global row, vision rows before it in that row) -> (patches[R, P, C], positions[R, P, 2])."""


def collate(
    rows: Sequence[Sequence[Encoded]],
    *,
    length: int,
    groups: int,
    vision_rows: int,
    visual_tokens: int,
    pad_id: int,
    spec: ImageSpec | None = None,
    picture: Picture | None = None,
    share: bool = False,
    blend: bool | None = None,
    instruction: int = 0,
    senses: Mapping[str, SenseSpec] | None = None,
    sense_rows: Mapping[str, int] | None = None,
) -> Batch:
    """Rows of encoded examples as one `Batch` of numpy arrays.

    Args:
      rows: B rows, each the examples packed in it.
      length, groups, vision_rows, visual_tokens: T, G, N, Q.
      spec: how a picture becomes patches; None for a batch without vision (then P and C are 0).
      picture: decodes one picture; default `read_rows`.
      share: a picture that several examples of a group use (same path or bytes) takes its vision rows once.
      blend: whether the batch says of each position which visual tokens fill it together; None where an example needs
        it. A run of one shape decides it once.
      instruction: S, positions of what the connector reads beside each vision row; 0 where it reads nothing.
      senses, sense_rows: how the segments of named senses are read, and the vision rows of a group for each.

    Raises:
      DataError: a row longer than T, a group that needs more than N vision rows, visual positions that are not whole
        pictures.
    """
    if len(rows) % groups:
        raise ValueError(f"{len(rows)} rows do not divide into {groups} groups; make rows a multiple of groups")
    blend = any(e.blend is not None for row in rows for e in row) if blend is None else blend
    batch = _empty(len(rows), length, groups, vision_rows, pad_id, spec, blend, instruction)
    read = collate_senses(rows, length=length, groups=groups, specs=senses or {}, room=sense_rows or {})
    batch = batch.replace(senses=read)
    picture = picture or (lambda image, row, j: read_rows(image, spec))
    if spec is not None and spec.native is not None:
        return _collate_native(batch, rows, picture, spec)
    slots: dict[Any, list[int]] = {}
    taken = 0
    for row, examples in enumerate(rows):
        group, first = divmod(row, len(rows) // groups)
        if not first:
            slots, taken = {}, 0
        places: list[int] = []
        for image, need, said in (shown for encoded in examples for shown in _shown(encoded)):
            key = picture_key(image) if share else len(slots)
            if key not in slots:
                _check_room(group, taken + need, vision_rows)
                slots[key] = here = list(range(taken, taken + need))
                patches, positions = picture(image, row, len(places))
                # A picture that is shown as a video that stands still is the same row as often.
                still = spec is not None and spec.tiles is None and not isinstance(image.source, Clip)
                _check_rows(image, need if still and len(patches) == 1 else len(patches), need)
                # A picture that keeps its shape has fewer patches than the row: the rest is padding.
                at = (group, here, slice(patches.shape[1]))
                batch.patches[at], batch.patch_positions[at], batch.patch_segments[at] = patches, positions, 1
                if instruction:
                    batch.instruction[group, here, : len(said)] = said
                taken += need
            places += slots[key]
        _fill_row(batch, row, examples, places, visual_tokens)
    return batch


def _empty(
    rows: int,
    length: int,
    groups: int,
    vision_rows: int,
    pad_id: int,
    spec: ImageSpec | None,
    blend: bool,
    instruction: int,
) -> Batch:
    """A batch of padding."""
    count, size = (0, 0) if spec is None else (spec.patches, spec.values)
    shape = (rows, length)
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        weights=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        image_index=np.full(shape, TEXT, np.int32),
        patches=np.zeros((groups, vision_rows, count, size), np.float32),
        patch_positions=np.zeros((groups, vision_rows, count, 2), np.int32),
        patch_segments=np.zeros((groups, vision_rows, count), np.int32),
        blend_index=np.zeros((*shape, TAPS), np.int32) if blend else None,
        blend_weight=np.zeros((*shape, TAPS), np.float32) if blend else None,
        axes=np.zeros((*shape, 3), np.int32) if spec is not None and spec.native is not None else None,
        instruction=np.full((groups, vision_rows, instruction), PADDING, np.int32) if instruction else None,
    )


def _shown(encoded: Encoded) -> Iterator[tuple[Image, int, np.ndarray | None]]:
    """(picture, its vision rows, what the connector reads beside it) of each picture."""
    said = encoded.instructions or (None,) * len(encoded.images)
    return zip(encoded.images, encoded.rows, said, strict=True)


def _collate_native(batch: Batch, rows: Sequence[Sequence[Encoded]], picture: Picture, spec: ImageSpec) -> Batch:
    """`collate` for pictures that share vision rows: an example's pictures lie where its `Encoded.places` say."""
    groups, vision_rows, count = batch.patches.shape[:3]
    taken = 0
    for row, examples in enumerate(rows):
        group, first = divmod(row, len(rows) // groups)
        begun = taken = taken if first else 0
        for encoded in examples:
            slots = range(taken, taken + encoded.vision_rows)
            _check_room(group, slots.stop, vision_rows)
            for image, places in zip(encoded.images, encoded.places, strict=True):
                found = picture(image, row, slots[places[0][0]] - begun)
                native.fill(batch, group, places, slots, *found)
            taken = slots.stop
        _fill_row(batch, row, examples, range(begun, taken), count // spec.native.merge**2)
        for segment, encoded in enumerate(examples, start=1):
            own = np.arange(len(encoded.tokens))[:, None] if encoded.axes is None else encoded.axes
            batch.axes[row][batch.segments[row] == segment] = own
    return batch


def _check_room(group: int, needed: int, vision_rows: int) -> None:
    if needed > vision_rows:
        raise DataError(
            f"group {group} needs more than {vision_rows} vision rows (one a picture, tile or frame; small pictures of "
            "one example may share some); raise vision_rows or replan"
        )


def _check_rows(image: Image, found: int, need: int) -> None:
    """A picture has as many vision rows as its positions were made for."""
    if found != need:
        name = image.source if isinstance(image.source, str) else f"<{type(image.source).__name__}>"
        raise DataError(
            f"{name}: the picture takes {found} vision row(s), but its positions were made for {need}: the file has "
            "changed meanwhile, or encode and the loader were given different image specs; measure again (lvlm train "
            "--restart does)"
        )


def _fill_row(batch: Batch, row: int, examples: Sequence[Encoded], places: Sequence[int], visual_tokens: int) -> None:
    """Write one row's examples side by side; `places` are the vision rows of its pictures in reading order."""
    at = seen = 0
    for segment, encoded in enumerate(examples, start=1):
        size, rows = len(encoded.tokens), encoded.vision_rows
        length = batch.tokens.shape[1]
        if at + size > length:
            raise DataError(f"row {row} has {at + size} tokens or more but T is {length}; raise the row length")
        here = np.s_[row, at : at + size]
        batch.tokens[here], batch.weights[here] = encoded.tokens, encoded.weights
        batch.positions[here], batch.segments[here] = np.arange(size), segment
        slots = np.asarray([*places[seen : seen + rows], 0], np.int32)
        newline = batch.patches.shape[1] * visual_tokens
        batch.image_index[here] = _image_index(encoded, slots, visual_tokens, newline)
        if batch.blend_index is not None:
            own = encoded.blend and Blend(_placed(encoded.blend.index, slots, visual_tokens), encoded.blend.weight)
            batch.blend_index[here], batch.blend_weight[here] = taps(batch.image_index[here], own)
        elif encoded.blend is not None:
            raise DataError(f"row {row}: several visual tokens fill a position together, but the batch has blend=False")
        at, seen = at + size, seen + rows


def _image_index(encoded: Encoded, slots: np.ndarray, visual_tokens: int, newline: int) -> np.ndarray:
    """`Encoded.visual` (within the example) as positions in the group's flat visual tokens, then the newline."""
    ends = np.cumsum([0, *encoded.sizes])
    seen, before = encoded.visual[encoded.visual != TEXT], 0
    for first, stop, rows in () if encoded.places else zip(ends[:-1], ends[1:], encoded.rows):
        own = seen[first:stop]
        own = own[own != NEWLINE] - before * visual_tokens
        # Every picture begins with the whole of it, if it is not pooled; its tiles may lack what is padding.
        begins = len(own) >= visual_tokens and (own[:visual_tokens] == np.arange(visual_tokens)).all()
        begins |= encoded.blend is not None
        if not begins or (own >= rows * visual_tokens).any() or (rows == 1 and len(own) > visual_tokens):
            raise DataError(
                f"{len(own)} visual positions for a picture of {rows} x {visual_tokens} tokens; encode and the loader "
                "must be given the same visual_tokens"
            )
        before += rows
    if ends[-1] != len(seen):
        raise DataError(f"{len(seen)} visual positions, but the pictures take {ends[-1]}; pictures must stay whole")
    if not visual_tokens:
        return encoded.visual
    own = np.maximum(encoded.visual, 0)
    index = _placed(own, slots, visual_tokens)
    return np.where(encoded.visual == TEXT, TEXT, np.where(encoded.visual == NEWLINE, newline, index))


def _placed(own: np.ndarray, slots: np.ndarray, visual_tokens: int) -> np.ndarray:
    """An example's own visual tokens in the numbers of its group's, `slots` being the vision rows of its pictures."""
    return slots[own // visual_tokens] * visual_tokens + own % visual_tokens


def picture_key(image: Image) -> Any:
    """What makes two pictures the same one: equal paths or bytes, or one object in memory; of a clip its frames too."""
    if isinstance(image.source, Clip):
        return picture_key(Image(image.source.video.source)), image.source.indices
    key = image.source if isinstance(image.source, str | bytes) else id(image.source)
    return (key, image.whole) if image.whole else key
