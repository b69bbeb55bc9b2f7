"""Documents: running text with pictures between, as it stands, or as OpenFlamingo and Idefics write it."""

from collections.abc import Sequence

from lvlm_jax.processing.pieces import BOS, EOS, Piece, Rendered
from lvlm_jax.processing.schema import Image, Text, Turn


def document_order(turns: Sequence[Turn], generate: bool) -> tuple[str | None, list[Turn]]:
    """A document is what assistant turns say, learnt, among user turns that are only read, in any order."""
    turns = list(turns)
    if any(turn.role == "system" for turn in turns):
        raise ValueError("turns: a document has no system turn; leave it out, or use a chat template")
    if generate:
        if turns and turns[-1].role == "assistant":
            turns.pop()
        if not any(turn.segments for turn in turns):
            raise ValueError("turns: nothing stands before the last assistant turn, so there is nothing to go on from")
    elif not turns or turns[-1].role != "assistant":
        raise ValueError("turns: a document ends with an assistant turn, the text to learn; add one or drop the record")
    return None, turns


def document(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """Texts and pictures as they stand, nothing between them, and the tokenizer's end token."""
    out: Rendered = [Piece(BOS, special=True)]
    for turn in turns:
        weight = float(turn.role == "assistant")
        out += [Piece(s.text, weight) if isinstance(s, Text) else s for s in turn.segments]
    return out if generate else [*out, Piece(EOS, 1.0, special=True)]


def flamingo(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """``{text}<image>{text}<|endofchunk|><image>{text}<|endofchunk|></s>``, as OpenFlamingo writes documents and shots.

    A chunk ends before the next picture, and where a turn ends that nobody answers: each demonstration is a user turn.
    Text before the first picture is read and not learnt. Source: OpenFlamingo's repository, data.py and train.py.
    """
    end, shown, seen = "<|endofchunk|>", False, False
    out: Rendered = [Piece(BOS, special=True)]
    for number, turn in enumerate(turns):
        weight = float(turn.role == "assistant")
        for segment in turn.segments:
            if isinstance(segment, Text):
                out.append(Piece(segment.text, weight * seen))
                continue
            out += [Piece(end, weight, special=True)] if shown else []
            out.append(segment)
            shown = seen = True
        following = turns[number + 1].role if number + 1 < len(turns) else "assistant"
        if turn.role == "assistant" or following == "user":
            out.append(Piece(end, weight * seen, special=True))
            shown = False
    return out if generate else [*out, Piece(EOS, float(seen), special=True)]


def idefics(system: str, turns: Sequence[Turn], generate: bool) -> Rendered:
    """A document with ``<fake_token_around_image>`` on both sides of a picture, one between two that are neighbours.

    Source: the torch library's `IdeficsProcessor`.
    """
    around, picture = Piece("<fake_token_around_image>", special=True), False
    out: Rendered = []
    for piece in document(system, turns, generate):
        if isinstance(piece, Image):
            out += [piece, around] if picture else [around, piece, around]
        else:
            out.append(piece)
        picture = isinstance(piece, Image) or (picture and isinstance(piece, Piece) and not piece.text)
    return out
