"""Captions as BLIP-2 and its kin read them: cleaned, and in BERT's words."""

import re

import numpy as np

from lvlm_jax.processing.schema import Example, Text
from lvlm_jax.processing.tokenizer import Tokenizer
from lvlm_jax.shapes import Int


def cleaned(text: str, words: int = 50) -> str:
    """A caption in small letters, without ``.!"()*#:;~``, one space between words, at most so many of them.

    Source: LAVIS, processors/blip_processors.py, BlipCaptionProcessor.
    """
    plain = re.sub(r"\s+", " ", re.sub(r"[.!\"()*#:;~]", " ", text.lower())).strip()
    return " ".join(plain.split(" ")[:words])


def caption_of(example: Example) -> str:
    """What the assistant says in an example, cleaned.

    Raises:
      ValueError: nothing.
    """
    said = [part.text for turn in example.turns if turn.role == "assistant" for part in turn.segments if _text(part)]
    found = cleaned(" ".join(said))
    if not found:
        raise ValueError("no caption: the assistant says nothing but marks that are taken off")
    return found


def _text(part: object) -> bool:
    return isinstance(part, Text)


def bert_ids(text: str, tokenizer: Tokenizer, most: int) -> Int[np.ndarray, "T"]:
    """[CLS], the words of a text, [SEP]: at most `most` ids, words cut off first.

    Raises:
      ValueError: a tokenizer without these two.
    """
    first, last = tokenizer.hf.cls_token_id, tokenizer.hf.sep_token_id
    if first is None or last is None:
        raise ValueError(
            "the tokenizer has no cls_token or no sep_token, which texts for BERT begin and end with; give BERT's own, "
            "google-bert/bert-base-uncased"
        )
    ids, _ = tokenizer.encode_text(text)
    return np.asarray([first, *ids[: most - 2].tolist(), last], np.int32)
