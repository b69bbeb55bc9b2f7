"""Rotary positions with the scalings in use, and the resize of learned position tables."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts (the fields of a public config's ``rope_scaling``)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angular frequency of each of the width/2 pairs, float32[E/2].

    Source: RoFormer (arXiv 2104.09864); "llama3" smooths between kept high and stretched low frequencies, as published
    with Llama 3.1.
    """
    freqs = (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return (freqs / np.float32(scaling.factor)).astype(np.float32)
    wavelength = 2 * math.pi / freqs
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    out = np.where(wavelength > low, freqs / scaling.factor, np.where(wavelength < high, freqs, blend))
    return out.astype(np.float32)


def rotary(
    positions: Int[Array, "B T"], width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T E2"], Float[Array, "B T E2"]]:
    """(cos, sin) of each position, float32, for `rotate_half`."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(width, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_half(
    x: Float[Array, "B T H E"], cos: Float[Array, "B T E2"], sin: Float[Array, "B T E2"]
) -> Float[Array, "B T H E"]:
    """Rotates the pairs (i, i + E/2): the layout of LLaMA, Qwen and Gemma checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def resize_positions(table: Float[Array, "P D"], grid: int, old_grid: int) -> Float[Array, "P2 D"]:
    """Bicubic resize of a learned square position table to another grid, antialiased when it shrinks."""
    if grid == old_grid:
        return table
    image = table.reshape(old_grid, old_grid, -1)
    image = jax.image.resize(image.astype(jnp.float32), (grid, grid, image.shape[-1]), "cubic")
    return image.reshape(grid * grid, -1).astype(table.dtype)
