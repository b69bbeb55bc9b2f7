"""Masks of a picture and of a box: cut out at the codec's size, put back at the picture's."""

import numpy as np
import PIL.Image

from lvlm_jax.processing.boxes import Box
from lvlm_jax.shapes import Bool, Float

SIDE = 64
"""Pixels of a box's mask on a side, whatever the box's shape."""


def cut_mask(mask: Bool[np.ndarray, "H W"], box: Box) -> Float[np.ndarray, "64 64"]:
    """The part of a picture's mask that lies in a box, squashed to 64 x 64, values in [0, 1].

    Raises:
      ValueError: the box is thinner than a pixel.

    Source: big_vision, pp/proj/paligemma/segmentation.py, `refcoco_mask2str` (edges rounded, bilinear, antialiased).
    """
    height, width = mask.shape
    left, top, right, bottom = (round(edge) for edge in box.pixels(width, height))
    if right <= left or bottom <= top:
        raise ValueError(f"{box} is thinner than a pixel of {width} x {height}: there is no mask in it")
    part = PIL.Image.fromarray(mask[top:bottom, left:right].astype(np.float32))
    return np.clip(np.asarray(part.resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR)), 0.0, 1.0)


def paste_mask(mask: Float[np.ndarray, "64 64"], box: Box, width: int, height: int) -> Bool[np.ndarray, "H W"]:
    """A box's mask on a picture of that size: what is above 0 belongs to the thing, outside the box nothing does.

    A box thinner than a pixel gives an empty mask.
    Source: big_vision, evaluators/proj/paligemma/transfers/segmentation.py (edges cut off, bilinear).
    """
    out = np.zeros((height, width), bool)
    left, top, right, bottom = (int(edge) for edge in box.pixels(width, height))
    if right > left and bottom > top:
        part = PIL.Image.fromarray(mask.astype(np.float32))
        stretched = part.resize((right - left, bottom - top), PIL.Image.Resampling.BILINEAR)
        out[top:bottom, left:right] = np.asarray(stretched) > 0
    return out
