"""Tar shards in WebDataset layout: the files of a record stand in one tar under one key, ``00012.jpg``, ``00012.txt``.

A shard's headers are read once; what they say is kept in a small file beside the run, so that a restart does not read a
terabyte again. Records are then read by number, in any order.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from lvlm_jax.data.conversations import LAYOUTS, picture_inside, turns_of
from lvlm_jax.data.files import expand, read_arrays, read_ranges, write_whole
from lvlm_jax.data.sources import Numbered, Source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
VIDEOS = ("mp4", "mkv", "webm", "mov", "avi")
_TWICE, _CUT, _BELOW = "keys that stand twice", "shards cut short", "records below min_score"
_THREADS = 16  # shards indexed at once: most of it is waiting for a disk


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard's headers say.

    keys bytes[n]: of each record, UTF-8, in an array, since there may be a hundred million. first int64[n+1]: where its
    members begin. members int64[m, 3]: (extension, offset, size), the extension as a place in `extensions`. scores
    float64[n]: the metadata field asked for, NaN where a record has none.
    """

    keys: np.ndarray
    extensions: tuple[str, ...]
    first: np.ndarray
    members: np.ndarray
    scores: np.ndarray
    left_out: dict[str, int]


class TarRecords:
    """The records of tar shards by number: ``{"jpg": bytes, "txt": ..., "json": ...}``.

    Args:
      path: as `files.expand` takes it; ``shard-{00000..00010}.tar``.
      score: field of a record's ``.json`` to read while indexing.
      cache: folder for the indices.
      on_bad: "raise", or "skip": a shard's cut end and keys that stand twice are left out and counted in `left_out`.

    Raises:
      DataError: a shard that is no tar; under "raise" one that ends in the middle of a record or holds a key twice.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        score: str = "",
        cache: str | os.PathLike | None = None,
        on_bad: str = "raise",
    ):
        self.files = expand(path, (".tar",))
        with ThreadPoolExecutor(_THREADS) as pool:
            shards = list(pool.map(lambda file: _indexed(file, score, cache, on_bad), self.files))
        self._shards = [dataclasses.replace(shard, scores=np.empty(0)) for shard in shards]
        self._firsts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.scores = np.concatenate([shard.scores for shard in shards])
        self.left_out = {}
        self.crc = 0
        for shard in shards:
            for reason, count in shard.left_out.items():
                self.left_out[reason] = self.left_out.get(reason, 0) + count
            self.crc = zlib.crc32(shard.keys.tobytes() + shard.members.tobytes(), self.crc)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def _at(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return shard, index - int(self._firsts[shard])

    def key(self, index: int) -> str:
        """The record's key."""
        shard, record = self._at(index)
        return self._shards[shard].keys[record].decode()

    def origin(self, index: int) -> str:
        """``path: key``."""
        return f"{self.files[self._at(index)[0]]}: {self.key(index)}"

    def read(self, index: int) -> dict[str, Any]:
        """Extension -> bytes; ``txt`` as text and ``json`` as an object."""
        number, record = self._at(index)
        shard, origin = self._shards[number], self.origin(index)
        members = shard.members[shard.first[record] : shard.first[record + 1]].tolist()
        contents = read_ranges(self.files[number], [(offset, size) for _, offset, size in members])
        names = [shard.extensions[extension] for extension, _, _ in members]
        return {name: _decoded(name, data, origin) for name, data in zip(names, contents, strict=True)}


def _decoded(extension: str, data: bytes, origin: str) -> Any:
    """A member's content: text and JSON decoded, anything else as it is."""
    if extension not in ("txt", "json"):
        return data
    try:
        text = data.decode("utf-8")
        value = json.loads(text) if extension == "json" else text
    except ValueError as error:
        raise DataError(f"{origin}.{extension}: not UTF-8 {extension} ({error}); write it again") from None
    if extension == "json" and not isinstance(value, dict):
        raise DataError(f"{origin}.json: must be a JSON object {{...}}, this is a {type(value).__name__}")
    return value


def _indexed(file: epath.Path, score: str, cache: str | os.PathLike | None, on_bad: str) -> Shard:
    """A shard's index, from the cache where the file has not changed since."""
    if cache is None:
        return _index(file, score, on_bad)
    stat = file.stat()
    name = hashlib.sha256(f"{file} {stat.length} {stat.mtime} {score} {on_bad}".encode()).hexdigest()[:20]
    kept = epath.Path(cache) / f"tar-{name}.npz"
    fields = ("keys", "first", "members", "scores")
    if (arrays := read_arrays(kept, ("texts", *fields))) is not None:
        texts = json.loads(str(arrays.pop("texts")))
        return Shard(extensions=tuple(texts["extensions"]), left_out=texts["left_out"], **arrays)
    shard = _index(file, score, on_bad)
    texts = json.dumps({"extensions": shard.extensions, "left_out": shard.left_out})
    arrays = {field: getattr(shard, field) for field in fields}
    out = io.BytesIO()
    np.savez(out, texts=np.array(texts), **arrays)
    write_whole(kept, out.getvalue())
    return shard


def _index(file: epath.Path, score: str, on_bad: str) -> Shard:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    twice: dict[str, str] = {}
    with file.open("rb") as opened:
        cut = _members(file, opened, found, twice)
        left_out = {}
        if twice:
            if on_bad == "raise":
                key, extension = next(iter(twice.items()))
                raise DataError(
                    f"{file}: the key {key!r} stands twice ({key}.{extension}), so which picture belongs to which text "
                    "is open; write the shard again with one key a record, or leave such records out with on_bad='skip'"
                )
            left_out[_TWICE] = len(twice)
            found = {key: members for key, members in found.items() if key not in twice}
        if cut:
            if on_bad == "raise":
                raise DataError(
                    f"{file}: {cut}, after {len(found)} whole ones; copy or download it again, or keep what is whole "
                    "with on_bad='skip'"
                )
            left_out[_CUT] = 1
        scores = [_score(file, opened, key, members, score) for key, members in found.items()]
    extensions = sorted({name for members in found.values() for name in members})
    table = [(extensions.index(name), *place) for members in found.values() for name, place in members.items()]
    return Shard(
        keys=np.asarray([key.encode() for key in found], bytes),
        extensions=tuple(extensions),
        first=np.cumsum([0, *map(len, found.values())]),
        members=np.asarray(table, np.int64).reshape(-1, 3),
        scores=np.asarray(scores, np.float64),
        left_out=left_out,
    )


def _members(file: epath.Path, opened: Any, found: dict, twice: dict) -> str:
    """Fills key -> extension -> (offset, size), and the keys that stand twice; says how the shard is cut, or ""."""
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    last = ""
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
                if member.offset_data + member.size > size:
                    found.pop(key, None)
                    return f"ends in the middle of record {key}"
                if extension in found.setdefault(key, {}):
                    twice[key] = extension
                found[key][extension] = member.offset_data, member.size
                last = key
        opened.seek(max(size - 1024, 0))
        if any(opened.read(1024)):  # tar ends with two empty blocks of 512 bytes
            found.pop(last, None)  # its last record may lack a part
            return f"ends without tar's closing blocks, in or after record {last}"
    except tarfile.ReadError as error:
        if not found:
            raise DataError(f"{file}: not a tar ({error}); .tar.gz must be unpacked to .tar first") from None
        found.pop(last, None)
        return f"ends in the middle of record {last}"
    return ""


def _score(file: epath.Path, opened: Any, key: str, members: dict[str, tuple[int, int]], field: str) -> float:
    """The metadata field as a number, NaN where there is none, or no .json that can be read: such a record is bad."""
    if not field or "json" not in members:
        return math.nan
    offset, size = members["json"]
    opened.seek(offset)
    try:
        value = _decoded("json", opened.read(size), f"{file}: {key}").get(field)
    except DataError:
        return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


class TarSelection(Numbered):
    """Records of tar shards whose score is high enough; subclasses say how one becomes an `Example`.

    Args:
      path, cache, on_bad: as for `TarRecords`.
      score: field of the ``.json`` that holds a record's score, such as img2dataset's ``similarity``.
      min_score: records below it are left out, and counted in `left_out`; one without the field is a bad record.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        score: str = "",
        min_score: float | None = None,
        cache: str | os.PathLike | None = None,
        on_bad: str = "raise",
    ):
        self._records = TarRecords(path, score if min_score is not None else "", cache, on_bad)
        self._score, self._min_score = score, min_score
        below = self._records.scores < (-math.inf if min_score is None else min_score)  # False for NaN
        self._numbers = np.flatnonzero(~below)
        self.left_out = {**self._records.left_out, **({_BELOW: int(below.sum())} if below.any() else {})}
        if not len(self):
            raise DataError(f"{path}: no record is left; left out: {self.left_out or 'none, the shards are empty'}")

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        records = self._records
        kept = f", {self._score}>={self._min_score}" if self._min_score is not None else ""
        return (
            f"{type(self).__name__}({str(records.files[0])!r}, shards={len(records.files)}, records={len(self)} of "
            f"{len(records)}{kept}, left_out={self.left_out}, crc={records.crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path: key``."""
        return self._records.origin(int(self._numbers[index]))

    def _example(self, index: int) -> Example:
        number = int(self._numbers[index])
        origin = self._records.origin(number)
        record = self._records.read(number)
        if self._min_score is not None and math.isnan(self._records.scores[number]):
            raise DataError(f"{origin}: no number {self._score!r} in its .json, which min_score needs")
        turns = self._turns(record, origin)
        return Example(turns=turns, id=self._records.key(number), origin=origin)

    def _turns(self, record: dict[str, Any], origin: str) -> Any:
        raise NotImplementedError


class TarPairs(TarSelection):
    """Pictures or videos with their text: ``KEY.jpg`` with ``KEY.txt`` (a caption), or with a talk in ``KEY.json``.

    The ``.json`` may hold any layout of `conversations.LAYOUTS`; beside a ``.txt`` it is metadata. Several pictures of
    a record (``KEY.0.jpg``, ``KEY.1.jpg``) come in the order of their names, numbers in them by value.
    """

    def _turns(self, record: dict[str, Any], origin: str) -> Any:
        inside = sorted(record, key=_by_number)
        pictures = [record[name] for name in inside if name.rpartition(".")[2] in PICTURES]
        videos = [record[name] for name in inside if name.rpartition(".")[2] in VIDEOS]
        talk = dict(record.get("json", {}))
        if "txt" in record:
            talk = {"caption": record["txt"].strip()}
        if not talk.keys() & LAYOUTS.keys():
            has = ", ".join(f".{name}" for name in record)
            raise DataError(f"{origin}: has {has} but no .txt, and no {' or '.join(LAYOUTS)} in a .json; add its text")
        if not (pictures or videos):
            raise DataError(f"{origin}: has no picture ({', '.join(f'.{name}' for name in (*PICTURES, *VIDEOS))})")
        held = {"image": None, "images": pictures, "video": None, "videos": videos or None}
        return turns_of({**talk, **held}, _inside, origin)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts "2.jpg" before "10.jpg"."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _inside(value: Any, field: str, where: str) -> Image:
    """A picture out of the shard itself: no path leads out of it."""
    if not isinstance(value, bytes):
        raise DataError(f"{where}: {field!r} names {value!r}; a tar's pictures must stand in the tar")
    return picture_inside(epath.Path("."))(value, field, where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarFiles:
    """The recipe's fields of `TarPairs`."""

    path: str
    score: str = ""
    min_score: float | None = None

    def __post_init__(self) -> None:
        if (self.min_score is None) == bool(self.score):
            raise DataError("score and min_score go together: the metadata field and the least value that is kept")

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return TarPairs(self.path, self.score, self.min_score, cache, on_bad)
