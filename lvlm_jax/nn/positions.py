"""Rotary positions with the scalings and pairings in use, and scores that fall with the distance (ALiBi)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from lvlm_jax.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts (the fields of a public config's ``rope_scaling``).

    low_freq_factor, high_freq_factor: of "llama3". beta_fast, beta_slow, truncate, attention_factor: of "yarn"; the
    last one multiplies cos and sin, default 0.1 ln(factor) + 1. original_context: of both.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's growth of queries and keys with the stretch (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angular frequency of each of the width/2 pairs, float32[E/2].

    Source: RoFormer (arXiv 2104.09864); "llama3" smooths between kept high and stretched low frequencies, as published
    with Llama 3.1; "yarn" ramps between them by the turns a pair makes in the original context (arXiv 2309.00071).
    """
    freqs = (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return (freqs / np.float32(scaling.factor)).astype(np.float32)
    return {"llama3": _llama3, "yarn": _yarn}[scaling.kind](freqs, width, theta, scaling)


def _llama3(freqs: np.ndarray, width: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    wavelength = 2 * math.pi / freqs
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    out = np.where(wavelength > low, freqs / scaling.factor, np.where(wavelength < high, freqs, blend))
    return out.astype(np.float32)


def _yarn(freqs: np.ndarray, width: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    def pair(turns: float) -> float:
        """Which pair makes so many turns in the original context."""
        return width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    stretched = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (freqs / scaling.factor * stretched + freqs * (1 - stretched)).astype(np.float32)


Turned = Float[Array, "B T E2"]


def rotary(
    positions: Int[Array, "B T"] | Int[Array, "B T A"],
    width: int,
    theta: float,
    scaling: RopeScaling | None = None,
    axes: Sequence[int] | None = None,
) -> tuple[Turned, Turned]:
    """(cos, sin) of each position, float32, for one of `ROTATIONS`.

    Args:
      width: how many values of a head are rotated, the first ones; even, at most E.
      axes: of positions that are counted along A axes, by which of them each of the width/2 pairs turns (`mrope_axes`).
    """
    counts = positions[..., None] if axes is None else positions[..., np.asarray(axes)]
    angles = counts.astype(jnp.float32) * rope_frequencies(width, theta, scaling)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def mrope_axes(sections: Sequence[int], interleaved: bool) -> tuple[int, ...]:
    """By which axis (0 time, 1 row, 2 column) each pair of a head turns: so many pairs by each.

    In blocks, the axes one after the other; interleaved, by turns (time, row, column, time ...) as long as rows and
    columns last, and by time from there on.

    Source: Qwen2-VL (arXiv 2409.12191), section 2.1, in blocks; Qwen3-VL (arXiv 2511.21631), interleaved.
    """
    if not interleaved:
        return tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))
    count = len(sections)
    return tuple(i % count if i < sections[i % count] * count else 0 for i in range(sum(sections)))


def rotary_2d(positions: Float[Array, "B T 2"], width: int, theta: float) -> tuple[Turned, Turned]:
    """(cos, sin) of places in a plane: the first half of a head's pairs turn by the row, the others by the column.

    Args:
      width: values of a head, a multiple of 4.

    Source: EVA-02 (arXiv 2303.11331), with `rotate_pairs`.
    """
    angles = positions[..., None] * rope_frequencies(width // 2, theta)
    angles = angles.reshape(*positions.shape[:-1], width // 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_half(x: Float[Array, "B T H E"], cos: Turned, sin: Turned) -> Float[Array, "B T H E"]:
    """Rotates the pairs (i, i + E2): the layout of LLaMA, Qwen and Gemma checkpoints.

    Values from 2*E2 on are left as they are.
    """
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    first, second = _turn(first, second, cos, sin)
    return jnp.concatenate([first.astype(x.dtype), second.astype(x.dtype), rest], axis=-1)


def rotate_pairs(x: Float[Array, "B T H E"], cos: Turned, sin: Turned) -> Float[Array, "B T H E"]:
    """Rotates neighbours, the pairs (2i, 2i + 1): the layout of GLM checkpoints. The rest as `rotate_half`."""
    turned, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    wide = turned.astype(jnp.float32)
    pairs = jnp.stack(_turn(wide[..., 0::2], wide[..., 1::2], cos, sin), axis=-1)
    return jnp.concatenate([pairs.reshape(turned.shape).astype(x.dtype), rest], axis=-1)


def rotate_halves(x: Float[Array, "B T H E"], cos: Turned, sin: Turned) -> Float[Array, "B T H E"]:
    """Rotates each half of a head as `rotate_half`, by its half of the angles: ChatGLM-6B, positions counted twice."""
    halves = zip(*(jnp.split(part, 2, axis=-1) for part in (x, cos, sin)))
    return jnp.concatenate([rotate_half(*half) for half in halves], axis=-1)


def _turn(first: Array, second: Array, cos: Turned, sin: Turned) -> tuple[Array, Array]:
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return first * cos - second * sin, second * cos + first * sin


ROTATIONS: dict[str, Callable] = {"half": rotate_half, "interleaved": rotate_pairs, "halves": rotate_halves}
"""Which values of a head are rotated together."""


def alibi_slopes(heads: int, top: float = 8.0) -> Float[np.ndarray, "H"]:
    """How much a head's scores fall with each position between query and key.

    Powers of two, evenly spread in the exponent from 2^-(top / heads) down to 2^-top; where the heads are no power of
    two, every other one of the next power's comes first, then those between.

    Source: ALiBi (arXiv 2108.12409), section 3, in the order in which MPT's heads have them.
    """
    power = 1 << (heads - 1).bit_length()
    slopes = 2.0 ** -(np.arange(1, power + 1, dtype=np.float32) * np.float32(top / power))
    if power != heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def alibi(queries: Int[Array, "T"], keys: int, heads: int, top: float = 8.0) -> Float[Array, "H T S"]:
    """What ALiBi adds to the scores: minus slope times distance.

    Args:
      queries: the slot of each query among the keys. Examples packed into a row lie together, and rows are padded at
        their ends, so a distance in slots is one in positions.
    """
    distance = jnp.abs(queries[:, None] - jnp.arange(keys)).astype(jnp.float32)
    return -alibi_slopes(heads, top)[:, None, None] * distance
