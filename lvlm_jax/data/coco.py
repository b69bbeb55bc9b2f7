"""Boxes to learn from: COCO's instances, and expressions that refer to one thing, as questions and answers in text.

Both write boxes in any of the forms of `processing.boxes`; a question asks as that form's model is asked.
"""

import dataclasses
import json
import os
import zlib
from typing import Any

import numpy as np
from etils import epath

from lvlm_jax.config import ConfigError
from lvlm_jax.data.conversations import Find, kind_of, picture_under
from lvlm_jax.data.records import RecordFile
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.processing.boxes import FORMS, Box, from_pixels, write_boxes
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image, Text, Turn

DETECT = {
    "paligemma": ("detect {}", " ; "),
    "minigptv2": ("[detection] {}", ", "),
    "qwen_vl": ("Find in the image and box: {}", ", "),
    "cogvlm": ("Where are {}? answer in [[x0,y0,x1,y1]] format.", ", "),
}
"""Form -> how to ask for things of several names, and what parts the names. PaliGemma's and MiniGPT-v2's are theirs."""

REFER = {
    "paligemma": "detect {}",
    "minigptv2": "[refer] give me the location of {}",
    "qwen_vl": "Find in the image and box: {}",
    "cogvlm": "Where is {}? answer in [[x0,y0,x1,y1]] format.",
}
"""Form -> how to ask for the one thing of an expression. Source: PaliGemma's mix models, MiniGPT-4's
eval_scripts/eval_ref.py, CogVLM's templates."""


def _turns(image: Image, question: str, boxes: list[Box], form: str, where: str) -> tuple[Turn, Turn]:
    try:
        answer = Text(write_boxes(boxes, form))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return Turn(role="user", segments=(image, Text(question))), Turn(role="assistant", segments=(answer,))


class CocoInstances(Numbered):
    """The pictures of an ``instances_*.json``: asked for every kind of thing that is there, answered by all its boxes.

    ``{"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}], "annotations": [{"image_id",
    "category_id", "bbox": [x, y, width, height], "iscrowd"}]}``, boxes in pixels. Pictures without a box are left out,
    and so are boxes around crowds, as they stand for no one thing. Kinds stand in the order of the file's categories,
    boxes of a kind in the file's order.

    Args:
      path: the file.
      images: folder of the pictures; default the file's own.
      form: a key of `processing.boxes.FORMS`.

    Raises:
      DataError: a file that is no such JSON, naming the entry; when a record is read, a box outside its picture.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, form: str = "paligemma"):
        self._path, self._form = epath.Path(path), form
        self._root = epath.Path(images) if images is not None else self._path.parent
        data = _bytes(self._path)
        self._crc = zlib.crc32(data)
        whole, where = _json(data, self._path), str(self._path)
        kinds, pictures, things = (_list(whole, name, where) for name in ("categories", "images", "annotations"))
        self._names = [str(kind.get("name")) for kind in kinds]
        self._table = _table(things, _ids(pictures, f"{where}: images"), _ids(kinds, f"{where}: categories"), where)
        taken, first = np.unique(self._table["picture"], return_index=True)
        if not len(taken):
            raise DataError(f"{where}: no picture has a box; is this a file of instances?")
        # Names and sizes alone: what travels to worker processes is small beside the outlines that the file holds.
        self._pictures = [
            (int(i), *(pictures[i].get(name) for name in ("id", "file_name", "width", "height"))) for i in taken
        ]
        self._first = np.append(first, len(self._table))

    def __len__(self) -> int:
        return len(self._pictures)

    def __repr__(self) -> str:
        return (
            f"CocoInstances({str(self._path)!r}, images={str(self._root)!r}, form={self._form!r}, "
            f"records={len(self)}, crc={self._crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path: images[i]``."""
        return f"{self._path}: images[{self._pictures[index][0]}]"

    def _example(self, index: int) -> Example:
        _, name, file_name, width, height = self._pictures[index]
        origin = self.origin(index)
        size = tuple(_whole({"width": width, "height": height}, side, origin) for side in ("width", "height"))
        boxes = []
        for row in self._table[self._first[index] : self._first[index + 1]]:
            x, y, wide, high = row["bbox"].tolist()
            where = f"{origin}: annotations[{row['number']}]"
            boxes.append(_inside(x, y, x + wide, y + high, size, self._names[row["kind"]], where))
        ask, parted = DETECT[self._form]
        question = ask.format(parted.join(dict.fromkeys(box.label for box in boxes)))
        picture = picture_under(self._root)(file_name, "file_name", origin)
        return Example(turns=_turns(picture, question, boxes, self._form, origin), id=str(name), origin=origin)


_ROW = np.dtype([("picture", np.int32), ("kind", np.int32), ("number", np.int32), ("bbox", np.float64, 4)])


def _table(things: list[dict[str, Any]], pictures: dict[int, int], kinds: dict[int, int], path: str) -> np.ndarray:
    """The boxes, crowds apart, by picture, then by kind; both as places in their lists."""
    rows = []
    for number, thing in enumerate(things):
        if thing.get("iscrowd"):
            continue
        where, places = f"{path}: annotations[{number}]", []
        for field, known, of in (("image_id", pictures, "images"), ("category_id", kinds, "categories")):
            if (found := known.get(_whole(thing, field, where))) is None:
                raise DataError(f"{where}: {field} {thing[field]} is in none of the {of!r}")
            places.append(found)
        rows.append((*places, number, tuple(_four(thing, where))))
    return np.sort(np.array(rows, _ROW), order=("picture", "kind", "number"))


def _ids(entries: list[dict[str, Any]], where: str) -> dict[int, int]:
    """Id -> place in the list."""
    return {_whole(entry, "id", f"{where}[{place}]"): place for place, entry in enumerate(entries)}


class Refer(Numbered):
    """Expressions that refer to one thing of a picture (RefCOCO, RefCOCO+, RefCOCOg): asked by the words, one box back.

    A .json list or a .jsonl file, told apart by its fields: MiniGPT-v2's ``{"img_id" | "image", "sents": text, "bbox":
    [x, y, width, height], "width", "height"}`` and Qwen-VL's ``{"image", "sent": text, "bbox": [x0, y0, x1, y1],
    "width", "height"}``, boxes in pixels. An ``img_id`` names ``{its first 27 letters}.jpg``, as there.

    Args: as `CocoInstances`.

    Raises:
      DataError: that starts with ``path:line``.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, form: str = "paligemma"):
        self._file, self._form = RecordFile(path), form
        self._root = epath.Path(images) if images is not None else self._file.path.parent

    def __len__(self) -> int:
        return len(self._file)

    def __repr__(self) -> str:
        file = self._file
        return (
            f"Refer({str(file.path)!r}, images={str(self._root)!r}, form={self._form!r}, records={len(file)}, "
            f"crc={file.crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path:line``."""
        return self._file.origin(index)

    def _example(self, index: int) -> Example:
        record, origin = self._file.read(index), self.origin(index)
        field = "sent" if "sent" in record else "sents"
        words = record.get(field)
        if not isinstance(words, str) or not words.strip():
            raise DataError(f"{origin}: 'sent' or 'sents' must be text, this is {kind_of(words)}")
        left, top, right, bottom = _four(record, origin)
        if field == "sents":
            right, bottom = left + right, top + bottom
        size = _whole(record, "width", origin), _whole(record, "height", origin)
        label = words.strip() if self._form == "paligemma" else ""
        box = _inside(left, top, right, bottom, size, label, origin)
        picture = _picture(record, picture_under(self._root), origin)
        turns = _turns(picture, REFER[self._form].format(words.strip()), [box], self._form, origin)
        return Example(turns=turns, id=str(record.get("id", index)), origin=origin)


NAME = 27
"""Letters of ``COCO_train2014_000000580957`` before the number of the expression."""


def _picture(record: dict[str, Any], find: Find, origin: str) -> Image:
    if record.get("image") is None and isinstance(record.get("img_id"), str):
        return find(f"{record['img_id'][:NAME]}.jpg", "img_id", origin)
    return find(record.get("image"), "image", origin)


def _inside(
    left: float | int, top: float | int, right: float | int, bottom: float | int, size: tuple, label: str, where: str
) -> Box:
    try:
        return from_pixels(left, top, right, bottom, *size, label=label)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _four(record: dict[str, Any], where: str) -> list[float | int]:
    value = record.get("bbox")
    if not isinstance(value, list) or len(value) != 4 or not all(type(item) in (int, float) for item in value):
        raise DataError(f"{where}: 'bbox' must be 4 numbers, this is {value!r:.80}")
    return value


def _whole(record: dict[str, Any], field: str, where: str) -> int:
    value = record.get(field)
    if type(value) is not int:
        raise DataError(f"{where}: {field!r} must be a whole number, this is {kind_of(value)}")
    return value


def _list(whole: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    value = whole.get(field)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{where}: {field!r} must be a list with at least one entry, this is {kind_of(value)}")
    return value


def _bytes(path: epath.Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the path of an instances_*.json")
    return path.read_bytes()


def _json(data: bytes, path: epath.Path) -> dict[str, Any]:
    try:
        whole = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); fetch or copy it again") from None
    if not isinstance(whole, dict):
        raise DataError(
            f"{path}: must be an object with 'images', 'categories', 'annotations'; this is {kind_of(whole)}"
        )
    return whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxFiles:
    """The recipe's fields of `CocoInstances` and `Refer`; `form` is how boxes are written."""

    path: str
    images: str = ""
    form: str = "paligemma"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form={self.form!r}: choose one of {list(FORMS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoFile(BoxFiles):
    """The recipe's fields of `CocoInstances`."""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return CocoInstances(self.path, self.images or None, self.form)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferFile(BoxFiles):
    """The recipe's fields of `Refer`."""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Refer(self.path, self.images or None, self.form)
