"""Text and pictures as one run of tokens, for models that write both: every token is a target, a picture's too."""

from collections.abc import Sequence

import numpy as np

from lvlm_jax.processing.schema import TEXT, Encoded, Image, Segment
from lvlm_jax.processing.tokenizer import Tokenizer


def interleave(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    *,
    count: int,
    begin_id: int,
    end_id: int,
    image_id: int,
    ended: bool = True,
    open_picture: bool = False,
) -> Encoded:
    """Texts and pictures in order: the tokenizer's BOS, each text, each picture between begin and end, and EOS.

    Args:
      count: tokens of a picture; `image_id` stands where they go.
      ended: with EOS; False for a prompt.
      open_picture: a prompt ends with the token that begins a picture, so that the answer does.

    Raises:
      ValueError: a tokenizer without BOS or EOS; what is ended and yet open.
    """
    if ended and open_picture:
        raise ValueError("open_picture=True begins a picture that ended=True cuts off; ended=False makes a prompt")
    for name, token in {"bos": tokenizer.bos_id, **({"eos": tokenizer.eos_id} if ended else {})}.items():
        if token is None:
            raise ValueError(f"the tokenizer has no {name}_token, which a run of text and pictures needs; set one")
    tokens, visual, images = [np.asarray([tokenizer.bos_id])], [np.asarray([TEXT])], []
    for segment in segments:
        if isinstance(segment, Image):
            first = count * len(images)
            tokens.append(np.asarray([begin_id, *[image_id] * count, end_id]))
            visual.append(np.asarray([TEXT, *range(first, first + count), TEXT]))
            images.append(segment)
        elif segment.text:
            ids, _ = tokenizer.encode_text(segment.text, first=len(tokens) == 1)
            tokens.append(ids)
            visual.append(np.full(len(ids), TEXT))
    last = [tokenizer.eos_id] if ended else [begin_id] if open_picture else []
    tokens.append(np.asarray(last, np.int32))
    visual.append(np.full(len(last), TEXT))
    whole = np.concatenate(tokens).astype(np.int32)
    weights = np.ones(len(whole), np.float32)
    return Encoded(whole, weights, np.concatenate(visual).astype(np.int32), tuple(images))
