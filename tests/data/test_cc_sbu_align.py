"""MiniGPT-4's folder of curated captions."""

import json

import pytest

from lvlm_jax.data.cc_sbu_align import QUESTIONS
from lvlm_jax.processing.encode import DataError
from lvlm_jax.recipe import Data

CAPTIONS = [{"image_id": "2", "caption": "A red bus."}, {"image_id": 10, "caption": "Two dogs."}]


def written(folder, content):
    (folder / "filter_cap.json").write_text(json.dumps(content))
    return str(folder)


def test_its_records(tmp_path):
    found = Data(source="cc_sbu_align", path=written(tmp_path, {"annotations": CAPTIONS * 3})).open()
    assert len(found) == 6
    assert found.origin(5) == f"{tmp_path}/filter_cap.json: annotations[5]"
    example = found[1]
    assert example.id == "10"
    assert example.images[0].source == f"{tmp_path}/image/10.jpg"
    assert [turn.segments[-1].text for turn in example.turns] == [QUESTIONS[1], "Two dogs."]
    assert [found[i].turns[0].segments[1].text for i in range(5)] == [*QUESTIONS, QUESTIONS[0]]
    assert "records=6" in repr(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "'annotations' must be a list of records"),
        ({"annotations": []}, "'annotations' must be a list of records"),
        ({"annotations": [{"image_id": "1"}]}, r"annotations\[0\]: 'caption' must be text"),
        ({"annotations": [{"caption": "a"}]}, r"annotations\[0\]: 'image_id' must be text or a whole number"),
        ({"annotations": [{"image_id": "../x", "caption": "a"}]}, "leaves the picture folder"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=message):
        Data(source="cc_sbu_align", path=path).open()[0]


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=r"filter_cap.json does not exist; give the folder"):
        Data(source="cc_sbu_align", path=str(tmp_path)).open()


def test_videochats_file(tmp_path):
    record = {"video": "a/b.mp4", "QA": [{"q": "What?", "a": "A cat."}, {"q": "Why?", "a": "It is."}]}
    (tmp_path / "x.json").write_text(json.dumps([record, {"image": "c.jpg", "QA": record["QA"]}]))
    found = Data(source="videochat", path=str(tmp_path / "x.json"), images=str(tmp_path)).open()
    clip, picture = found[0], found[1]
    assert clip.videos[0].source == f"{tmp_path}/a/b.mp4"
    assert picture.images[0].source == f"{tmp_path}/c.jpg"
    assert [turn.segments[-1].text for turn in clip.turns] == ["What?", "A cat.", "Why?", "It is."]
