"""Boxes as conversations: COCO's instances, and expressions that refer to one thing."""

import json
import pickle

import pytest

from lvlm_jax.data.coco import CocoInstances, Refer
from lvlm_jax.data.sources import Source
from lvlm_jax.processing.boxes import FORMS, read_boxes
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Text
from lvlm_jax.recipe import Data

COCO = {
    "images": [
        {"id": 7, "file_name": "empty.jpg", "width": 10, "height": 10},
        {"id": 9, "file_name": "a.jpg", "width": 200, "height": 100},
        {"id": 3, "file_name": "sub/b.jpg", "width": 50, "height": 50},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
    "annotations": [
        {"image_id": 9, "category_id": 17, "bbox": [100, 0, 100, 50], "iscrowd": 0},
        {"image_id": 3, "category_id": 17, "bbox": [0, 0, 50.4, 25]},
        {"image_id": 9, "category_id": 18, "bbox": [0, 50, 50, 25.0], "iscrowd": 0},
        {"image_id": 9, "category_id": 17, "bbox": [0, 0, 20, 10], "iscrowd": 0},
        {"image_id": 9, "category_id": 18, "bbox": [0, 0, 200, 100], "iscrowd": 1},
    ],
}


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def changed(**lists):
    return {name: [dict(entry) for entry in entries] for name, entries in (COCO | lists).items()}


def said(example):
    picture, question = example.turns[0].segments
    (answer,) = example.turns[1].segments
    assert isinstance(question, Text)
    return picture, question.text, answer.text


def test_every_kind_is_asked_for_and_all_its_boxes_are_the_answer(tmp_path):
    source = CocoInstances(write(tmp_path / "instances_val.json", COCO))
    assert isinstance(source, Source)
    assert len(source) == 2
    picture, question, answer = said(source[0])
    assert picture == Image(str(tmp_path / "a.jpg"))
    assert question == "detect dog ; cat"
    assert answer == (
        "<loc0512><loc0000><loc0767><loc0256> dog ; "
        "<loc0000><loc0512><loc0512><loc1023> cat ; <loc0000><loc0000><loc0102><loc0102> cat"
    )
    assert (source[0].id, source[0].origin) == ("9", f"{tmp_path}/instances_val.json: images[1]")
    assert said(source[1])[2] == "<loc0000><loc0000><loc0512><loc1023> cat"  # 50.4 of 50 pixels is the edge
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_reads_its_own_answers(form, tmp_path):
    data = Data(source="coco", path=str(write(tmp_path / "a.json", COCO)), images=str(tmp_path / "p"), form=form)
    picture, question, answer = said(data.open()[0])
    assert picture == Image(str(tmp_path / "p" / "a.jpg"))
    assert "dog" in question and "cat" in question  # noqa: PT018
    boxes = read_boxes(answer, form).boxes
    assert [box.label for box in boxes] == ["dog", "cat", "cat"]
    assert boxes[1].edges == pytest.approx((0, 0.5, 0.5, 1), abs=0.006)


def one(**changes):
    return {"annotations": [{"image_id": 9, "category_id": 17, "bbox": [0, 0, 1, 1]} | changes]}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (one(image_id=8), r"annotations\[0\]: image_id 8 is in none of the 'images'"),
        (one(category_id=1), "category_id 1 is in none of the 'categories'"),
        (one(bbox=[0, 0, 1]), r"annotations\[0\]: 'bbox' must be 4 numbers"),
        (one(image_id="9"), "'image_id' must be a whole number, this is text"),
        (one(iscrowd=1), "no picture has a box"),
        (one(bbox=[300, 0, 1, 1]), r"images\[1\]: annotations\[0\]: the box from \(300.0, 0.0\)"),
        ({"images": []}, "'images' must be a list with at least one entry"),
    ],
)
def test_files_that_are_wrong(lists, message, tmp_path):
    with pytest.raises(DataError, match=message):
        CocoInstances(write(tmp_path / "a.json", changed(**lists)))[0]


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"no\.json does not exist; give the path of an instances_"):
        CocoInstances(tmp_path / "no.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="broken JSON"):
        CocoInstances(tmp_path / "a.json")
    with pytest.raises(DataError, match="must be an object with 'images'"):
        CocoInstances(write(tmp_path / "a.json", [1]))
    with pytest.raises(ValueError, match=r"form='yolo': choose one of \['paligemma'"):
        Data(source="coco", path="x", form="yolo")


MINIGPT = {
    "img_id": "COCO_train2014_000000580957_1",
    "sents": "left cat ",
    "bbox": [20, 10, 60, 40],
    "width": 200,
    "height": 100,
}
QWEN = {"image": "a.jpg", "sent": "left cat", "bbox": [20, 10, 80, 50], "width": 200, "height": 100}


def test_expressions_in_both_layouts(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, (MINIGPT, QWEN))))
    source = Refer(tmp_path / "a.jsonl")
    first, second = said(source[0]), said(source[1])
    assert first[1:] == second[1:] == ("detect left cat", "<loc0102><loc0102><loc0512><loc0409> left cat")
    assert first[0] == Image(str(tmp_path / "COCO_train2014_000000580957.jpg"))
    assert second[0] == Image(str(tmp_path / "a.jpg"))
    asked = Data(source="refcoco", path=str(tmp_path / "a.jsonl"), form="minigptv2").open()[1]
    assert said(asked)[1:] == ("[refer] give me the location of left cat", "{<10><10><40><50>}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (QWEN | {"bbox": None}, r"a\.json:1: 'bbox' must be 4 numbers"),
        (QWEN | {"sent": " "}, "'sent' or 'sents' must be text"),
        (QWEN | {"width": None}, "'width' must be a whole number"),
        (QWEN | {"bbox": [80, 10, 20, 50]}, "holds no part of 200 x 100 pixels"),
        (QWEN | {"sent": "a;b"}, "the label 'a;b' holds ';'"),
        ({k: v for k, v in QWEN.items() if k != "image"}, "'image' must hold a path"),
    ],
)
def test_expressions_that_are_wrong(record, message, tmp_path):
    source = Refer(write(tmp_path / "a.json", [record]))
    with pytest.raises(DataError, match=message):
        source[0]
