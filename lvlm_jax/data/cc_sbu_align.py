"""MiniGPT-4's curated captions as questions and answers: the folder that its second stage trains on."""

import dataclasses
import json
import os
import zlib
from typing import Any

from etils import epath

from lvlm_jax.data.conversations import kind_of, picture_under
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Text, Turn

QUESTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""The paraphrases of one question, of which record i is asked number i modulo 4 (they draw one a batch).

Source: Vision-CAIR/MiniGPT-4, prompts/alignment.txt.
"""


class CcSbuAlign(Numbered):
    """A folder of ``filter_cap.json`` and ``image/ID.jpg``, whose records are asked for in turn by `QUESTIONS`.

    ``{"annotations": [{"image_id": "2", "caption": text}]}``. Source: Vision-CAIR/MiniGPT-4, cc_sbu_dataset.py and
    dataset/README_2_STAGE.md.

    Args:
      path: the folder, or its JSON file.
      images: folder of the pictures; default ``image`` beside the file.

    Raises:
      DataError: a file that is no such JSON; when a record is read, one without a caption or an id.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None):
        path = epath.Path(path)
        self._path = path if path.suffix == ".json" else path / "filter_cap.json"
        self._root = epath.Path(images) if images is not None else self._path.parent / "image"
        if not self._path.is_file():
            raise DataError(f"{self._path} does not exist; give the folder of filter_cap.json and image/")
        data = self._path.read_bytes()
        self._crc = zlib.crc32(data)
        try:
            whole = json.loads(data)
        except ValueError as error:
            raise DataError(f"{self._path}: broken JSON ({error}); fetch or copy it again") from None
        found = whole.get("annotations") if isinstance(whole, dict) else None
        if not isinstance(found, list) or not found:
            raise DataError(f"{self._path}: 'annotations' must be a list of records, this is {kind_of(found)}")
        self._records: list[Any] = found

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"CcSbuAlign({str(self._path)!r}, images={str(self._root)!r}, records={len(self)}, crc={self._crc:08x})"

    def origin(self, index: int) -> str:
        """``path: annotations[i]``."""
        return f"{self._path}: annotations[{index}]"

    def _example(self, index: int) -> Example:
        record, origin = self._records[index], self.origin(index)
        if not isinstance(record, dict) or not isinstance(record.get("caption"), str) or not record["caption"].strip():
            raise DataError(f"{origin}: 'caption' must be text, this is {kind_of(record)}")
        name = record.get("image_id")
        if type(name) not in (str, int):
            raise DataError(f"{origin}: 'image_id' must be text or a whole number, this is {kind_of(name)}")
        picture = picture_under(self._root)(f"{name}.jpg", "image_id", origin)
        asked = Turn(role="user", segments=(picture, Text(QUESTIONS[index % len(QUESTIONS)])))
        answer = Turn(role="assistant", segments=(Text(record["caption"]),))
        return Example(turns=(asked, answer), id=str(name), origin=origin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CcSbuAlignFolder:
    """The recipe's fields of `CcSbuAlign`."""

    path: str
    images: str = ""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return CcSbuAlign(self.path, self.images or None)
