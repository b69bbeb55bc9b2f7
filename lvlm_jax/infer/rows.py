"""Prompts as rows of a few shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lvlm_jax.processing import native
from lvlm_jax.processing.schema import Batch


def bucket(length: int) -> int:
    """A prompt length rounded up: steps of 8 below 64, then four steps an octave, so at most a quarter is padding."""
    step = max(8, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step


def power(count: int, most: int | None = None) -> int:
    """`count` rounded up to a power of two, but not above `most`."""
    power = 1 << max(count - 1, 0).bit_length()
    return power if most is None else min(power, most)


def short_rows(batch: Batch, merge: int) -> Batch:
    """Vision rows cut to a `bucket` of what is used of them, where several pictures share one (`processing.native`)."""
    used, whole = native.longest(batch), batch.patches.shape[2]
    return native.trimmed(batch, min(bucket(used), whole), merge) if used else batch


def left_padded(batch: Batch) -> Batch:
    """The rows moved to the right end, so that the next token has the same slot in all."""
    length = batch.tokens.shape[1]
    shift = length - (batch.segments > 0).sum(axis=1, keepdims=True)
    order = (np.arange(length) - shift) % length
    fields = ("tokens", "weights", "positions", "segments", "image_index")
    moved: dict[str, Callable | np.ndarray] = {f: np.take_along_axis(getattr(batch, f), order, 1) for f in fields}
    if batch.blend_index is not None:
        several = ("blend_index", "blend_weight")
        moved |= {f: np.take_along_axis(getattr(batch, f), order[..., None], 1) for f in several}
    if batch.axes is not None:
        moved["axes"] = np.take_along_axis(batch.axes, order[..., None], 1)
    senses = batch.senses and {
        name: dataclasses.replace(one, index=np.take_along_axis(one.index, order, 1))
        for name, one in batch.senses.items()
    }
    return batch.replace(**moved, senses=senses)
