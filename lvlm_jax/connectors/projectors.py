"""Projectors that keep the number of visual tokens: linear (LLaVA 1) and two-layer MLP (LLaVA 1.5)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.mlp import ACTIVATIONS
from lvlm_jax.shapes import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """One dense layer."""

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features."""
        return features

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return Linear(width, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Dense, activation, dense."""

    activation: str = "gelu"

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features."""
        return features

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return MlpProjector(width, self.activation, dtype)


class Linear(nn.Module):
    """Vision width to language width in one step (LLaVA, arXiv 2304.08485)."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N Q D"]) -> Float[Array, "N Q F"]:
        return linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="linear_1")(x)


class MlpProjector(nn.Module):
    """Two dense layers of the language width (LLaVA-1.5, arXiv 2310.03744)."""

    width: int
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N Q D"]) -> Float[Array, "N Q F"]:
        x = linear(self.width, ("embed", "mlp"), use_bias=True, dtype=self.dtype, name="linear_1")(x)
        x = ACTIVATIONS[self.activation](x)
        return linear(self.width, ("mlp", "embed"), use_bias=True, dtype=self.dtype, name="linear_2")(x)
