"""What a user hands over, as an `Example`: a text, a list of messages, or a list of texts and pictures."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.schema import Example, Image, Segment, Text, Turn

ROLES = ("system", "user", "assistant")


def as_images(images: Any) -> tuple[Image, ...]:
    """One picture or several (a path, bytes, a PIL image, an array, an `Image`) as `Image`s. None is no picture."""
    if images is None:
        return ()
    several = isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike | np.ndarray)
    several = several and not hasattr(images, "getbands")  # a PIL image counts as one
    if isinstance(images, np.ndarray) and images.ndim == 4:
        several = True
    return tuple(map(_image, images)) if several else (_image(images),)


def as_example(prompt: Any, images: Any = None, system: str | None = None) -> Example:
    """A conversation whose last turn the model is to answer.

    Args:
      prompt: a text (the pictures go before it); a list of texts and pictures in order (a path there is a `pathlib`
        path, since a str is text); a list of messages ``{"role", "content"}`` or `Turn`s; or an `Example`.
      images: pictures that the prompt does not hold itself. Messages place them by parts ``{"type": "image"}`` without
        a source; with no such part they go before the last user message.
      system: text of the system turn, instead of the template's.

    Raises:
      ValueError: a prompt of another form, a role or part that there is not, more pictures than places or the reverse.
    """
    pictures = as_images(images)
    if isinstance(prompt, Example):
        turns = prompt.turns
    elif isinstance(prompt, str):
        turns = (Turn("user", (Text(prompt),)),)
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping | Turn) for m in prompt):
        turns, pictures = _messages(prompt, pictures)
    elif isinstance(prompt, Sequence) and prompt and not isinstance(prompt, bytes):
        turns = (Turn("user", tuple(Text(s) if isinstance(s, str) else _segment(s) for s in prompt)),)
    else:
        raise ValueError(
            f"prompt: {type(prompt).__name__} is no prompt; give a text, a list of texts and pictures, or a list of "
            '{"role": ..., "content": ...} messages'
        )
    if pictures:
        turns = _before_last_question(turns, pictures)
    if system is not None:
        turns = (Turn("system", (Text(system),)), *(turn for turn in turns if turn.role != "system"))
    if isinstance(prompt, Example):
        return Example(turns, prompt.id, prompt.origin)
    return Example(turns, origin="prompt")


def _image(source: Any) -> Image:
    if isinstance(source, Image):
        return source
    return Image(os.fspath(source) if isinstance(source, os.PathLike) else source)


def _segment(value: Any) -> Segment:
    if isinstance(value, Text):
        return value
    if isinstance(value, Image | os.PathLike | np.ndarray | bytes) or hasattr(value, "getbands"):
        return _image(value)
    raise ValueError(
        f"prompt: {type(value).__name__} among the segments; a segment is a text (str) or a picture (a pathlib path, a "
        "PIL image, a uint8 array, bytes)"
    )


def _before_last_question(turns: tuple[Turn, ...], pictures: tuple[Image, ...]) -> tuple[Turn, ...]:
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not asked:
        raise ValueError("prompt: there is no user turn to put the pictures in")
    last = turns[asked[-1]]
    return (*turns[: asked[-1]], Turn("user", (*pictures, *last.segments)), *turns[asked[-1] + 1 :])


def _messages(messages: Sequence[Any], pictures: tuple[Image, ...]) -> tuple[tuple[Turn, ...], tuple[Image, ...]]:
    """(turns with their placeholders filled, pictures that no placeholder asked for because there is none)."""
    told: list[tuple[str, list[Segment | None]]] = []
    for number, message in enumerate(messages):
        if isinstance(message, Turn):
            told.append((message.role, list(message.segments)))
            continue
        where = f"messages[{number}]"
        if message.get("role") not in ROLES:
            raise ValueError(f"{where}.role: {message.get('role')!r} is not one of {', '.join(ROLES)}")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise ValueError(f"{where}.content: {type(content).__name__}; give a text or a list of parts")
        told.append((message["role"], [_part(part, where) for part in parts]))
    places = sum(segment is None for _, segments in told for segment in segments)
    if places and places != len(pictures):
        raise ValueError(
            f"messages hold {places} place(s) for a picture, but images has {len(pictures)}; give one each"
        )
    rest = iter(pictures)
    turns = tuple(
        Turn(role, tuple(next(rest) if segment is None else segment for segment in segments)) for role, segments in told
    )
    return turns, tuple(rest)


def _part(part: Any, where: str) -> Segment | None:
    """One part of a message; None for a picture that is to come from `images`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return None if source is None else _image(source)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return _image(url)
    raise ValueError(
        f"{where}.content: {part!r:.80} is no part; parts are "
        '{"type": "text", "text": ...}, {"type": "image", "image": ...} and '
        '{"type": "image_url", "image_url": {"url": ...}}'
    )
