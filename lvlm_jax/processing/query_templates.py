"""Templates of models whose pictures stand in front of all text, as queries do: BLIP-2 and InstructBLIP.

Source: salesforce/LAVIS, models/blip2_models: blip2_opt.py, blip2_t5.py, blip2_vicuna_instruct.py.
"""

from collections.abc import Sequence

from lvlm_jax.processing.pieces import BOS, EOS, Piece, Rendered, plain_text
from lvlm_jax.processing.schema import Shown, Turn


def pictures_first(
    system: str, turns: Sequence[Turn], generate: bool, *, name: str, end: Piece, start: float = 0.0
) -> Rendered:
    """``{pictures}<s>{question} {answer}`` and `end`, in as many rounds as there are, for a decoder.

    Args:
      name: of the template, for messages.
      start: weight of the start token where nothing is asked: the authors of BLIP-2 learn it with a caption.

    Raises:
      ValueError: a system text, or a picture in an answer: there is no place for either.
    """
    out = _pictures(system, turns, name)
    out.append(Piece(BOS, 0.0 if plain_text(turns[0]) else start, special=True))
    space = ""
    for turn in turns:
        text = plain_text(turn)
        if turn.role == "user":
            out.append(Piece(text))
            space = " " if text and not text[-1].isspace() else ""
        else:
            out += [Piece(space + text, 1.0), end]
    return out


def read_and_written(system: str, turns: Sequence[Turn], generate: bool, *, name: str) -> Rendered:
    """``{pictures}{question}</s>`` to read, then ``{answer}</s>`` to write, for an encoder-decoder.

    Raises:
      ValueError: more than a question and an answer, a system text, or a picture in the answer.
    """
    if len(turns) > 2:
        raise ValueError(
            f"turns: the {name} template takes one question and one answer, this conversation has {len(turns)} turns; "
            "what an encoder-decoder read it cannot read on; split it"
        )
    out, end = _pictures(system, turns, name), Piece(EOS, special=True)
    out += [Piece(BOS, special=True), Piece(plain_text(turns[0])), end]
    if not generate:
        out += [Piece(BOS, special=True), Piece(plain_text(turns[1]), 1.0), Piece(EOS, 1.0, special=True)]
    return out


def _pictures(system: str, turns: Sequence[Turn], name: str) -> Rendered:
    """All pictures, which users show."""
    if system:
        raise ValueError(f"turns: the {name} template has no place for a system text; put it into the question")
    for number, turn in enumerate(turns):
        if turn.role != "user" and any(isinstance(s, Shown) for s in turn.segments):
            raise ValueError(
                f"turn {number} (assistant): a picture in the answer, which the {name} template cannot write"
            )
    return [s for turn in turns for s in turn.segments if isinstance(s, Shown)]
