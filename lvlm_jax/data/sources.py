"""Conversations by number: what every source offers, and those of LLaVA JSON/JSONL and OpenAI-style messages JSONL.

A source is opened once (an index, one checksum) and each record is read when asked for, so that it is small, travels to
worker processes cheaply, and one bad record costs nothing until somebody reads it.
"""

import dataclasses
import os
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from etils import epath

from lvlm_jax.data.conversations import Find, llava_turns, message_turns, picture_under, videochat_turns
from lvlm_jax.data.records import RecordFile
from lvlm_jax.processing.schema import Example, Turn


@runtime_checkable
class Source(Protocol):
    """Conversations by number.

    `repr(source)` names the content (path, size, checksum, count): caches and grain's resume check compare it.
    `origin(i)` says where record i stands (``train.json:12``) without reading it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def origin(self, index: int, /) -> str: ...


class Numbered:
    """What sources share: numbers from 0, from the end where negative, numpy's too; `_example` reads one record."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: SupportsIndex) -> Example:
        index = index.__index__()
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self!r}")
        return self._example(index % len(self))

    def _example(self, index: int) -> Example:
        raise NotImplementedError


class _FileSource(Numbered):
    """A `Source` over a `RecordFile`; subclasses say how a record becomes an `Example`."""

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike | None = None):
        self._file = RecordFile(path)
        self._images = epath.Path(images) if images is not None else self._file.path.parent

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

    def _example(self, index: int) -> Example:
        record, origin = self._file.read(index), self.origin(index)
        turns = self._turns(record, picture_under(self._images), origin)
        return Example(turns=turns, id=str(record.get("id", index)), origin=origin)

    def _turns(self, record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
        raise NotImplementedError


class LlavaJson(_FileSource):
    """LLaVA conversations: ``{"id", "image": path | [paths], "conversations": [{"from": "human"|"gpt", "value"}]}``.

    Args:
      path: a .json list or a .jsonl file.
      images: folder that image paths start from; default the file's own.

    `conversations.llava_turns` says how marks and pictures meet. Every error is a `DataError` that starts with
    ``path:line``.
    """

    def _turns(self, record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
        return llava_turns(record, find, origin)


class Messages(_FileSource):
    """OpenAI-style messages: ``{"messages": [{"role", "content": text | [parts]}], "images": [...]}``, one a line.

    A picture is a path under `images` (default the file's own folder) or a ``data:`` URL. `conversations.message_turns`
    lists the parts. Every error is a `DataError` that starts with ``path:line``.
    """

    def _turns(self, record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
        return message_turns(record, find, origin)


class VideoChatJson(_FileSource):
    """VideoChat's conversations: ``{"video" or "image": path, "QA": [{"q", "a"}]}``, one about each picture or video.

    Arguments and errors as for `LlavaJson`; `conversations.videochat_turns` says what becomes of a record.
    """

    def _turns(self, record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
        return videochat_turns(record, find, origin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoChatFiles:
    """The recipe's fields of `VideoChatJson`."""

    path: str
    images: str = ""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return VideoChatJson(self.path, images=self.images or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaJsonFiles:
    """The recipe's fields of `LlavaJson`."""

    path: str
    images: str = ""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return LlavaJson(self.path, images=self.images or None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MessagesFiles:
    """The recipe's fields of `Messages`."""

    path: str
    images: str = ""

    def open(self, cache: str | os.PathLike | None = None, on_bad: str = "raise") -> Source:
        """The source."""
        return Messages(self.path, images=self.images or None)
