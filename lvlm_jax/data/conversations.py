"""How a record of any file (a JSON object, a row of a table, a member of a tar) becomes the turns of an `Example`.

One function a layout, told apart by the field that holds the talk. Every error is a `DataError` that starts with where
the record stands.
"""

import base64
import binascii
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from lvlm_jax.data.senses import sensed, source
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import Image, Segment, Shown, Text, Turn, Video

PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
"""The LLaVA file format's own marks for a picture and a video. They mean nothing anywhere else."""

Find = Callable[[Any, str, str], Image]
"""(what a field holds, the field's name, where it stands) -> the picture; DataError for what is none. The file of a
video is found in the same way."""


def turns_of(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """The turns of a record in any of the `LAYOUTS`, by the first of their fields that it has."""
    for field, read in LAYOUTS.items():
        if record.get(field) is not None:
            return read(record, find, origin)
    raise DataError(f"{origin}: none of the fields {', '.join(LAYOUTS)}; this record has {sorted(record)}")


def llava_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """``{"image": picture | [pictures], "video": ..., "conversations": [{"from": "human"|"gpt", "value"}]}``.

    ``<image>`` in a value is the file format's mark for a picture; the marks of all turns together must be as many as
    the pictures. As in the authors' code a turn with one mark has its picture first, wherever the mark stands; several
    marks keep their places. The line break beside a mark is the template's to write. In a record with a video
    ``<video>`` is its mark and, where there is no picture, ``<image>`` too, as LLaVA-Video's files have it. What
    ``"senses": {name: source | [sources]}`` holds for a named sense stands where ``<name>`` does (`senses.sensed`).
    Source: LLaVA, train.py, `preprocess_multimodal`; LLaVA-NeXT for several pictures.
    """
    pictures, field = _column(record, find, origin)
    videos, video_field = _videos(record, find, origin)
    marks = {PLACEHOLDER: iter(pictures)} if pictures or not videos else {PLACEHOLDER: iter(videos)}
    if videos:
        marks[VIDEO_PLACEHOLDER] = iter(videos) if pictures else marks[PLACEHOLDER]
    named = sensed(record, find, origin)
    marks |= {f"<{name}>": iter(shown) for name, shown in named.items()}
    split = re.compile(f"({'|'.join(map(re.escape, marks))})")
    spoken = []
    for number, turn in enumerate(list_of(record, "conversations", origin)):
        where = f"{origin}: conversations[{number}]"
        role = _choice(turn, "from", {"human": "user", "gpt": "assistant", "system": "system"}, where)
        if not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: 'value' must be text, this is {kind_of(turn.get('value'))}")
        spoken.append((role, split.split(turn["value"])))
    found = [part for _, parts in spoken for part in parts[1::2]]
    if pictures or not videos:
        _same_count(found.count(PLACEHOLDER), len(pictures), f"{PLACEHOLDER} in 'conversations'", f"{field!r}", origin)
    for name, shown in named.items():
        mark = f"<{name}> in 'conversations'"
        _same_count(found.count(f"<{name}>"), len(shown), mark, f"'senses.{name}'", origin, "source")
    if videos:
        both = found.count(PLACEHOLDER) + found.count(VIDEO_PLACEHOLDER)
        count = found.count(VIDEO_PLACEHOLDER) if pictures else both
        mark = f"{VIDEO_PLACEHOLDER} in 'conversations'"
        _same_count(count, len(videos), mark, f"{video_field!r}", origin, "video")
    return tuple(Turn(role=role, segments=_interleave(parts, marks)) for role, parts in spoken)


def message_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """OpenAI-style ``{"messages": [{"role", "content": text | [parts]}], "images": [...], "videos": [...]}``.

    Parts: ``{"type": "text", "text"}``; ``{"type": "image_url", "image_url": {"url"}}``; ``{"type": "image", "image"}``
    or, bare, ``{"type": "image"}``, which takes the next entry of ``images``; the same of ``video``. A named sense's
    are ``{"type": "features", "features", "sense"}``, with the ``key`` of an array in an .npz file, and pictures and
    videos with a ``sense``. Text stays the characters that it is, ``<image>`` included.
    """
    columns = {"image": _column(record, find, origin, first="images"), "video": _videos(record, find, origin, "videos")}
    queues, bare, turns = {kind: iter(column) for kind, (column, _) in columns.items()}, [], []
    for number, message in enumerate(list_of(record, "messages", origin)):
        where = f"{origin}: messages[{number}]"
        role = _choice(message, "role", {r: r for r in ("system", "user", "assistant")}, where)
        segments: list[Segment] = []
        for part in _parts(message.get("content"), where):
            kind = part.get("type")
            if kind in queues and not part.keys() & {kind, "path", "url"}:
                bare.append(kind)
                segments += [one for one in [next(queues[kind], None)] if one is not None]
            else:
                segments.append(_segment(part, find, where))
        turns.append(Turn(role=role, segments=tuple(segments)))
    for kind, (column, field) in columns.items():
        mark = f'{{"type": "{kind}"}} parts in \'messages\''
        _same_count(bare.count(kind), len(column), mark, f"{field!r}", origin, "picture" if kind == "image" else kind)
    return tuple(turns)


def cauldron_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """``{"images": [pictures], "texts": [{"user", "assistant"}]}``: all pictures before the first question.

    ``videos`` follow the pictures.

    Source: HuggingFaceM4/the_cauldron.
    """
    segments: list[Segment] = list(_shown(record, find, origin))
    turns = []
    for number, pair in enumerate(list_of(record, "texts", origin)):
        for role in ("user", "assistant"):
            if not isinstance(pair.get(role), str):
                raise DataError(f"{origin}: texts[{number}]: {role!r} must be text, this is {kind_of(pair.get(role))}")
            turns.append(Turn(role=role, segments=(*segments, Text(pair[role]))))
            segments = []
    return tuple(turns)


def question_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """``{"image" or "video", "question": text, "answer": text | [texts]}``: the commonest of several answers."""
    answer = record.get("answer", record.get("answers"))
    if isinstance(answer, list) and answer and all(isinstance(item, str) for item in answer):
        answer = max(answer, key=answer.count)
    for field, value in (("question", record.get("question")), ("answer", answer)):
        if not isinstance(value, str):
            raise DataError(f"{origin}: {field!r} must be text, this is {kind_of(value)}")
    asked = (*_shown(record, find, origin), Text(record["question"]))
    return Turn(role="user", segments=asked), Turn(role="assistant", segments=(Text(answer),))


def caption_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """``{"image" or "video", "caption": text}``: the user shows the picture, the assistant says the caption."""
    if not isinstance(record["caption"], str) or not record["caption"].strip():
        raise DataError(f"{origin}: 'caption' must be text, this is {kind_of(record['caption'])}")
    shown = _shown(record, find, origin)
    if not shown:
        raise DataError(
            f"{origin}: a caption without a picture; its column is 'image' or 'images', of videos 'video' or 'videos', "
            "or say with rename"
        )
    return Turn(role="user", segments=shown), Turn(role="assistant", segments=(Text(record["caption"]),))


def videochat_turns(record: dict[str, Any], find: Find, origin: str) -> tuple[Turn, ...]:
    """``{"video" or "image", "QA": [{"i", "q", "a"}]}``: shown before the first question; ``i`` is the system text.

    Source: Ask-Anything (VideoChat, VideoChat2), it_dataset.py.
    """
    pairs = list_of(record, "QA", origin)
    for number, pair in enumerate(pairs):
        for field in ("q", "a"):
            if not isinstance(pair.get(field), str):
                raise DataError(f"{origin}: QA[{number}]: {field!r} must be text, this is {kind_of(pair.get(field))}")
    shown, turns = _shown(record, find, origin), []
    if isinstance(pairs[0].get("i"), str) and pairs[0]["i"]:
        turns.append(Turn(role="system", segments=(Text(pairs[0]["i"]),)))
    for pair in pairs:
        asked = (*shown, Text(pair["q"])) if pair["q"] else shown
        turns += [Turn(role="user", segments=asked), Turn(role="assistant", segments=(Text(pair["a"]),))]
        shown = ()
    return tuple(turns)


LAYOUTS: dict[str, Callable[[dict[str, Any], Find, str], tuple[Turn, ...]]] = {
    "conversations": llava_turns,
    "messages": message_turns,
    "texts": cauldron_turns,
    "QA": videochat_turns,
    "question": question_turns,
    "caption": caption_turns,
}
"""Field that holds the talk -> how it is read; the first that a record has decides."""


PICTURES, VIDEOS = ("image", "images"), ("video", "videos")
"""The fields that hold them."""


def table_fields(rename: Mapping[str, str]) -> tuple[str, ...]:
    """The columns of a table that make a record; a talk that is named in `rename` is the one that is read."""
    talks = [field for field in LAYOUTS if field in rename] or [*LAYOUTS]
    return ("id", *PICTURES, *VIDEOS, "senses", *talks, "answer", "answers")


def picture_under(root: epath.Path) -> Find:
    """Pictures as a JSON record names them: a path under `root` or a ``data:`` URL.

    Anything else, and any way out of `root`, is refused.
    """
    return lambda value, field, where: _by_name(value, field, root, where)


def picture_inside(root: epath.Path) -> Find:
    """Pictures as a table holds them: bytes, ``{"bytes", "path"}`` (bytes first), or as `picture_under` says."""

    def find(value: Any, field: str, where: str) -> Image:
        if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return Image(value)
        return _by_name(value, field, root, where)

    return find


def _by_name(value: Any, field: str, root: epath.Path, where: str) -> Image:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {field!r} must hold a path or a data: URL, this is {kind_of(value)}")
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
    return Image(str(root / value), under=str(root))


def _data_url(url: str, field: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{where}: {field!r} is a data: URL without ';base64,'; write data:image/png;base64,...")
    return decode_base64(body, f"{where}: {field!r} is a data: URL whose base64")


def decode_base64(body: str, what: str) -> bytes:
    """The bytes; DataError begins with `what`."""
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{what} does not decode ({error})") from None


def _column(record: dict[str, Any], find: Find, origin: str, first: str = "image") -> tuple[list[Image], str]:
    """(the pictures of a record's own field, its name): nothing, one, or a list of them."""
    second = {"image": "images", "images": "image", "video": "videos", "videos": "video"}[first]
    field = second if record.get(first) is None and record.get(second) is not None else first
    value = record.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [find(item, field, origin) for item in values], field


def _videos(record: dict[str, Any], find: Find, origin: str, first: str = "video") -> tuple[list[Video], str]:
    """The same of its videos."""
    found, field = _column(record, find, origin, first)
    return [_moving(image) for image in found], field


def _moving(found: Image) -> Video:
    return Video(found.source, under=found.under, sense=found.sense)


def _shown(record: dict[str, Any], find: Find, origin: str) -> tuple[Shown | Video, ...]:
    """All pictures of a record, then its videos, then what its named senses read."""
    named = [one for shown in sensed(record, find, origin).values() for one in shown]
    return (*_column(record, find, origin)[0], *_videos(record, find, origin)[0], *named)


def _interleave(parts: list[str], marks: Mapping[str, Iterator[Shown | Video]]) -> tuple[Segment, ...]:
    """Texts, and between them what their marks stand for; the line break beside a mark belongs to the mark."""
    if len(parts) == 3:
        parts = ["", parts[1], (parts[0] + parts[2]).strip()]
    segments: list[Segment] = []
    for number, part in enumerate(parts):
        if number % 2:
            segments.append(next(marks[part]))
            continue
        if number:
            part = part.removeprefix("\n")
        if number < len(parts) - 1:
            part = part.removesuffix("\n")
        if part:
            segments.append(Text(part))
    return tuple(segments)


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        # Tables write every column: a null stands for an absent key.
        return [{key: value for key, value in part.items() if value is not None} for part in content]
    raise DataError(f"{where}: 'content' must be text or a list of parts, this is {kind_of(content)}")


def _segment(part: dict[str, Any], find: Find, where: str) -> Segment:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind in ("image_url", "video_url"):
        url = part.get(kind)
        found = find(url.get("url") if isinstance(url, dict) else url, kind, where)
        return found if kind == "image_url" else _moving(found)
    if kind in ("image", "video"):
        found = find(next((part[key] for key in (kind, "path", "url") if key in part), None), kind, where)
        found = dataclasses.replace(found, sense=_sense_of(part, where)) if "sense" in part else found
        return found if kind == "image" else _moving(found)
    if kind == "features":
        return source(part.get("features"), _sense_of(part, where), find, kind, where, str(part.get("key", "")))
    if kind == "text":
        raise DataError(f"{where}: a text part needs 'text' with a string, this is {kind_of(part.get('text'))}")
    valid = "'text', 'image_url', 'image', 'video_url', 'video', 'features'"
    raise DataError(f"{where}: unknown part type {kind!r}; valid: {valid}")


def _sense_of(part: dict[str, Any], where: str) -> str:
    if not isinstance(part.get("sense"), str) or not part["sense"]:
        raise DataError(f"{where}: 'sense' must name one of the model's senses, this is {kind_of(part.get('sense'))}")
    return part["sense"]


def _same_count(marks: int, pictures: int, mark: str, field: str, origin: str, kind: str = "picture") -> None:
    if marks == pictures:
        return
    fix = f"add {mark} where each {kind} stands" if marks < pictures else f"name the missing {kind}s in {field}"
    raise DataError(f"{origin}: {marks} x {mark} but {pictures} {kind}(s) in {field}; {fix}, or remove the surplus")


def list_of(record: dict[str, Any], field: str, origin: str) -> list[dict[str, Any]]:
    """A record's list of objects; DataError for a missing field, another value, or an empty list."""
    value = record.get(field)
    if field not in record:
        raise DataError(f"{origin}: no field {field!r}; this record has {sorted(record)}")
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{origin}: {field!r} must be a list with at least one turn, this is {kind_of(value)}")
    return value


def _choice(turn: dict[str, Any], field: str, valid: dict[str, Any], where: str) -> Any:
    value = turn.get(field)
    if not isinstance(value, str) or value not in valid:
        raise DataError(f"{where}: {field!r} is {value!r}; valid: {', '.join(map(repr, valid))}")
    return valid[value]


def kind_of(value: Any) -> str:
    """What a JSON value is, in a user's words."""
    names = {type(None): "missing or null", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    if isinstance(value, str):
        return "empty text" if not value else f"text ({value[:40]!r})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return names.get(type(value), type(value).__name__)
