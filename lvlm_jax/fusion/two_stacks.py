"""Rows of text and pictures for a language model of two stacks: the encoder reads, the decoder writes.

A row holds each example whole, as a decoder's does: what is read, then what is written. All before the first target is
read; from there on all is written, with the start token in the place of the last one read. So position t predicts token
t + 1 here as everywhere, a loss knows nothing of two stacks, and examples are packed into rows as ever. Both stacks run
over every position of a row, and each sees those of the other as padding.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.fusion.soft_tokens import prefix_of
from lvlm_jax.llm.encoder_decoder import EncoderDecoder, Written, new_cache
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, Bool, Float, Int

__all__ = ["go_on", "new_cache", "run", "writes"]


def writes(segments: Int[Array, "B T"], prefix: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The positions that the decoder runs over: all behind the prefix, and the last one of it where more follows."""
    after = jnp.pad(~prefix[:, 1:] & (segments[:, 1:] == segments[:, :-1]), ((0, 0), (0, 1)))
    return (segments > 0) & (~prefix | after)


def run(model: EncoderDecoder, x: Float[Array, "B T D"], batch: Batch, cache: Any = None) -> tuple[Array, Any]:
    """Embeddings of a batch, pictures among them -> (hidden states, cache).

    With a cache nothing is written yet: the batch is read, and the hidden states are those of the start token alone.
    """
    prefix = prefix_of(batch.segments, batch.weights)
    read = jnp.where(prefix, batch.segments, 0)
    context = model.encode(x, read)
    start = jnp.full((len(x), 1), model.config.start_id, jnp.int32)
    if cache is not None:
        return model.decode(start, read, cache, jnp.int32(0), context)
    y = jnp.where(prefix[..., None], model.embed_tokens(start), x)
    written = jnp.where(writes(batch.segments, prefix), batch.segments, 0)
    return model.write(y, written, context, read), None


def go_on(
    model: EncoderDecoder, tokens: Int[Array, "B T"], start: Int[Array, "B"], cache: Any, index: Int[Array, ""]
) -> tuple[Float[Array, "B T D"], Any]:
    """The next tokens of rows that `run` has read -> (hidden states, cache).

    Args:
      start: the first position of each row that was read (rows are padded on the left).
      index: position of the first of these tokens, counted on from the row: the decoder's own slots begin with the
        start token, which stands where the row ends.
    """
    first = cache if isinstance(cache, Written) else cache[0]
    length = jax.tree.leaves(first.source)[0].shape[-2]
    read = (jnp.arange(length) >= start[:, None]).astype(jnp.int32)
    return model.decode(tokens, read, cache, index - length + 1)
