"""Projectors that keep the number of visual tokens: linear (LLaVA 1), two-layer MLP (LLaVA 1.5), gated (CogVLM)."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear
from lvlm_jax.nn.mlp import ACTIVATIONS, GatedMlp
from lvlm_jax.nn.norms import LayerNorm
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """Dense, norm, GELU, SwiGLU of that hidden width."""

    hidden: int
    norm_eps: float = 1e-5

    def tokens(self, features: int) -> int:
        """Visual tokens of a vision row, from the tower's features."""
        return features

    def build(self, width: int, dtype: DTypeLike, scan: bool = False, remat: str = "none") -> nn.Module:
        """The module, with `width` the language model's."""
        return GatedProjector(width, self.hidden, self.norm_eps, dtype)


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


class GatedProjector(nn.Module):
    """A dense layer, a norm, GELU and a SwiGLU, no biases (CogVLM, arXiv 2311.03079, and its hub code's `GLU`)."""

    width: int
    hidden: int
    norm_eps: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N Q D"]) -> Float[Array, "N Q F"]:
        x = linear(self.width, ("embed", "mlp"), dtype=self.dtype, name="linear_1")(x)
        x = ACTIVATIONS["gelu"](LayerNorm(self.norm_eps, self.dtype, name="norm")(x))
        return GatedMlp(self.hidden, "silu", self.dtype, name="mlp")(x)
