"""Conversations by number: LLaVA JSON/JSONL and OpenAI-style messages JSONL.

A file is indexed once (byte offsets, one checksum) and each record is parsed when asked for, so that a source is small,
travels to worker processes cheaply, and one bad record costs nothing until somebody reads it.
"""

import base64
import binascii
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np

from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Example, Image, Segment, Text, Turn

PLACEHOLDER = "<image>"
"""The LLaVA file format's own mark for a picture. It means nothing anywhere else."""

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


@runtime_checkable
class Source(Protocol):
    """Conversations by number.

    `repr(source)` names the content (path, size, checksum, count): caches and grain's resume check compare it.
    `origin(i)` says where record i stands (``train.json:12``) without reading it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def origin(self, index: int, /) -> str: ...


class RecordFile:
    """The records of a JSON list or a JSONL file, by number; a file that starts with ``[`` is a list.

    Raises:
      DataError: no such file, an empty file, text that is not UTF-8, or a JSON list broken at some line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            kind = "is a folder" if self.path.is_dir() else "does not exist"
            raise DataError(f"{self.path} {kind}; give the path of a .json list or a .jsonl file")
        data = self.path.read_bytes()
        base = len(_BOM) if data.startswith(_BOM) else 0
        index = _index_list if data[base : base + 4096].lstrip().startswith(b"[") else _index_lines
        table = np.asarray(index(self.path, data, base), np.int64).reshape(-1, 3)
        if not len(table):
            raise DataError(f"{self.path} holds no record; expected a JSON list or one JSON object a line")
        self._starts, self._stops, self._lines = table.T.copy()
        self.size, self.crc = len(data), zlib.crc32(data)

    def __len__(self) -> int:
        return len(self._starts)

    def origin(self, index: int) -> str:
        """``path:line`` of record `index`."""
        return f"{self.path}:{self._lines[index]}"

    def read(self, index: int) -> dict[str, Any]:
        """Record `index`, a JSON object."""
        start, stop = int(self._starts[index]), int(self._stops[index])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        origin = self.origin(index)
        try:
            record = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{origin}: broken JSON at character {error.pos}: {error.msg}; "
                "one line must hold one whole object (or the file must be one list [...])"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{origin}: a record must be a JSON object {{...}}, this is {_kind(record)}")
        return record


def _index_lines(path: Path, data: bytes, base: int) -> list[tuple[int, int, int]]:
    """(first byte, byte past the end, line number) of every line that is not blank."""
    table, start, line = [], base, 1
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if data[start:stop].strip():
            table.append((start, stop, line))
        start, line = stop + 1, line + 1
    return table


def _index_list(path: Path, data: bytes, base: int) -> list[tuple[int, int, int]]:
    """The same of every element of a JSON list."""
    try:
        text = data[base:].decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, base + error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    decode, ascii_only = json.JSONDecoder().raw_decode, text.isascii()
    table, at, byte, line, seen = [], 0, base, 1, 0

    def reach(position: int) -> None:  # keeps `byte` and `line` in step with the character position
        nonlocal byte, line, seen
        byte += position - seen if ascii_only else len(text[seen:position].encode())
        line += text.count("\n", seen, position)
        seen = position

    def broken(position: int, reason: str) -> DataError:
        reach(position)
        return DataError(f"{path}:{line}: broken JSON list: {reason}; mend it (is it cut short, or really JSONL?)")

    at = _SPACE.match(text, text.index("[") + 1).end()
    while text[at : at + 1] != "]":
        try:
            _, stop = decode(text, at)
        except json.JSONDecodeError as error:
            raise broken(min(error.pos, len(text)), error.msg) from None
        reach(at)
        start, first = byte, line
        reach(stop)
        table.append((start, byte, first))
        at = _SPACE.match(text, stop).end()
        if text[at : at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise broken(at, "expected ',' or ']' after a record")
    if text[at + 1 :].strip():
        raise broken(at + 1, "something follows the closing ']'")
    return table


class _FileSource:
    """A `Source` over a `RecordFile`; subclasses say how a record becomes an `Example`."""

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None):
        self._file = RecordFile(path)
        self._images = Path(images) if images is not None else self._file.path.parent

    def __len__(self) -> int:
        return len(self._file)

    def __repr__(self) -> str:
        file = self._file
        return (
            f"{type(self).__name__}({str(file.path)!r}, images={str(self._images)!r}, "
            f"records={len(file)}, bytes={file.size}, crc={file.crc:08x})"
        )

    def origin(self, index: int) -> str:
        """``path:line`` of record `index`."""
        return self._file.origin(index)

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = index.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self._file.path}")
        index %= len(self)
        record, origin = self._file.read(index), self.origin(index)
        return Example(turns=self._turns(record, origin), id=str(record.get("id", index)), origin=origin)

    def _turns(self, record: dict[str, Any], origin: str) -> tuple[Turn, ...]:
        raise NotImplementedError


class LlavaJson(_FileSource):
    """LLaVA conversations: ``{"id", "image": path | [paths], "conversations": [{"from": "human"|"gpt", "value"}]}``.

    Args:
      path: a .json list or a .jsonl file.
      images: folder that image paths start from; default the file's own.

    ``<image>`` in a value is the file format's mark for a picture; the marks of all turns together must be as many as
    the pictures. As in the authors' code a turn with one mark has its picture first, wherever the mark stands; several
    marks keep their places. The line break beside a mark is the template's to write. Every error is a `DataError` that
    starts with ``path:line``. Source: LLaVA, train.py, `preprocess_multimodal`; LLaVA-NeXT for several pictures.
    """

    def _turns(self, record: dict[str, Any], origin: str) -> tuple[Turn, ...]:
        pictures = _picture_list(record.get("image"), "image", self._images, origin)
        spoken = []
        for number, turn in enumerate(_list(record, "conversations", origin)):
            where = f"{origin}: conversations[{number}]"
            role = _choice(turn, "from", {"human": "user", "gpt": "assistant", "system": "system"}, where)
            if not isinstance(turn.get("value"), str):
                raise DataError(f"{where}: 'value' must be text, this is {_kind(turn.get('value'))}")
            spoken.append((role, turn["value"].split(PLACEHOLDER)))
        marks = sum(len(parts) - 1 for _, parts in spoken)
        _same_count(marks, len(pictures), f"{PLACEHOLDER} in 'conversations'", "'image'", origin)
        queue = iter(pictures)
        return tuple(Turn(role=role, segments=_interleave(parts, queue)) for role, parts in spoken)


class Messages(_FileSource):
    """OpenAI-style messages: ``{"messages": [{"role", "content": text | [parts]}], "images": [...]}``, one a line.

    Parts: ``{"type": "text", "text"}``; ``{"type": "image_url", "image_url": {"url"}}``; ``{"type": "image", "image"}``
    or, bare, ``{"type": "image"}``, which takes the next entry of ``images``. A picture is a path under `images`
    (default the file's own folder) or a ``data:`` URL. Text stays the characters that it is, ``<image>`` included.
    Every error is a `DataError` that starts with ``path:line``.
    """

    def _turns(self, record: dict[str, Any], origin: str) -> tuple[Turn, ...]:
        column = _picture_list(record.get("images"), "images", self._images, origin)
        queue, bare, turns = iter(column), 0, []
        for number, message in enumerate(_list(record, "messages", origin)):
            where = f"{origin}: messages[{number}]"
            role = _choice(message, "role", {r: r for r in ("system", "user", "assistant")}, where)
            segments: list[Segment] = []
            for part in self._parts(message.get("content"), where):
                if part == {"type": "image"}:
                    bare += 1
                    segments += [next(queue)] if bare <= len(column) else []
                else:
                    segments.append(self._segment(part, where))
            turns.append(Turn(role=role, segments=tuple(segments)))
        _same_count(bare, len(column), '{"type": "image"} parts in \'messages\'', "'images'", origin)
        return tuple(turns)

    def _parts(self, content: Any, where: str) -> list[dict[str, Any]]:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            # Tables exported line by line write every column: a null stands for an absent key.
            return [{key: value for key, value in part.items() if value is not None} for part in content]
        raise DataError(f"{where}: 'content' must be text or a list of parts, this is {_kind(content)}")

    def _segment(self, part: dict[str, Any], where: str) -> Segment:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return Text(part["text"])
        if kind == "image_url":
            url = part.get("image_url")
            return _picture(url.get("url") if isinstance(url, dict) else url, "image_url", self._images, where)
        if kind == "image":
            value = next((part[key] for key in ("image", "path", "url") if key in part), None)
            return _picture(value, "image", self._images, where)
        if kind == "text":
            raise DataError(f"{where}: a text part needs 'text' with a string, this is {_kind(part.get('text'))}")
        raise DataError(f"{where}: unknown part type {kind!r}; valid: 'text', 'image_url', 'image'")


def _interleave(parts: Sequence[str], pictures: Any) -> tuple[Segment, ...]:
    """The text between the marks and the pictures at them; the line break beside a mark belongs to the mark."""
    if len(parts) == 2:
        parts = ("", "".join(parts).strip())
    segments: list[Segment] = []
    for number, part in enumerate(parts):
        if number:
            segments.append(next(pictures))
            part = part.removeprefix("\n")
        if number < len(parts) - 1:
            part = part.removesuffix("\n")
        if part:
            segments.append(Text(part))
    return tuple(segments)


def _picture_list(value: Any, field: str, root: Path, origin: str) -> list[Image]:
    """The pictures that a record's own field names: nothing, one, or a list of them."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_picture(item, field, root, origin) for item in values]


def _picture(value: Any, field: str, root: Path, where: str) -> Image:
    """A path under `root` or the bytes of a ``data:`` URL; anything else, and any way out of `root`, is refused."""
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {field!r} must hold a path or a data: URL, this is {_kind(value)}")
    if value.startswith("data:"):
        return Image(_data_url(value, field, where))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", value):
        raise DataError(
            f"{where}: {field!r} is {value[:80]!r}: nothing is fetched from the network while training; "
            "download the picture and give its path, or embed it as a data: URL"
        )
    parts = PurePosixPath(value.replace("\\", "/")).parts
    if ".." in parts or re.match(r"[/\\]|[A-Za-z]:", value) or "\0" in value:
        raise DataError(
            f"{where}: {field!r} is {value!r}, which leaves the picture folder {str(root)!r}; "
            "give a path inside it, without a leading '/' and without '..'"
        )
    return Image(str(root / value))


def _data_url(url: str, field: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where}: {field!r} is a data: URL without ';base64,'; write data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: {field!r} is a data: URL whose base64 does not decode ({error})") from None


def _same_count(marks: int, pictures: int, mark: str, field: str, origin: str) -> None:
    if marks == pictures:
        return
    fix = f"add {mark} where each picture stands" if marks < pictures else f"name the missing pictures in {field}"
    raise DataError(f"{origin}: {marks} x {mark} but {pictures} picture(s) in {field}; {fix}, or remove the surplus")


def _list(record: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    value = record.get(field)
    if field not in record:
        raise DataError(f"{origin}: no field {field!r}; this record has {sorted(record)}")
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{origin}: {field!r} must be a list with at least one turn, this is {_kind(value)}")
    return value


def _choice(turn: dict[str, Any], field: str, valid: dict[str, Any], where: str) -> Any:
    value = turn.get(field)
    if not isinstance(value, str) or value not in valid:
        raise DataError(f"{where}: {field!r} is {value!r}; valid: {', '.join(map(repr, valid))}")
    return valid[value]


def _kind(value: Any) -> str:
    """What a JSON value is, in a user's words."""
    names = {type(None): "missing or null", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, str):
        return "empty text" if not value else f"text ({value[:40]!r})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return names.get(type(value), type(value).__name__)
