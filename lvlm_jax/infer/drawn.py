"""What an answer says of places, drawn over the picture it speaks of; and pictures that are an answer themselves."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.infer.interleaved import Written
from lvlm_jax.processing.boxes import Box, form_of, read_boxes
from lvlm_jax.processing.drawing import draw
from lvlm_jax.processing.masks import paste_mask
from lvlm_jax.processing.picture import load_image
from lvlm_jax.shapes import Bool


def draw_answer(answer: str, image: Any, out: str | os.PathLike, codec: str | os.PathLike | None = None) -> str:
    """Writes the picture with the boxes and masks of an answer; returns a line that says what was drawn.

    Args:
      image: whatever `processing.picture.load_image` takes.
      out: file to write; its ending says the format.
      codec: PaliGemma's ``vae-oid.npz``; without it masks are not drawn.

    Raises:
      ValueError: an ending that is no format of pictures; CheckpointError for a codec that is none.
    """
    form = form_of(answer)
    boxes, skipped = read_boxes(answer, form, on_bad="skip") if form else ([], 0)
    broken = f" ({skipped} broken)" if skipped else ""
    if not boxes:
        return f"no box in the answer{broken}; {os.fspath(out)} is not written"
    picture = load_image(image)
    masks = decode_masks(boxes, codec, *picture.size) if codec is not None else ()
    draw(picture, boxes, masks).save(out)
    shaped = sum(mask is not None for mask in masks)
    return f"drawn in {os.fspath(out)}: {len(boxes)} boxes{broken}" + (f", {shaped} masks" if shaped else "")


def write_pictures(written: Written, out: str | os.PathLike | None) -> str:
    """An answer of texts and pictures as one text; the pictures go to `out`, from the second on to out-2, out-3.

    Raises:
      ValueError: an ending that is no format of pictures.
    """
    import PIL.Image

    said, count = [], 0
    for part in written:
        if isinstance(part, str):
            said.append(part.strip())
            continue
        count += 1
        if out is None:
            said.append("[picture]")
            continue
        first = Path(out)
        file = first if count == 1 else first.with_stem(f"{first.stem}-{count}")
        PIL.Image.fromarray(part).save(file)
        said.append(f"[picture: {file}]")
    return " ".join(filter(None, said))


def decode_masks(
    boxes: list[Box], codec: str | os.PathLike, width: int, height: int
) -> list[Bool[np.ndarray, "H W"] | None]:
    """The mask of each box at the picture's size, None of one without shape codes."""
    from lvlm_jax.hub import mask_codec

    shaped = [box for box in boxes if box.codes]
    if not shaped:
        return [None] * len(boxes)
    decoded = iter(mask_codec.codec(codec).decode(np.asarray([box.codes for box in shaped], np.int32)))
    return [paste_mask(next(decoded), box, width, height) if box.codes else None for box in boxes]
