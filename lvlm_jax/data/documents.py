"""Interleaved documents: running text with pictures between, as OBELICS and MMC4 publish them.

A document is one assistant turn of texts and pictures in reading order, for the template ``document``, which learns all
of its text.
"""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from etils import epath

from lvlm_jax.data.conversations import Find, decode_base64, kind_of, list_of, picture_inside, picture_under
from lvlm_jax.data.files import expand
from lvlm_jax.data.parquet import Table, check_column
from lvlm_jax.data.records import RecordFile
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.data.tars import TarSelection
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image, Segment, Text, Turn

SIMILARITY = 0.24
"""OpenFlamingo's threshold for a picture beside its sentence (train.py, mmc4_textsim_threshold)."""


def document(segments: Iterable[Segment], max_pictures: int, origin: str) -> tuple[Turn, ...]:
    """The one turn of a document; it ends before picture `max_pictures` + 1 (0: no limit)."""
    kept: list[Segment] = []
    pictures = 0
    for segment in segments:
        pictures += isinstance(segment, Image)
        if max_pictures and pictures > max_pictures:
            break
        kept.append(segment)
    if not any(isinstance(segment, Text) for segment in kept):
        raise DataError(f"{origin}: a document without text, so nothing to learn from; drop it")
    return (Turn(role="assistant", segments=tuple(kept)),)


class Obelics(Numbered):
    """OBELICS: Parquet rows of parallel lists ``images`` and ``texts``, exactly one of the two at each place.

    Args:
      path: Parquet files, as `files.expand` takes it.
      images: folder of pictures that are named by path; default the first file's own.
      max_pictures: a document ends before the next one; 0 has no limit.

    OBELICS publishes addresses; fetch the pictures first and put bytes or paths in their place. Source: OBELICS
    (2306.16527), section 3.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None, max_pictures: int = 0):
        self._table = Table(path, ("images", "texts"))
        for name in ("images", "texts"):
            if name not in self._table.types:
                raise DataError(
                    f"{self._table.files[0]}: no column {name!r}; a table of documents has 'images' and 'texts', this "
                    f"one has {', '.join(self._table.all)}"
                )
        check_column(self._table, "images", self._table.types["images"])
        check_column(self._table, "texts", self._table.types["texts"], wanted="a list of texts")
        self._images = epath.Path(images) if images is not None else self._table.files[0].parent
        self._max_pictures = max_pictures

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        table = self._table
        return (
            f"Obelics({str(table.files[0])!r}, files={len(table.files)}, rows={len(table)}, "
            f"images={str(self._images)!r}, max_pictures={self._max_pictures}, crc={table.crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path: row n``."""
        return self._table.origin(index)

    def _example(self, index: int) -> Example:
        record, origin = self._table.read(index), self.origin(index)
        images, texts = record.get("images") or [], record.get("texts") or []
        if len(images) != len(texts):
            raise DataError(f"{origin}: {len(images)} 'images' but {len(texts)} 'texts'; the two lists run in parallel")
        find, segments = picture_inside(self._images), []
        for place, (picture, text) in enumerate(zip(images, texts, strict=True)):
            if (picture is None) == (text is None):
                both = "neither a picture nor a text" if picture is None else "a picture and a text"
                raise DataError(f"{origin}: place {place} holds {both}; each place holds exactly one of them")
            segments.append(Text(text) if picture is None else find(picture, f"images[{place}]", origin))
        return Example(turns=document(segments, self._max_pictures, origin), id=str(index), origin=origin)


def mmc4_segments(record: dict[str, Any], find: Find, min_similarity: float, origin: str) -> list[Segment]:
    """The sentences of an MMC4 document, each picture before the sentence that it matches best.

    ``text_list``; ``image_info`` with ``image_name`` or ``image_base64`` and, where the set has them,
    ``matched_text_index`` and ``matched_sim``, else the largest of its row of ``similarity_matrix``. A picture below
    `min_similarity` is left out. Source: MMC4 (2304.06939); OpenFlamingo, data.py, `preprocess_interleaved`.
    """
    sentences = record.get("text_list")
    if not isinstance(sentences, list) or not all(isinstance(item, str) for item in sentences) or not sentences:
        raise DataError(f"{origin}: 'text_list' must be a list of sentences, this is {kind_of(sentences)}")
    before: dict[int, list[Image]] = {}
    infos = list_of(record, "image_info", origin) if record.get("image_info") else []
    for number, info in enumerate(infos):
        where = f"{origin}: image_info[{number}]"
        sentence, similarity = _match(record, info, number, where)
        if not 0 <= sentence < len(sentences):
            raise DataError(f"{where}: matches sentence {sentence}, but there are {len(sentences)}")
        if similarity < min_similarity:
            continue
        if "image_base64" in info:
            picture = Image(decode_base64(str(info["image_base64"]), f"{where}: 'image_base64'"))
        else:
            picture = find(info.get("image_name"), "image_name", where)
        before.setdefault(sentence, []).append(picture)
    segments: list[Segment] = []
    for number, sentence in enumerate(sentences):
        segments += before.get(number, [])
        segments.append(Text(sentence if number == len(sentences) - 1 else sentence + " "))
    return segments


def _match(record: dict[str, Any], info: dict[str, Any], number: int, where: str) -> tuple[int, float]:
    """(sentence, similarity) of a picture."""
    sentence, similarity = info.get("matched_text_index"), info.get("matched_sim")
    if isinstance(sentence, int) and isinstance(similarity, int | float):
        return sentence, float(similarity)
    matrix = record.get("similarity_matrix")
    row = matrix[number] if isinstance(matrix, list) and number < len(matrix) else None
    if not isinstance(row, list) or not row or not all(isinstance(x, int | float) for x in row):
        raise DataError(
            f"{where}: no 'matched_text_index' with 'matched_sim', and no row of numbers in 'similarity_matrix'; the "
            "place of a picture follows from one of them"
        )
    return row.index(max(row)), float(max(row))


class Mmc4(Numbered):
    """MMC4: JSONL documents whose pictures lie in the folder `images`.

    Args:
      path: .jsonl files, as `files.expand` takes it.
      images: folder that ``image_name`` starts from; default the first file's own.
      min_similarity: a picture below it is left out.
      max_pictures: a document ends before the next one; 0 has no limit.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        images: str | os.PathLike | None = None,
        min_similarity: float = SIMILARITY,
        max_pictures: int = 0,
    ):
        self._files = [RecordFile(file) for file in expand(path, (".jsonl", ".json"))]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self._images = epath.Path(images) if images is not None else self._files[0].path.parent
        self._min_similarity, self._max_pictures = min_similarity, max_pictures

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        crc = "-".join(f"{file.crc:08x}" for file in self._files)
        return (
            f"Mmc4({str(self._files[0].path)!r}, files={len(self._files)}, records={len(self)}, "
            f"images={str(self._images)!r}, min_similarity={self._min_similarity}, max_pictures={self._max_pictures}, "
            f"crc={crc})"
        )

    def _place(self, index: int) -> tuple[RecordFile, int]:
        file = bisect.bisect_right(self._ends, index)
        return self._files[file], index - (self._ends[file] - len(self._files[file]))

    def origin(self, index: int) -> str:
        """``path:line``."""
        file, number = self._place(index)
        return file.origin(number)

    def _example(self, index: int) -> Example:
        file, number = self._place(index)
        record, origin = file.read(number), file.origin(number)
        segments = mmc4_segments(record, picture_under(self._images), self._min_similarity, origin)
        return Example(turns=document(segments, self._max_pictures, origin), id=str(index), origin=origin)


class Mmc4Tar(TarSelection):
    """MMC4 as OpenFlamingo trains on it: tar shards of ``KEY.json`` with ``image_base64`` inside."""

    def __init__(self, *args: Any, min_similarity: float = SIMILARITY, max_pictures: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._min_similarity, self._max_pictures = min_similarity, max_pictures

    def __repr__(self) -> str:
        similar = f"min_similarity={self._min_similarity}, max_pictures={self._max_pictures}"
        return f"{super().__repr__()[:-1]}, {similar})"

    def _turns(self, record: dict[str, Any], origin: str) -> tuple[Turn, ...]:
        if "json" not in record:
            raise DataError(f"{origin}: has {', '.join(f'.{name}' for name in record)} but no .json; add its document")
        segments = mmc4_segments(record["json"], _no_path, self._min_similarity, origin)
        return document(segments, self._max_pictures, origin)


def _no_path(value: Any, field: str, where: str) -> Image:
    raise DataError(f"{where}: no 'image_base64'; a tar's pictures must stand in the tar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObelicsFiles:
    """The recipe's fields of `Obelics`."""

    template: ClassVar[str] = "document"
    path: str
    images: str = ""
    max_pictures: int = 0

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Obelics(self.path, images=self.images or None, max_pictures=self.max_pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmc4Files:
    """The recipe's fields of `Mmc4`."""

    template: ClassVar[str] = "document"
    path: str
    images: str = ""
    min_similarity: float = SIMILARITY
    max_pictures: int = 0

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Mmc4(self.path, self.images or None, self.min_similarity, self.max_pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmc4TarFiles:
    """The recipe's fields of `Mmc4Tar`."""

    template: ClassVar[str] = "document"
    path: str
    min_similarity: float = SIMILARITY
    max_pictures: int = 0

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        limits = {"min_similarity": self.min_similarity, "max_pictures": self.max_pictures}
        return Mmc4Tar(self.path, cache=cache, on_bad=on_bad, **limits)
