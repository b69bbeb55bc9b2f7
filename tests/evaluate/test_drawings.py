"""How drawings are recognised, by hand; the whole of it runs in tests/configs/test_unified_emoji.py."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax.evaluate import drawings
from lvlm_jax.evaluate.drawings import Gallery, pictures_of, text_of
from lvlm_jax.processing.schema import Example, Image, Text, Turn
from tests.infer.test_interleaved import system

# Three concepts on a line; the first has a picture at either end.
GALLERY = Gallery(
    names=("end", "middle", "near"),
    pixels=np.asarray([[0.0], [5.0], [7.0], [10.0]], np.float32),
    concept=np.asarray([0, 1, 2, 0]),
)


def test_a_drawing_is_as_far_from_a_concept_as_from_its_nearest_picture():
    drawn = np.asarray([[9.5], [6.2], [6.2], [0.1], [4.0]], np.float32)
    ranks, nearest = GALLERY.ranks(drawn, ["end", "near", "end", "middle", "unheard of"])
    assert ranks.tolist() == [0, 0, 2, 1, 3]
    assert nearest == ["end", "near", "near", "end", "middle"]


def test_texts_and_pictures_of_an_answer():
    picture = np.zeros((2, 2, 3), np.uint8)
    assert text_of(["red ", picture, " apple "]) == "red apple"
    assert len(pictures_of(["red ", picture, picture])) == 2
    assert text_of([picture]) == ""


def test_what_is_no_evaluation():
    one = system()
    with pytest.raises(ValueError, match=r"scores=\('vqa',\): .* is scored by \('exact',\) alone"):
        drawings.evaluate(one, [], scores=("vqa",))
    said = Example((Turn("user", (Text("what?"),)), Turn("assistant", (Text("dogs"),))))
    with pytest.raises(ValueError, match="0 samples with a picture"):
        drawings.evaluate(one, [(said, ["dogs"])])


@pytest.mark.nightly
def test_every_question_has_its_rows(tmp_path):
    """Random weights: what is said is nonsense, but every picture is named and every name drawn."""
    rng, samples = np.random.default_rng(0), []
    for name in ("dogs", "a black cat"):
        shown = Image(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        turns = (Turn("user", (shown,)), Turn("assistant", (Text(name),)))
        samples.append((Example(turns, id=f"{name[0]}/1"), [name]))
    one = dataclasses.replace(system(), name="tiny")
    found = drawings.evaluate(one, samples, batch_rows=4, max_new_tokens=4, progress=False, out=tmp_path)
    assert [row["question"].split(":")[0] for row in found.samples] == [
        "Draw", "What is drawn here?", "Write and draw", "Draw", "What is drawn here?", "Write and draw",
    ]  # fmt: skip
    assert found.scores["drawn@10"] == 1.0
    assert {"exact_match[d]", "exact_match[a]"} <= found.scores.keys()
    assert len(list((tmp_path / "drawn").glob("drawn_*.png"))) == 2
    assert (found.summary["model"], found.summary["samples"]) == ("tiny", 6)
