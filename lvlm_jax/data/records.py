"""The records of a JSON list or a JSONL file by number: indexed once, each parsed when asked for."""

import json
import os
import re
import zlib
from typing import Any

import numpy as np
from etils import epath

from lvlm_jax.data.conversations import kind_of
from lvlm_jax.processing.encode import DataError

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


class RecordFile:
    """The records of a JSON list or a JSONL file, by number; a file that starts with ``[`` is a list.

    Raises:
      DataError: no such file, an empty file, text that is not UTF-8, or a JSON list broken at some line.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = epath.Path(path)
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
        """``path:line`` of record `index`, with its number in the file where a line holds several."""
        line = self._lines[index]
        beside = [i for i in (index - 1, index + 1) if 0 <= i < len(self._lines) and self._lines[i] == line]
        return f"{self.path}:{line}" + (f" (record {index})" if beside else "")

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
            raise DataError(f"{origin}: a record must be a JSON object {{...}}, this is {kind_of(record)}")
        return record


def _index_lines(path: epath.Path, data: bytes, base: int) -> list[tuple[int, int, int]]:
    """(first byte, byte past the end, line number) of every line that is not blank."""
    table, start, line = [], base, 1
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if data[start:stop].strip():
            table.append((start, stop, line))
        start, line = stop + 1, line + 1
    return table


def _index_list(path: epath.Path, data: bytes, base: int) -> list[tuple[int, int, int]]:
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
