"""Boxes and masks scored, against numbers worked out by hand."""

import numpy as np
import pytest

from lvlm_jax.evaluate import boxes, scores
from lvlm_jax.processing.boxes import Box, write_boxes


def box(y0, x0, y1, x1, label="", codes=()):
    return Box(y0=y0, x0=x0, y1=y1, x1=x1, label=label, codes=codes)


QUARTER = box(0.0, 0.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("other", "value"),
    [
        (QUARTER, 1.0),
        (box(0.0, 0.0, 0.5, 0.25), 0.5),
        (box(0.25, 0.25, 0.75, 0.75), (1 / 16) / (7 / 16)),
        (box(0.5, 0.5, 1.0, 1.0), 0.0),
        (box(0.6, 0.1, 0.9, 0.4), 0.0),
        (box(0.0, 0.0, 1.0, 1.0), 0.25),
        (box(0.2, 0.2, 0.2, 0.4), 0.0),
    ],
)
def test_iou_by_hand(other, value):
    assert boxes.iou(QUARTER, other) == pytest.approx(value)
    assert boxes.iou(other, QUARTER) == pytest.approx(value)


def test_iou_of_nothing():
    line = box(0.2, 0.2, 0.2, 0.4)
    assert boxes.iou(line, line) == 0.0


def test_refcoco_in_any_form():
    right = write_boxes([QUARTER], "cogvlm")
    half = write_boxes([box(0.0, 0.0, 0.5, 0.25), QUARTER], "minigptv2")  # the first counts
    far = write_boxes([box(0.5, 0.5, 1.0, 1.0)], "qwen_vl")
    broken = "<loc0900><loc0000><loc0100><loc0500>"
    meant = [write_boxes([QUARTER], "paligemma"), QUARTER, [QUARTER], QUARTER, QUARTER]
    scored = scores.score("refcoco", [right, half, far, broken, "there"], meant)
    assert scored.values["accuracy@0.5"] == 2 / 5
    assert scored.values["accuracy@0.75"] == 1 / 5
    assert scored.values["mean_iou"] == pytest.approx((1 + 0.5) / 5, abs=1e-3)
    assert scored.values["without_box"] == 2 / 5
    assert [sample["accuracy@0.5"] for sample in scored.samples] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert "first box" in scored.variant


def test_detections_are_matched_once_each_and_by_label():
    there = [box(0.0, 0.0, 0.5, 0.5, "cat"), box(0.0, 0.5, 0.5, 1.0, "cat"), box(0.5, 0.5, 1.0, 1.0, "dog")]
    found = [
        box(0.0, 0.0, 0.5, 0.45, "Cat"),  # finds the first
        box(0.0, 0.0, 0.5, 0.5, "cat"),  # finds it better
        box(0.5, 0.5, 1.0, 1.0, "cat"),  # the dog's place, another word
    ]
    assert boxes.matched(found, there) == 1
    scored = scores.score(
        "detection", [write_boxes(found, "paligemma"), "none"], [there, write_boxes(there[:1], "qwen_vl")]
    )
    assert scored.values == pytest.approx(
        {"f1@0.5": 2 / 7, "precision@0.5": 1 / 3, "recall@0.5": 1 / 4, "boxes_said": 3, "boxes_there": 4}
    )
    assert [sample["recall@0.5"] for sample in scored.samples] == pytest.approx([1 / 3, 0.0])


def test_a_worse_box_may_still_have_the_other():
    there = [box(0.0, 0.0, 1.0, 0.5), box(0.0, 0.1, 1.0, 0.6)]
    found = [box(0.0, 0.0, 1.0, 0.6), box(0.0, 0.0, 1.0, 0.55)]
    assert boxes.matched(found, there) == 2
    assert boxes.matched(found, there[:1]) == 1


def test_masks_by_hand():
    left, upper = np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    left[:, :3], upper[:2] = True, True
    assert boxes.overlap(left, upper) == (6, 18)
    pairs = [(6, 18), (5, 5), (0, 7), (0, 0)]
    assert boxes.mean_iou(pairs) == pytest.approx((1 / 3 + 1 + 0 + 1) / 4)
    assert boxes.cumulative_iou(pairs) == pytest.approx(11 / 30)
    with pytest.raises(ValueError, match=r"a mask of \(4, 6\) against one of \(6, 4\)"):
        boxes.overlap(left, left.T)


def test_segmentation_pastes_what_the_codes_mean():
    """Code 1 means the upper half of the box, anything else all of it."""

    def decode(codes):
        out = np.ones((len(codes), 64, 64), np.float32)
        out[codes[:, 0] == 1, 32:] = -1.0
        return out

    masks = [np.zeros((40, 80), bool) for _ in range(3)]
    masks[0][:10, :40] = True  # the upper half of the first quarter
    masks[1][:20, :40] = True
    masks[2][:20, :40] = True
    upper, whole = (box(0, 0, 0.5, 0.5, "cat", (code,) * 16) for code in (1, 0))
    texts = [*(write_boxes([b], "paligemma") for b in (upper, upper)), write_boxes([QUARTER], "paligemma")]
    scored = scores.segmentation(texts, masks, decode)
    # 0.5 is said as 512 of 1023, which is the pixel behind 20 or 40 at the most; both masks fall on whole pixels.
    assert scored.values == pytest.approx(
        {"mean_iou": (1 + 0.5 + 0) / 3, "cumulative_iou": (400 + 400) / (400 + 800 + 800)}
    )
    assert scores.segmentation([write_boxes([whole], "paligemma")], masks[1:2], decode).values["mean_iou"] == 1.0
    with pytest.raises(ValueError, match="2 predictions for 3 masks; give one each"):
        scores.segmentation(texts[:2], masks, decode)


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("refcoco", "a cat", "the reference 'a cat' says no box; is this data of boxes"),
        ("refcoco", [QUARTER, QUARTER], "has 2 boxes; an expression refers to 1"),
        ("detection", "{<1><2><3>}", "3 numbers, a box has 4"),
        ("detection", 7, "is a text, a Box or a list of them, not int"),
    ],
)
def test_references_that_are_none(name, reference, message):
    with pytest.raises(ValueError, match=message):
        scores.score(name, ["a"], [reference])
