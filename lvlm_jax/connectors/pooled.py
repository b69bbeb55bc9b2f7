"""Connectors that shorten the row of visual tokens: pixel shuffle (Idefics 3, MiniGPT-v2), average pool (Gemma 3).

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


def shuffled(features: int, factor: int, across: int | None = None) -> int:
    """How many tokens a pixel shuffle leaves; `across` as `PixelShuffleConfig` takes it.

    Raises:
      ValueError: features that fill no square, or one that `factor` or `across` does not divide.
    """
    side = square_side(features, "pixel shuffle")
    sides = {"factor": factor, "across": factor if across is None else across}
    for name, count in sides.items():
        if side % count:
            raise ValueError(
                f"pixel shuffle: {name}={count} does not divide the {side} x {side} features of a picture; choose a "
                f"{name} that does, or another picture size"
            )
    return side // sides["factor"] * (side // sides["across"])


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


def pixel_shuffle(x: Float[Array, "N P D"], factor: int, across: int | None = None) -> Float[Array, "N Q F"]:
    """Every `factor` x `across` neighbours become one token, their values joined in (row, column, value) order."""
    across = factor if across is None else across
    rows, features, width = x.shape
    tokens, side = shuffled(features, factor, across), math.isqrt(features)
    x = x.reshape(rows, side // factor, factor, side // across, across, width).swapaxes(2, 3)
    return x.reshape(rows, tokens, factor * across * width)


def average_pool(x: Float[Array, "N P D"], side: int) -> Float[Array, "N Q D"]:
    """The mean of each square of neighbours, `side` x `side` of them."""
    rows, features, width = x.shape
    step = math.isqrt(features) // math.isqrt(pooled(features, side))
    x = x.reshape(rows, side, step, side, step, width)
    return x.mean((2, 4), dtype=jnp.float32).reshape(rows, side * side, width).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig:
    """Neighbours side by side in one token, then one dense layer.

    `factor` is how many neighbours of each side, `across` how many of a row where that is another number: MiniGPT-v2
    joins four of a row (factor=1, across=4), and its dense layer has a bias. `std` is the deviation of a fresh dense
    layer's weights; None keeps the features' own size, which is many times that of a small language model's embeddings.
    """

    factor: int = 2
    std: float | None = None
    across: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("factor", "across"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: how many neighbours become one token, 1 or more")
        if self.std is not None and self.std <= 0:
            raise ValueError(f"std={self.std}: the deviation of fresh weights is positive; None leaves it to the width")

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features.

        Raises:
          ValueError: features that fill no square, or one that `factor` or `across` does not divide.
        """
        return shuffled(features, self.factor, self.across)

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return PixelShuffle(self.factor, width, self.std, dtype, self.across, self.bias)


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
    """Fewer, wider tokens, then the language width (Idefics 3, arXiv 2408.12637, section 2.2; nanoVLM; MiniGPT-v2)."""

    factor: int
    width: int
    std: float | None = None
    dtype: DTypeLike = jnp.float32
    across: int | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "N P D"]) -> Float[Array, "N Q F"]:
        x = pixel_shuffle(x, self.factor, self.across)
        return linear(
            self.width, ("embed", "mlp"), use_bias=self.bias, dtype=self.dtype, std=self.std, name="linear_1"
        )(x)


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
