"""A conversation to ids, loss weights and picture positions, built together from one list of pieces."""

import bisect
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm_jax.processing.chat_templates import Template
from lvlm_jax.processing.frames import DEFAULT, VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.instruction import Instruction
from lvlm_jax.processing.picture import MAX_PIXELS, picture_size
from lvlm_jax.processing.pieces import BOS, EOS, Piece
from lvlm_jax.processing.schema import TAPS, TEXT, Blend, Clip, Encoded, Example, Features, Image, Placed, Shown, Turn
from lvlm_jax.processing.senses import SenseSpec, place
from lvlm_jax.processing.shared_rows import Shared
from lvlm_jax.processing.tiles import Span, span, whole
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.processing.video import chosen


class DataError(ValueError):
    """A record that cannot be used: the message names its origin, the field and the fix."""


def encode(
    example: Example,
    template: Template,
    tokenizer: Tokenizer,
    visual_tokens: int,
    image_token_id: int,
    generate: bool = False,
    max_length: int | None = None,
    embedding_size: int | None = None,
    spec: ImageSpec | None = None,
    video: VideoSpec = DEFAULT,
    instruction: Instruction | None = None,
    senses: Mapping[str, SenseSpec] | None = None,
) -> Encoded:
    """Write `example` down by `template`: ids, the weight of each as a target, and which visual token fills it.

    Every picture takes `visual_tokens` positions that hold `image_token_id` at weight 0 (none when 0), or with a `spec`
    that cuts tiles, or keeps a picture's own resolution, as many as its width and height ask for (its header is read,
    nothing is decoded). Of a video the frames that `video` chooses are pictures, by its header too, and its sentence
    follows them. `instruction` writes down what the connector reads beside each picture, where it reads anything.
    `senses` says how the segments of named senses are read, which take positions of their own. `generate` gives the
    prompt up to where the assistant begins, all weights 0. `max_length` drops trailing text only, after a whole answer
    where one fits. Raises DataError: roles out of order, no answer, no trained token, an id outside the
    `embedding_size` rows of the embedding, a text too long to cut without losing a picture.
    """
    try:
        shown = chosen(example, video, MAX_PIXELS if spec is None else spec.max_pixels)
        pieces = template.render(_whole_pictures(shown.turns, spec), generate)
        encoded = _assemble(pieces, tokenizer, visual_tokens, image_token_id, spec, video, senses or {})
        if instruction is not None:
            said = instruction.beside(shown.turns, len(encoded.images))
            encoded = dataclasses.replace(encoded, instructions=said)
    except ValueError as error:
        raise DataError(f"{_where(example)}: {error}") from error
    # Nothing stands before the first token: packed, it would be predicted from the example to the left.
    encoded.weights[: None if generate else 1] = 0
    _check_ids(encoded, example, embedding_size)
    if not generate and not (encoded.weights > 0).any():
        raise DataError(f"{_where(example)}: turns: not one token to learn from; add the answer or drop the record")
    if max_length is not None and len(encoded.tokens) > max_length:
        encoded = _truncate(encoded, example, max_length, generate)
    return encoded


def encode_each(example: Example, template: Template, others: tuple[Template, ...], **options: Any) -> Encoded:
    """`encode` by the one of `others` that the example names, or by `template` where it names none."""
    if not example.template:
        return encode(example, template, **options)
    named = {other.name: other for other in (template, *others)}
    if example.template not in named:
        raise DataError(f"{_where(example)}: template {example.template!r} is not among {', '.join(named)}")
    return encode(example, named[example.template], **options)


def _where(example: Example) -> str:
    return example.origin or (f"example {example.id!r}" if example.id else "example")


def _whole_pictures(turns: tuple[Turn, ...], spec: ImageSpec | None) -> tuple[Turn, ...]:
    """The turns, each picture in one vision row where a conversation shows several and `Tiles.several` says so."""
    if spec is None or spec.tiles is None or spec.tiles.several != "whole":
        return turns
    cut = lambda s: isinstance(s, Image) and not (s.sense or isinstance(s.source, Clip))  # noqa: E731
    if sum(cut(segment) for turn in turns for segment in turn.segments) < 2:
        return turns
    mark = lambda s: dataclasses.replace(s, whole=True) if cut(s) else s  # noqa: E731
    return tuple(dataclasses.replace(turn, segments=tuple(map(mark, turn.segments))) for turn in turns)


def _span(image: Image, spec: ImageSpec | None, video: VideoSpec, visual_tokens: int) -> Span:
    """The positions of one picture; those of a stage that reads pictures apart from the text (0 tokens) are none."""
    if visual_tokens and spec is not None and spec.fit == "naflex":
        raise ValueError(
            "image: pictures that keep their shape (fit='naflex') have no fixed number of visual tokens, which a "
            "language model reads here; use fit='squash' with the tower's own size"
        )
    if isinstance(image.source, Clip):
        return video.span(len(image.source.indices), visual_tokens)
    if image.whole:
        return whole(visual_tokens, newline=bool(visual_tokens))
    if video.stills and visual_tokens:
        return video.span(video.frames, visual_tokens)
    if spec is None or spec.tiles is None or not visual_tokens:
        return whole(visual_tokens)
    return span(*picture_size(image, max_pixels=spec.max_pixels), spec.tiles, spec.size, visual_tokens)


def _sensed(piece: Shown, senses: Mapping[str, SenseSpec], start: int) -> Placed:
    """A segment of a named sense, from a position on."""
    if piece.sense not in senses:
        known = f"its senses are {', '.join(senses)}" if senses else "it has none"
        raise ValueError(f"sense {piece.sense!r}: the model has no such sense, {known} (config.model.senses)")
    return place(piece, piece.sense, senses[piece.sense], start)


def _assemble(
    pieces: list[Piece | Shown],
    tokenizer: Tokenizer,
    visual_tokens: int,
    image_token_id: int,
    spec: ImageSpec | None,
    video: VideoSpec,
    senses: Mapping[str, SenseSpec],
) -> Encoded:
    """Tokenize runs of adjacent text, and put special tokens, pictures and features between them."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    images: list[Image] = []
    spans: list[Span] = []
    placed: list[Placed] = []
    run: list[Piece] = []
    native = Shared(spec) if spec is not None and spec.native is not None and visual_tokens else None
    # The tokenizer's own BOS does not count: text after it begins as text at the start of a string does.
    first = True
    for piece in [*pieces, None]:
        text = isinstance(piece, Piece) and not (piece.special or piece.alone)
        if run and not (text and not piece.fresh):
            parts.append(_tokenize(run, tokenizer, first))
            run, first = [], False
        if text:
            run, first = run + [piece] * bool(piece.text), first or piece.fresh
            continue
        if isinstance(piece, Features) or (isinstance(piece, Image) and piece.sense):
            one = _sensed(piece, senses, sum(len(part[0]) for part in parts))
            parts.append((np.full(one.size, image_token_id), np.zeros(one.size), np.full(one.size, TEXT)))
            placed.append(one)
        elif isinstance(piece, Image):
            here = native.add(piece) if native else _span(piece, spec, video, visual_tokens)
            before = 0 if native else visual_tokens * sum(one.rows for one in spans)
            index = np.where(here.index < 0, here.index, here.index + before)
            parts.append((np.full(len(index), image_token_id), np.zeros(len(index)), index))
            images.append(piece)
            spans.append(here)
        elif piece is not None and piece.text == BOS:
            parts += [_single(tokenizer.bos_id, piece.weight)] if tokenizer.adds_bos else []
            first = True
            continue
        elif piece is not None and piece.text == EOS:
            parts.append(_single(_end(tokenizer), piece.weight))
        elif piece is not None and piece.alone:
            parts.append(_tokenize([piece], tokenizer, first))
        elif piece is not None:
            parts.append(_single(tokenizer.special_id(piece.text), piece.weight))
        first = False
    tokens, weights, visual = (np.concatenate([[], *columns]) for columns in zip(*parts)) if parts else ([], [], [])
    encoded = Encoded(
        tokens=np.asarray(tokens, np.int32),
        weights=np.asarray(weights, np.float32),
        visual=np.asarray(visual, np.int32),
        images=tuple(images),
        rows=tuple(one.rows for one in spans),
        sizes=tuple(len(one.index) for one in spans),
        blend=_blend(np.asarray(visual, np.int32), spans, visual_tokens),
        placed=tuple(placed),
    )
    return native.finished(encoded) if native else encoded


def _blend(visual: np.ndarray, spans: list[Span], visual_tokens: int) -> Blend | None:
    """What several visual tokens fill together, each picture's numbers after those of the pictures before it."""
    if all(one.blend is None for one in spans):
        return None
    index, weight = np.zeros((len(visual), TAPS), np.int32), np.zeros((len(visual), TAPS), np.float32)
    places, at, rows = np.flatnonzero(visual != TEXT), 0, 0
    for one in spans:
        here = places[at : at + len(one.index)]
        if one.blend is not None:
            index[here], weight[here] = one.blend.index + rows * visual_tokens, one.blend.weight
        at, rows = at + len(one.index), rows + one.rows
    return Blend(index, weight)


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no end token (eos_token), with which this template ends a text; set one")
    return tokenizer.eos_id


def _single(token: int | None, weight: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.asarray([token]), np.asarray([weight]), np.asarray([TEXT])


def _tokenize(run: list[Piece], tokenizer: Tokenizer, first: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run of pieces read as one text; a token has the weight of the piece that its last character lies in."""
    ids, spans = tokenizer.encode_text("".join(p.text for p in run), first)
    ends = np.cumsum([len(p.text) for p in run]).tolist()
    owners = [min(bisect.bisect_right(ends, max(stop - 1, start)), len(run) - 1) for start, stop in spans]
    return ids, np.asarray([run[owner].weight for owner in owners]), np.full(len(ids), TEXT)


def _check_ids(encoded: Encoded, example: Example, embedding_size: int | None) -> None:
    """Refuse ids without an embedding row: a gather on the device would clamp them silently."""
    if embedding_size is None or not len(encoded.tokens):
        return
    outside = (encoded.tokens < 0) | (encoded.tokens >= embedding_size)
    if outside.any():
        bad = np.unique(encoded.tokens[outside])
        raise DataError(
            f"{_where(example)}: token id {', '.join(map(str, bad[:5]))} is outside the embedding of {embedding_size} "
            "rows; this tokenizer does not belong to this model, or tokens were added without growing the embedding"
        )


def _truncate(encoded: Encoded, example: Example, max_length: int, generate: bool) -> Encoded:
    """Drop trailing text so that `max_length` positions remain, after a whole answer if one fits."""
    total = len(encoded.tokens)
    says = f"{_where(example)}: {total} tokens do not fit max_length {max_length}"
    if generate:
        raise DataError(f"{says}: a prompt cannot be cut without losing the question; shorten it or raise max_length")
    needed = max([stop for _, stop in encoded.spans] + [one.stop for one in encoded.placed], default=0)
    for one in encoded.placed:
        if one.stop > max_length:
            raise DataError(
                f"{says}: what sense {one.sense!r} reads fills positions {one.start} to {one.stop - 1}; raise "
                f"max_length above {needed}, split the conversation or shorten it"
            )
    if needed > max_length:
        picture, (first, stop) = next((j, one) for j, one in enumerate(encoded.spans) if one[1] > max_length)
        verb = "would cut a picture in half" if first < max_length else "would lose a picture"
        clip = encoded.images[picture].source
        frames = f", a video of {len(clip.indices)} frames," if isinstance(clip, Clip) else ""
        fewer = "take fewer frames of a video (model.video.frames)" if frames else "use fewer pictures"
        raise DataError(
            f"{says}: the context overflow {verb} (image {picture} of {len(encoded.images)}{frames} fills positions "
            f"{first} to {stop - 1}); raise max_length above {needed}, split the conversation or {fewer}"
        )
    trained = np.append(encoded.weights > 0, False)
    answers = np.flatnonzero(trained[:-1] & ~trained[1:]) + 1
    fitting = answers[(answers <= max_length) & (answers >= needed)]
    cut = int(fitting[-1]) if fitting.size else max_length
    if not trained[:cut].any():
        raise DataError(
            f"{says}: the first answer begins beyond it, so no token to learn from would be left; raise max_length or "
            "shorten the question"
        )
    return dataclasses.replace(
        encoded,
        tokens=encoded.tokens[:cut],
        weights=encoded.weights[:cut],
        visual=encoded.visual[:cut],
        blend=None if encoded.blend is None else encoded.blend[:cut],
        axes=None if encoded.axes is None else encoded.axes[:cut],
    )


def decode_view(encoded: Encoded, tokenizer: Tokenizer) -> list[tuple[str, float, bool]]:
    """What the model sees, to print: (text, weight, is a picture), one entry a token and one a picture.

    A character that spans several tokens stands with the last of them; the texts of a run join to its decoded text.
    """
    view: list[tuple[str, float, bool]] = []
    at = 0
    for first, stop, name in [*sorted(_marks(encoded)), (len(encoded.tokens), len(encoded.tokens), "")]:
        run = encoded.tokens[at:first].tolist()
        weights = encoded.weights[at:first].tolist()
        view += [(text, weight, False) for text, weight in zip(_token_texts(run, tokenizer), weights)]
        if name:
            view.append((f"[{name}: {stop - first} tokens]", 0.0, name.startswith(("image ", "video "))))
        at = stop
    return view


def _marks(encoded: Encoded) -> list[tuple[int, int, str]]:
    """(first position, one past the last, what to call it) of each picture that takes some, and of named senses."""
    found = []
    for number, (first, stop) in enumerate(encoded.spans):
        kind = "video" if isinstance(encoded.images[number].source, Clip) else "image"
        found += [(first, stop, f"{kind} {number}")] if stop > first else []
    return found + [(one.start, one.stop, f"sense {one.sense}") for one in encoded.placed]


def _token_texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text that each id adds to the text before it."""
    texts: list[str] = []
    before, shown = 0, 0  # ids[before:shown] is the last piece shown: spaces depend on the neighbour to the left
    for stop in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[before:shown], skip_special=False)
        text = tokenizer.decode(ids[before:stop], skip_special=False)
        if text.endswith("\ufffd") and stop < len(ids):
            texts.append("")  # part of a character: wait for the rest
            continue
        texts.append(text[len(prefix) :])
        before, shown = shown, stop
    return texts
