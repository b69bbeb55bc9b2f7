"""Answers of an encoder-decoder: it reads once, then a beam search writes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lvlm_jax.infer import beam
from lvlm_jax.llm.encoder_decoder import EncoderDecoder, Written, new_cache
from lvlm_jax.params import unstack_layers
from lvlm_jax.shapes import Array, Float, Int, Params


def write(
    model: EncoderDecoder,
    params: Params,
    x: Float[Array, "B S D"],
    segments: Int[Array, "B S"],
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    beams: beam.Beams | None = None,
) -> beam.Found:
    """What the model writes about each row of embeddings, the best first.

    Args:
      params: layers one by one; scanned ones are taken apart anew in each call.
      x: embeddings of text (`EncoderDecoder.embed_tokens`), soft tokens of pictures among them.
      segments: 0 is padding; a row holds one example.
      ends: tokens that end an answer.
      beams: default greedy.

    Raises:
      ValueError: max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    beams = beams or beam.Beams(count=1)
    model, params = model.clone(scan=False, remat="none"), unstack_layers(params)
    room, ends = 1 << (max_new_tokens - 1).bit_length(), tuple(sorted(ends))
    return _written(model, beams.mode, ends, room, params, x, segments, beams.numbers, jnp.int32(max_new_tokens))


@functools.partial(jax.jit, static_argnames=("model", "mode", "ends", "room"))
def _written(
    model: EncoderDecoder,
    mode: beam.Mode,
    ends: tuple[int, ...],
    room: int,
    params: Params,
    x: Array,
    segments: Array,
    numbers: Any,
    max_new_tokens: Array,
) -> beam.Found:
    (rows, _, _), count, config = x.shape, mode[0], model.config
    run = functools.partial(model.apply, {"params": params})
    context = run(x, segments, method="encode")
    tokens = jnp.full((rows, 1), config.start_id, jnp.int32)
    cache = new_cache(config, rows, room, model.dtype)
    hidden, cache = run(tokens, segments, cache, jnp.int32(0), context, method="decode")
    logits = run(hidden[:, -1], method="logits")
    # What was read is the same for all hypotheses of a row: its keys need no order.
    source, shown = beam.repeated((tuple(layer.source for layer in cache), segments), count)

    def step(tokens: Array, state: Any) -> tuple[Array, Any]:
        own, at = state
        cache = tuple(map(Written, own, source))
        hidden, cache = run(tokens[:, None], shown, cache, at, method="decode")
        return run(hidden[:, -1], method="logits"), (tuple(layer.own for layer in cache), at + 1)

    return beam.search(
        step,
        beam.repeated((tuple(layer.own for layer in cache), jnp.int32(1)), count),
        logits,
        mode=mode,
        numbers=numbers,
        ends=ends,
        room=room,
        max_new_tokens=max_new_tokens,
        asked=(segments > 0).any(axis=1),
    )
