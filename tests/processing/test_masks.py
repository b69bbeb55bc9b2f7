"""Masks cut out of a picture and put back, and what a person sees of them."""

import numpy as np
import PIL.Image
import pytest

from lvlm_jax.processing.boxes import Box
from lvlm_jax.processing.drawing import draw
from lvlm_jax.processing.masks import cut_mask, paste_mask

BOX = Box(y0=0.25, x0=0.1, y1=0.75, x1=0.9, label="disc")


def disc(width=160, height=120):
    y, x = np.mgrid[:height, :width]
    return ((y - 60) / 30) ** 2 + ((x - 80) / 64) ** 2 < 1


def test_cut_and_put_back_is_nearly_the_same_mask():
    mask = disc()
    cut = cut_mask(mask, BOX)
    assert (cut.shape, cut.dtype) == ((64, 64), np.float32)
    assert cut.min() == 0 and cut.max() == 1  # noqa: PT018 (one fact)
    back = paste_mask(2 * cut - 1, BOX, 160, 120)
    assert back.shape == mask.shape
    assert (back & mask).sum() / (back | mask).sum() > 0.98


def test_nothing_outside_the_box_and_every_side_is_its_own():
    mask = np.full((64, 64), -1.0, np.float32)
    mask[:32, :16] = 1.0  # the upper half of the first quarter
    found = paste_mask(mask, BOX, 160, 120)
    rows, cols = np.nonzero(found)
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (30, 60, 16, 48)
    assert found[30:60, 16:48].all()
    assert not paste_mask(mask, Box(y0=0.5, x0=0.5, y1=0.501, x1=0.9), 160, 120).any()
    with pytest.raises(ValueError, match="is thinner than a pixel of 160 x 120"):
        cut_mask(disc(), Box(y0=0.5, x0=0.5, y1=0.501, x1=0.9))


def test_boxes_labels_and_masks_are_drawn():
    picture = PIL.Image.new("RGB", (160, 120), "white")
    plain = np.asarray(draw(picture, [Box(y0=0.25, x0=0.1, y1=0.75, x1=0.9)], colour="#ff0000"))
    changed = (plain != 255).any(-1)
    rows, cols = np.nonzero(changed)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (29, 89, 15, 143)
    assert not changed[40:80, 40:120].any()
    assert (plain[changed] == (255, 0, 0)).all()
    masked = np.asarray(draw(picture, [BOX], [disc()]))
    assert (masked[60, 80] != 255).any() and (masked[60, 80] != masked[29, 80]).any()  # noqa: PT018 (covered, not solid)
    labelled = np.asarray(draw(picture, [BOX, Box(y0=0, x0=0.5, y1=0.1, x1=0.6, label="other")]))
    assert len(np.unique(labelled.reshape(-1, 3), axis=0)) > 3
    assert (np.asarray(picture) == 255).all()
    with pytest.raises(ValueError, match="1 masks for 2 boxes"):
        draw(picture, [BOX, BOX], [None])
