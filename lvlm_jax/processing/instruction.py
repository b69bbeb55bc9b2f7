"""The text that a connector reads beside a picture, by a tokenizer of its own (InstructBLIP's Q-Former)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lvlm_jax.processing.pieces import plain_text
from lvlm_jax.processing.schema import Image, Turn
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import Int

BERT = "google-bert/bert-base-uncased"
"""The tokenizer of the releases; the word [DEC] that they add to it stands in no instruction."""
PADDING = -1
"""What stands in `Batch.instruction` behind a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionSpec:
    """Where the connector's tokenizer is (a folder or hub name), and the most tokens that it reads (S).

    The authors of InstructBLIP take 128 (blip2_vicuna_instruct.py).
    """

    tokenizer: str
    length: int = 128

    def __post_init__(self) -> None:
        if self.length < 3:
            raise ValueError(f"instruction.length={self.length}: at least 3, a word between [CLS] and [SEP]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A connector's tokenizer, the most tokens that it reads, and how many words it has (None: not checked).

    Raises:
      ValueError: a tokenizer without tokens that begin and end a text, or with more words than the connector.
    """

    tokenizer: Tokenizer
    length: int = 128
    vocab: int | None = None

    def __post_init__(self) -> None:
        if None in self._ends:
            raise ValueError(
                "the connector's tokenizer has neither [CLS] and [SEP] nor start and end tokens; the Q-Formers of the "
                "releases read bert-base-uncased with [DEC] added"
            )
        if self.vocab is not None and self.tokenizer.vocab_size > self.vocab:
            raise ValueError(
                f"the connector's tokenizer has {self.tokenizer.vocab_size} ids, but the connector has vocab="
                f"{self.vocab}; give the tokenizer that it was trained with"
            )

    @property
    def _ends(self) -> tuple[int | None, int | None]:
        """BERT's [CLS] and [SEP], or what another tokenizer has for them."""
        hf = self.tokenizer.hf
        first, last = hf.cls_token_id, hf.sep_token_id
        return hf.bos_token_id if first is None else first, hf.eos_token_id if last is None else last

    def ids(self, text: str) -> Int[np.ndarray, "S"]:
        """``[CLS] text [SEP]``; of a text too long the end is kept, as the authors keep it."""
        first, last = self._ends
        words = self.tokenizer.encode_text(text)[0]
        return np.asarray([first, *words[max(len(words) + 2 - self.length, 0) :], last], np.int32)

    def beside(self, turns: Sequence[Turn], pictures: int) -> tuple[Int[np.ndarray, "S"], ...]:
        """What is read beside each of the first `pictures` pictures: all that is said in the turn that shows it.

        It does not change as a conversation goes on: neither do the picture's visual tokens.
        """
        own = lambda s: isinstance(s, Image) and not s.sense  # noqa: E731
        said = [self.ids(plain_text(turn)) for turn in turns for s in turn.segments if own(s)]
        return tuple(said[:pictures])
