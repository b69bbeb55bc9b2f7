"""Boxes as text: there and back within half a step, and every way in which a model's words are no box."""

import re

import numpy as np
import pytest

from lvlm_jax.processing.boxes import FORMS, Box, form_of, from_pixels, read_boxes, write_boxes
from lvlm_jax.processing.tokenizer import Tokenizer
from tests.tokenizers_tiny import llama_tiny

LABELS = ("", "cat", "the dog's left ear", "größerer Ball", "2 cars, parked")


def drawn(seed, form, count=4):
    rng, boxes = np.random.default_rng(seed), []
    for _ in range(count):
        y0, y1 = np.sort(rng.random(2))
        x0, x1 = np.sort(rng.choice([0.0, 1.0, *rng.random(4)], 2))
        label = LABELS[rng.integers(len(LABELS))]
        codes = tuple(rng.integers(0, 128, 16).tolist()) if form == "paligemma" and rng.random() < 0.5 else ()
        boxes.append(Box(y0=float(y0), x0=float(x0), y1=float(y1), x1=float(x1), label=label, codes=codes))
    return boxes


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_within_half_a_step(form):
    steps, most = FORMS[form].steps, FORMS[form].most
    for seed in range(60):
        boxes = drawn(seed, form)
        text = write_boxes(boxes, form)
        assert form_of(text) == form
        found = read_boxes(text, form)
        assert found.skipped == 0
        assert [(b.label, b.codes) for b in found.boxes] == [(b.label, b.codes) for b in boxes], text
        for ours, back in zip(boxes, found.boxes):
            for edge, value in zip(ours.edges, back.edges):
                # Three digits cannot say 1000: there the last step is lost.
                assert abs(min(edge, most / steps) - value) <= 0.5 / steps + 1e-12
        assert write_boxes(found.boxes, form) == text


def test_the_words_themselves():
    cat = Box(y0=0.1, x0=0.25, y1=0.5, x1=1.0, label="cat")
    assert write_boxes([cat], "paligemma") == "<loc0102><loc0256><loc0512><loc1023> cat"
    assert write_boxes([cat, cat], "minigptv2") == "<p>cat</p> {<25><10><100><50>}<delim>{<25><10><100><50>}"
    assert write_boxes([cat], "qwen_vl") == "<ref>cat</ref><box>(250,100),(999,500)</box>"
    assert write_boxes([cat, cat], "cogvlm") == "cat[[250,100,999,500;250,100,999,500]]"
    shaped = Box(y0=0, x0=0, y1=1, x1=1, label="cat", codes=tuple(range(16)))
    assert write_boxes([shaped], "paligemma").startswith("<loc0000><loc0000><loc1023><loc1023><seg000><seg001>")
    assert write_boxes([], "paligemma") == ""


@pytest.mark.parametrize(
    ("text", "form", "labels"),
    [
        ("<loc0001> <loc0002> <loc0003> <loc0004> cat;<loc0001><loc0002><loc0003><loc0004>", "paligemma", ["cat", ""]),
        ("{<1><2><3><4>}", "minigptv2", [""]),
        ("I see <p>a cat</p>{ <1><2> <3><4> } and {<1><2><3><4>}.", "minigptv2", ["a cat", ""]),
        ("(1,2),(3,4)", "qwen_vl", [""]),
        ("The<ref> woman</ref><box>(1, 2), (3, 4)</box> and<ref>dogs</ref><box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>",
         "qwen_vl", ["woman", "dogs", "dogs"]),
        ("A cat [[001,002,003,004]] on a mat [[1, 2, 3, 4;5,6,7,8]].", "cogvlm", ["A cat", "on a mat", "on a mat"]),
    ],
)  # fmt: skip
def test_what_models_write(text, form, labels):
    assert form_of(text) == form
    assert [box.label for box in read_boxes(text, form).boxes] == labels


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("<loc0001><loc0002><loc0003> cat", "paligemma", r"box 1 \(.*: 3 numbers, a box has 4 \(y0, x0, y1, x1\)"),
        ("<loc0001><loc0002><loc0003><loc1024>", "paligemma", "x1=1024 is off the grid, whose largest number is 1023"),
        ("<loc0001><loc0002><loc0003><locabc>", "paligemma", "x1 is 'abc', which is no number from 0 to 1023"),
        ("<loc0900><loc0002><loc0003><loc0004>", "paligemma", "y1=3 lies above y0=900"),
        ("<loc0001><loc0002><loc0003><loc0004><seg001>", "paligemma", "1 shape codes, a mask has 16"),
        ("<loc0001><loc0002><loc0003><loc0004>" + "<seg128>" * 16, "paligemma", "shape code 1 is '128'"),
        ("{<50><2><3><4>}", "minigptv2", "x1=3 lies left of x0=50"),
        ("{<1><2><3><101>}", "minigptv2", "y1=101 is off the grid, whose largest number is 100"),
        ("{<1><2><3><4>", "minigptv2", "its end is missing; was the answer cut off"),
        ("<box>(1,2),(3", "qwen_vl", "3 numbers, a box has 4 \\(x0, y0, x1, y1\\)"),
        ("<box>(1,2),(3,-4)</box>", "qwen_vl", "y1 is '-4'"),
        ("[[001,002,003]]", "cogvlm", "3 numbers"),
        ("[[001,002,003,1000]]", "cogvlm", "y1=1000 is off the grid, whose largest number is 999"),
    ],
)
def test_a_broken_box_is_named_or_counted(text, form, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(text, form)
    good = write_boxes([Box(y0=0, x0=0, y1=0.5, x1=0.5, label="good")], form)
    both = f"{good} {';' if form == 'paligemma' else 'and'} {text}"
    found = read_boxes(both, form, on_bad="skip")
    assert ([box.label for box in found.boxes], found.skipped) == (["good"], 1)
    with pytest.raises(ValueError, match=r"^box 2 "):
        read_boxes(both, form)


@pytest.mark.parametrize("text", ["", "a red (round) ball {yes} [1, 2] (3) <b>", "f(x), (y)", "[[a link]"])
def test_words_without_a_box(text):
    for form in FORMS:
        if form != "cogvlm" or "[[" not in text:
            assert read_boxes(text, form) == ([], 0)
    assert form_of(text) == ("cogvlm" if "[[" in text else None)


def test_boxes_that_cannot_be():
    with pytest.raises(ValueError, match=r"x1=1\.5 is outside the picture"):
        Box(y0=0, x0=0, y1=1, x1=1.5)
    with pytest.raises(ValueError, match=r"y1=0\.1 lies above y0=0\.2"):
        Box(y0=0.2, x0=0, y1=0.1, x1=1)
    with pytest.raises(ValueError, match="box 1: the label 'a;b' holds ';', which the form paligemma reserves"):
        write_boxes([Box(y0=0, x0=0, y1=1, x1=1, label="a;b")], "paligemma")
    with pytest.raises(ValueError, match="the form cogvlm has no shape codes"):
        write_boxes([Box(y0=0, x0=0, y1=1, x1=1, codes=(0,) * 16)], "cogvlm")
    with pytest.raises(ValueError, match="15 shape codes, a mask has 16"):
        write_boxes([Box(y0=0, x0=0, y1=1, x1=1, codes=(0,) * 15)], "paligemma")
    with pytest.raises(ValueError, match="unknown form of boxes 'yolo'; choose from paligemma"):
        read_boxes("", "yolo")


def test_pixels():
    box = from_pixels(-0.5, 10, 50, 101, 200, 100, label="cat")
    assert box == Box(y0=0.1, x0=0, y1=1.0, x1=0.25, label="cat")
    assert box.pixels(200, 100) == (0, 10, 50, 100)
    assert box.area == pytest.approx(0.9 * 0.25)
    with pytest.raises(ValueError, match=r"the box from \(5, 100\) to \(9, 110\) holds no part of 200 x 100 pixels"):
        from_pixels(5, 100, 9, 110, 200, 100)


def test_places_are_words_of_a_tokenizer_that_has_them():
    """As PaliGemma's tokenizer has them: added, not special; so a model reads one token a place, and says it back."""
    hf = llama_tiny(legacy=False)
    text = write_boxes([Box(y0=0.1, x0=0.2, y1=0.3, x1=0.4, codes=tuple(range(16)))], "paligemma")
    hf.add_tokens(re.findall("<[^>]*>", text))
    tokenizer = Tokenizer(hf)
    ids, _ = tokenizer.encode_text(text, first=False)
    assert len(ids) == 4 + 16
    assert read_boxes(tokenizer.decode(ids), "paligemma") == read_boxes(text, "paligemma")
