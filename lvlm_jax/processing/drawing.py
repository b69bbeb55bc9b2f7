"""Boxes and masks drawn over a picture, so that a person sees what a model means."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from lvlm_jax.processing.boxes import Box
from lvlm_jax.shapes import Bool

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
"""One a label, in the order in which labels appear."""
COVER = 0.45  # how much of a mask's pixels is its colour


def draw(
    picture: PIL.Image.Image,
    boxes: Sequence[Box],
    masks: Sequence[Bool[np.ndarray, "H W"] | None] = (),
    colour: str | None = None,
) -> PIL.Image.Image:
    """A copy of the picture with its boxes, their labels and masks.

    Args:
      masks: one of the picture's size for each box, or None for a box that has none; none at all draws boxes alone.
      colour: the colour of all; default one a label.
    """
    if masks and len(masks) != len(boxes):
        raise ValueError(f"{len(masks)} masks for {len(boxes)} boxes; give one each (None where there is none)")
    out = picture.convert("RGB")
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = [colour or COLOURS[labels.index(box.label) % len(COLOURS)] for box in boxes]
    for mask, shade in zip(masks, colours):
        if mask is not None:
            cover = PIL.Image.fromarray(np.uint8(mask * round(255 * COVER)))
            out.paste(PIL.Image.new("RGB", out.size, shade), mask=cover)
    pen, line = PIL.ImageDraw.Draw(out), max(1, round(max(out.size) / 250))
    font = PIL.ImageFont.load_default(max(10, round(max(out.size) / 40)))
    for box, shade in zip(boxes, colours):
        left, top, right, bottom = box.pixels(out.width - 1, out.height - 1)
        pen.rectangle((left, top, right, bottom), outline=shade, width=line)
        if box.label:
            _, _, wide, high = pen.textbbox((0, 0), box.label, font=font)
            x = max(0, min(left, out.width - wide - 2 * line))
            y = top - high - line if top >= high + line else top
            pen.rectangle((x, y, x + wide + 2 * line, y + high + line), fill=shade)
            pen.text((x + line, y), box.label, fill="white", font=font)
    return out
