"""What a user hands over, as an `Example`: a text, a list of messages, or a list of texts, pictures and videos."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lvlm_jax.processing.schema import Example, Features, Image, Segment, Text, Turn, Video

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


def as_videos(videos: Any) -> tuple[Video, ...]:
    """One video or several (a path, bytes, a `Video`, which an array of frames must be) as `Video`s. None is none."""
    if videos is None:
        return ()
    several = isinstance(videos, Iterable) and not isinstance(videos, str | bytes | os.PathLike | np.ndarray)
    return tuple(map(_video, videos)) if several else (_video(videos),)


def as_features(features: Any) -> tuple[Features | Image, ...]:
    """``{sense: source}``, or a list of sources for a sense, as what named senses read. None is none.

    A source is an array float[n, C], the path of a .npy or .npz file, or of a picture for a sense that sees.
    """
    if features is None:
        return ()
    if not isinstance(features, Mapping):
        raise ValueError(f"features: {type(features).__name__}; give {{sense: features}}, such as {{'audio': 'a.npy'}}")
    several = {name: value if isinstance(value, list | tuple) else [value] for name, value in features.items()}
    return tuple(_sensed(one, name) for name, values in several.items() for one in values)


def _sensed(source: Any, sense: str) -> Features | Image:
    if isinstance(source, Features | Image):
        return dataclasses.replace(source, sense=sense)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return Features(path, sense) if path.endswith((".npy", ".npz")) else Image(path, sense=sense)
    if not hasattr(source, "__array__") or hasattr(source, "getbands"):
        raise ValueError(f"features[{sense!r}]: {type(source).__name__}; give a path, or an array float[n, C]")
    return Features(np.asarray(source), sense)


def as_example(
    prompt: Any,
    images: Any = None,
    system: str | None = None,
    videos: Any = None,
    features: Any = None,
) -> Example:
    """A conversation whose last turn the model is to answer.

    Args:
      prompt: a text (the pictures go before it); a list of texts, pictures and `Video`s in order (a path there is a
        `pathlib` path, of a picture, since a str is text); a list of messages ``{"role", "content"}`` or `Turn`s; or an
        `Example`.
      images: pictures that the prompt does not hold itself. Messages place them by parts ``{"type": "image"}`` without
        a source; with no such part they go before the last user message.
      system: text of the system turn, instead of the template's.
      videos: the same of videos and ``{"type": "video"}``; they follow the pictures.
      features: what named senses read, as `as_features` takes it; it follows those, before the last question.

    Raises:
      ValueError: a prompt of another form, a role or part that there is not, more pictures than places or the reverse.
    """
    pictures: tuple[Image | Video, ...] = (*as_images(images), *as_videos(videos))
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
    if shown := (*pictures, *as_features(features)):
        turns = _before_last_question(turns, shown)
    if system is not None:
        turns = (Turn("system", (Text(system),)), *(turn for turn in turns if turn.role != "system"))
    if isinstance(prompt, Example):
        return Example(turns, prompt.id, prompt.origin)
    return Example(turns, origin="prompt")


def _image(source: Any) -> Image:
    if isinstance(source, Image):
        return source
    return Image(os.fspath(source) if isinstance(source, os.PathLike) else source)


def _video(source: Any) -> Video:
    if isinstance(source, Video):
        return source
    return Video(os.fspath(source) if isinstance(source, os.PathLike) else source)


def _segment(value: Any) -> Segment:
    if isinstance(value, Text | Video | Features):
        return value
    if isinstance(value, Image | os.PathLike | np.ndarray | bytes) or hasattr(value, "getbands"):
        return _image(value)
    raise ValueError(
        f"prompt: {type(value).__name__} among the segments; a segment is a text (str), a picture (a pathlib path, a "
        "PIL image, a uint8 array, bytes), a Video or Features"
    )


def _before_last_question(turns: tuple[Turn, ...], pictures: tuple[Image | Video | Features, ...]) -> tuple[Turn, ...]:
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not asked:
        raise ValueError("prompt: there is no user turn to put the pictures in")
    last = turns[asked[-1]]
    return (*turns[: asked[-1]], Turn("user", (*pictures, *last.segments)), *turns[asked[-1] + 1 :])


def _messages(
    messages: Sequence[Any], shown: tuple[Image | Video, ...]
) -> tuple[tuple[Turn, ...], tuple[Image | Video, ...]]:
    """(turns with their placeholders filled, pictures and videos that no placeholder asked for as there is none)."""
    told: list[tuple[str, list[Segment | type]]] = []
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
    taken = {}
    for kind, name in ((Image, "picture"), (Video, "video")):
        given = [one for one in shown if isinstance(one, kind)]
        places = sum(segment is kind for _, segments in told for segment in segments)
        if places and places != len(given):
            field = "images" if kind is Image else "videos"
            raise ValueError(
                f"messages hold {places} place(s) for a {name}, but {field} has {len(given)}; give one each"
            )
        taken[kind] = iter(given if places else ())
        shown = tuple(one for one in shown if not (places and isinstance(one, kind)))
    turns = tuple(
        Turn(role, tuple(next(taken[one]) if isinstance(one, type) else one for one in segments))
        for role, segments in told
    )
    return turns, shown


def _part(part: Any, where: str) -> Segment | type:
    """One part of a message; `Image` or `Video` itself for one that is to come from ``images`` or ``videos``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "features" and isinstance(part.get("sense"), str) and part.get("features") is not None:
        return _sensed(part["features"], part["sense"])
    made = {"image": (Image, _image), "video": (Video, _video)}
    if kind in made:
        source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
        if source is None:
            return made[kind][0]
        return dataclasses.replace(made[kind][1](source), sense=part.get("sense", ""))
    if kind in ("image_url", "video_url"):
        url = part.get(kind)
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str):
            return made[kind.removesuffix("_url")][1](url)
    raise ValueError(
        f"{where}.content: {part!r:.80} is no part; parts are "
        '{"type": "text", "text": ...}, {"type": "image", "image": ...}, {"type": "video", "video": ...}, '
        '{"type": "image_url", "image_url": {"url": ...}} and {"type": "features", "features": ..., "sense": ...}'
    )
