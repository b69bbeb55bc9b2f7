"""Connectors that shorten the row of visual tokens: pixel shuffle (Idefics 3, nanoVLM), average pool (Gemma 3).

Both read the features of a square picture row by row, without a class token.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.norms import OffsetRMSNorm
from lvlm_jax.shapes import Array, DTypeLike, Float


def square_side(features: int, what: str) -> int:
    """The side of the square that so many features fill.

    Raises:
      ValueError: they fill no square; `what` names the connector.
    """
    side = math.isqrt(features)
    if side * side != features:
        raise ValueError(
            f"{what} reads the features of a square picture, and {features} are none; a class token that stays "
            "(class_feature) is one too many"
        )
    return side


def shuffled(features: int, factor: int) -> int:
    """How many tokens a pixel shuffle leaves.

    Raises:
      ValueError: features that fill no square, or one that `factor` does not divide.
    """
    side = square_side(features, "pixel shuffle")
    if side % factor:
        raise ValueError(
            f"pixel shuffle: factor={factor} does not divide the {side} x {side} features of a picture; choose a "
            "factor that does, or another picture size"
        )
    return (side // factor) ** 2


def pooled(features: int, side: int) -> int:
    """How many tokens an average pool leaves.

    Raises:
      ValueError: features that fill no square, or one that does not divide into `side` parts.
    """
    whole = square_side(features, "average pool")
    if whole % side:
        raise ValueError(
            f"average pool: side={side} does not divide the {whole} x {whole} features of a picture; choose a side "
            "that does, or another picture size"
        )
    return side**2


def pixel_shuffle(x: Float[Array, "N P D"], factor: int) -> Float[Array, "N Q F"]:
    """Every `factor` x `factor` neighbours become one token, their values joined in (row, column, value) order."""
    rows, features, width = x.shape
    side = math.isqrt(shuffled(features, factor))
    x = x.reshape(rows, side, factor, side, factor, width).swapaxes(2, 3)
    return x.reshape(rows, side * side, factor * factor * width)


def average_pool(x: Float[Array, "N P D"], side: int) -> Float[Array, "N Q D"]:
    """The mean of each square of neighbours, `side` x `side` of them."""
    rows, features, width = x.shape
    step = math.isqrt(features) // math.isqrt(pooled(features, side))
    x = x.reshape(rows, side, step, side, step, width)
    return x.mean((2, 4), dtype=jnp.float32).reshape(rows, side * side, width).astype(x.dtype)


def squares(x: Float[Array, "N P D"]) -> Float[Array, "N P D"]:
    """Every token becomes the mean of its square of two by two (LLaVA-NeXT-Video's frames).

    Raises:
      ValueError: features that fill no square of an even side.
    """
    rows, features, width = x.shape
    side = square_side(features, "the pool of frames")
    if side % 2:
        raise ValueError(f"the pool of frames reads squares of 2 x 2, and {side} x {side} features do not divide")
    x = x.reshape(rows, side // 2, 2, side // 2, 2, width)
    means = x.mean((2, 4), keepdims=True, dtype=jnp.float32).astype(x.dtype)
    return jnp.broadcast_to(means, x.shape).reshape(rows, features, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig:
    """Neighbours side by side in one token, then one dense layer without bias.

    `factor` is how many neighbours of each side. `std` is the deviation of a fresh dense layer's weights; None keeps
    the features' own size, which is many times that of a small language model's embeddings.
    """

    factor: int = 2
    std: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor={self.factor}: how many neighbours of each side become one token, 1 or more")
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std={self.std}: the deviation of fresh weights is positive; None leaves it to the width")

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features.

        Raises:
          ValueError: features that fill no square, or one that `factor` does not divide.
        """
        return shuffled(features, self.factor)

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return PixelShuffle(self.factor, width, self.std, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragePoolConfig:
    """The mean of neighbours, `side` x `side` of them, RMS norm, one dense layer without bias."""

    side: int = 16
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side={self.side}: how many tokens stand along each side of a picture, 1 or more")

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features.

        Raises:
          ValueError: features that fill no square, or one that does not divide into `side` parts.
        """
        return pooled(features, self.side)

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return AveragePool(self.side, width, self.norm_eps, dtype)


class PixelShuffle(nn.Module):
    """Fewer, wider tokens, then the language width (Idefics 3, arXiv 2408.12637, section 2.2; nanoVLM)."""

    factor: int
    width: int
    std: float | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        x = pixel_shuffle(x, self.factor)
        return linear(self.width, ("embed", "mlp"), dtype=self.dtype, std=self.std, name="linear_1")(x)


class AveragePool(nn.Module):
    """Fewer tokens of the vision width, normalised, then the language width (Gemma 3, arXiv 2503.19786, section 2)."""

    side: int
    width: int
    norm_eps: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        x = average_pool(x, self.side)
        x = OffsetRMSNorm(self.norm_eps, self.dtype, name="norm")(x)
        return linear(self.width, ("embed", "mlp"), dtype=self.dtype, name="linear_1")(x)
