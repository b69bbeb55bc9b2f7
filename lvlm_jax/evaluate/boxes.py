"""Scoring of boxes and masks: RefCOCO accuracy, detections matched one to one, mean and cumulative IoU.

A prediction is a text in any of the forms of `processing.boxes`; what is no box in it counts as one not found, never as
an error. A reference is such a text, a `Box`, or a list of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.boxes import CODES, Box, form_of, read_boxes
from lvlm_jax.processing.masks import paste_mask
from lvlm_jax.shapes import Bool

REFER_VARIANT = "RefCOCO: IoU of the first box that can be read, >= 0.5 and >= 0.75; a text without one scores 0"
DETECT_VARIANT = "detections: boxes of one label matched one to one, best IoU first, IoU >= 0.5; micro-averaged"
SEGMENT_VARIANT = "masks at the picture's size, of the first box with shape codes; mIoU of samples, cIoU of sums"

THRESHOLDS = (0.5, 0.75)
"""Least IoU of a box that is right."""

Decode = Callable[[Any], Any]
"""Shape codes int[N, 16] -> masks float[N, 64, 64]: `vision.mask_codec`'s with its weights."""


def iou(left: Box, right: Box) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    high = max(0.0, min(left.y1, right.y1) - max(left.y0, right.y0))
    wide = max(0.0, min(left.x1, right.x1) - max(left.x0, right.x0))
    union = left.area + right.area - high * wide
    return float(high * wide / union) if union > 0 else 0.0


def said(text: str) -> list[Box]:
    """The boxes of a prediction; broken ones are left out."""
    form = form_of(text)
    return [] if form is None else read_boxes(text, form, on_bad="skip").boxes


def expected(reference: Any) -> list[Box]:
    """The boxes of a reference.

    Raises:
      ValueError: a text without a box, or with a broken one; anything that is neither text nor boxes.
    """
    if isinstance(reference, Box):
        return [reference]
    if isinstance(reference, str):
        form = form_of(reference)
        if form is None:
            raise ValueError(f"the reference {reference[:80]!r} says no box; is this data of boxes?")
        return read_boxes(reference, form).boxes
    if isinstance(reference, Sequence):
        return [box for item in reference for box in expected(item)]
    raise ValueError(f"a reference of boxes is a text, a Box or a list of them, not {type(reference).__name__}")


def refer(prediction: str, reference: Any) -> float | None:
    """IoU of the first box said with the one that was meant; None where the prediction says none.

    Raises:
      ValueError: a reference of no box, or of several.
    """
    meant = expected(reference)
    if len(meant) != 1:
        raise ValueError(f"the reference {reference!r:.80} has {len(meant)} boxes; an expression refers to 1")
    found = said(prediction)
    return iou(found[0], meant[0]) if found else None


def matched(found: Sequence[Box], meant: Sequence[Box], threshold: float = THRESHOLDS[0]) -> int:
    """How many boxes find a partner of their label with at least that IoU, one each, the best pairs first."""
    same = lambda a, b: a.label.strip().casefold() == b.label.strip().casefold()  # noqa: E731
    pairs = [(iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(meant) if same(a, b)]
    left, right = set(), set()
    for value, i, j in sorted(pairs, key=lambda pair: (-pair[0], *pair[1:])):
        if value >= threshold and i not in left and j not in right:
            left.add(i)
            right.add(j)
    return len(left)


def overlap(found: Bool[np.ndarray, "H W"], meant: Bool[np.ndarray, "_ _"]) -> tuple[int, int]:
    """(pixels of both masks, pixels of either).

    Raises:
      ValueError: masks of two sizes.
    """
    if found.shape != meant.shape:
        raise ValueError(f"a mask of {found.shape} against one of {meant.shape}: both have the picture's size")
    return int((found & meant).sum()), int((found | meant).sum())


def mean_iou(overlaps: Sequence[tuple[int, int]]) -> float:
    """Mean over samples of each one's IoU, as PaliGemma reports RefCOCO; two empty masks agree."""
    return float(np.mean([both / either if either else 1.0 for both, either in overlaps]))


def cumulative_iou(overlaps: Sequence[tuple[int, int]]) -> float:
    """All intersections over all unions, so that large things weigh more."""
    both, either = np.sum(overlaps, axis=0)
    return float(both / either) if either else 1.0


def segment(predictions: Sequence[str], masks: Sequence[Any], decode: Decode) -> list[tuple[int, int]]:
    """`overlap` of each prediction's mask with the true one, bool[H, W] at the picture's size.

    The mask of a prediction is that of its first box with shape codes; without one it is empty.

    Raises:
      ValueError: another number of predictions than of masks, or none.
    """
    if not predictions or len(predictions) != len(masks):
        raise ValueError(f"{len(predictions)} predictions for {len(masks)} masks; give one each, and some")
    boxes = [next((box for box in said(text) if box.codes), None) for text in predictions]
    codes = np.asarray([box.codes if box else (0,) * CODES for box in boxes], np.int32)
    out = []
    for box, decoded, mask in zip(boxes, np.asarray(decode(codes)), masks):
        height, width = mask.shape
        found = np.zeros_like(mask) if box is None else paste_mask(decoded, box, width, height)
        out.append(overlap(found, mask))
    return out
