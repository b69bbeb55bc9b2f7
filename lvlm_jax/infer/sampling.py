"""How the next token is chosen: greedy, by temperature, among the k best, or among those that hold p of the mass."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from lvlm_jax.shapes import Array, Bool, Float, Int

Mode = Literal["greedy", "temperature", "filtered"]
Numbers = tuple[Array, Array, Array, Array | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Decoding settings: temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole.

    The filters apply to the tempered distribution, top-k first, as the torch library does. The same seed gives the same
    tokens for a row whatever stands beside it in the batch. repetition_penalty (CTRL, arXiv 1909.05858, section 4.1)
    divides the scores above zero of tokens that the answer has already, and multiplies those below; 1 turns it off. The
    prompt does not count, as in the torch library where a model is given embeddings, not ids (MiniGPT-4: 1.05).

    Raises:
      ValueError: a value out of its range, naming field and range.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    seed: int = 0
    repetition_penalty: float | int = 1.0

    def __post_init__(self):
        _number("repetition_penalty", self.repetition_penalty, "above 0, finite")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be above 0, finite (1 turns it off)")
        _number("temperature", self.temperature, "0 (greedy) or above, finite")
        _number("top_p", self.top_p, "above 0, at most 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or above, finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0, at most 1 (1 turns it off)")
        for name, value in (("top_k", self.top_k), ("seed", self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: must be a whole number, 0 or above")

    @property
    def mode(self) -> Mode:
        """Which program runs; the numbers themselves are its arguments, so that changing them compiles nothing."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "temperature"

    @property
    def numbers(self) -> Numbers:
        """(temperature, top_k, top_p, repetition_penalty) as arrays, for `choose`; None for a penalty that is off."""
        penalty = None if self.repetition_penalty == 1 else jnp.float32(self.repetition_penalty)
        return jnp.float32(self.temperature), jnp.int32(self.top_k), jnp.float32(self.top_p), penalty


def _number(name: str, value: float, valid: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name}={value!r}: must be a number, {valid}")


def sample(
    logits: Float[Array, "B V"], key: Array | None, sampling: Sampling, written: Bool[Array, "B V"] | None = None
) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
      logits: float32 scores.
      key: one random key for all rows, or one a row [B]. Greedy reads none of it.
      written: the tokens that each row's answer has already, for a repetition penalty.
    """
    return choose(logits, key, sampling.mode, sampling.numbers, written)


def choose(
    logits: Float[Array, "B V"],
    key: Array | None,
    mode: Mode,
    numbers: Numbers,
    written: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """`sample` with the settings taken apart: `mode` static, `numbers` traced."""
    temperature, top_k, top_p, penalty = numbers
    if penalty is not None and written is not None:
        logits = jnp.where(written, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Shifted first: a tiny temperature would otherwise overflow, and inf - inf is NaN.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if mode == "filtered":
        logits = _filter(logits, top_k, top_p)
    keys = jax.random.split(key, logits.shape[0]) if key.ndim == 0 else key
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _filter(logits: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf on all but the k best, and of these on all but the smallest set whose mass reaches p. The best stays.

    Works on ranks, not on a threshold value, so that equal scores cannot bring more than k tokens in.
    """
    vocab = logits.shape[-1]
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocab)
    ranked = jnp.where(rank < jnp.where(top_k > 0, top_k, vocab), ranked, -jnp.inf)
    mass = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    kept = (rank == 0) | (before < top_p) | (top_p >= 1)  # rounding must not cut the tail where p turns the filter off
    ranked = jnp.where(kept, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
