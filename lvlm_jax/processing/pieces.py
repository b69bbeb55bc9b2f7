"""What a chat template makes of a conversation: pieces of text with a loss weight each, and pictures between them."""

import dataclasses

from lvlm_jax.processing.schema import Shown, Text, Turn

BOS = "bos"
"""Name of the piece where a text of its own begins, with the tokenizer's start token; for a tokenizer that adds none
there is no token."""
EOS = "eos"
"""Name of the piece where the tokenizer's own end token goes; a tokenizer without one is an error."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text with one loss weight.

    special: the text is the exact name of one special token (or `BOS`, `EOS`). alone: it is tokenized by itself, never
    merged with the text beside it. fresh: from here on the text is tokenized as one that begins here, with the space
    that some tokenizers put before a text.
    """

    text: str
    weight: float = 0.0
    special: bool = False
    alone: bool = False
    fresh: bool = False


Rendered = list[Piece | Shown]
"""What a template makes of a conversation."""


def plain_text(turn: Turn) -> str:
    """What a turn says, less its pictures."""
    return "".join(s.text for s in turn.segments if isinstance(s, Text))
