"""A picture tokenizer: a convolutional encoder, a codebook, and a decoder that is the encoder's mirror (VQGAN).

A picture becomes codes, one a patch, in reading order; the decoder writes pictures back from codes. Source: Taming
Transformers (arXiv 2012.09841); the public ones are `vision.vqgan`'s.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.nn.conv_blocks import EPS, Conv, Downsample, ResidualConv, SpatialAttention, Upsample
from lvlm_jax.nn.linear import named
from lvlm_jax.nn.norms import GroupNorm, unit
from lvlm_jax.shapes import Array, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of a picture tokenizer.

    image_size: side of a picture. channels: of the finest level; level i has `multipliers`[i] times as many, and each
    level but the last halves the side. blocks: residual blocks of a level. attention: sides of the levels whose blocks
    attend; middle_attention: whether the coarsest place between encoder and decoder does. latent: channels beside the
    codebook, codes: its rows, code_width: their width. groups: of the norms. decoder: whether there is one. unit_codes:
    the decoder gets codes of length one (Janus's, whose encoder compares them as they are).
    """

    image_size: int
    channels: int
    multipliers: tuple[int, ...]
    codes: int
    code_width: int
    latent: int
    blocks: int = 2
    attention: tuple[int, ...] = ()
    middle_attention: bool = True
    groups: int = 32
    decoder: bool = True
    unit_codes: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is no multiple of {self.patch_size}, the pixels of a code that "
                f"{len(self.multipliers)} levels make"
            )
        if odd := [m for m in self.multipliers if self.channels * m % self.groups]:
            raise ValueError(f"channels={self.channels} times {odd[0]} do not divide into groups={self.groups}")
        if unknown := sorted(set(self.attention) - set(self.sides)):
            raise ValueError(f"attention={unknown}: no level has this side; the sides are {list(self.sides)}")

    @property
    def patch_size(self) -> int:
        """Pixels of a code's side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each level, finest first."""
        return tuple(self.image_size >> level for level in range(len(self.multipliers)))

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.sides[-1]

    @property
    def patches(self) -> int:
        """Patches of a picture, and so its codes (P)."""
        return self.grid**2

    @property
    def values(self) -> int:
        """Values of one patch (C)."""
        return self.patch_size * self.patch_size * 3


class Reading(NamedTuple):
    """What the tokenizer makes of pictures.

    latents: what the encoder gave, vectors: the codebook's nearest row to each, codes: its number, made: the pictures
    decoded (None without a decoder).
    """

    latents: Float[Array, "N rows columns D"]
    vectors: Float[Array, "N rows columns D"]
    codes: Int[Array, "N P"]
    made: Float[Array, "N tall wide 3"] | None


class Level(nn.Module):
    """Residual blocks of one side, each perhaps with attention behind."""

    features: int
    blocks: int
    attention: bool
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns C"]) -> Float[Array, "N rows columns D"]:
        for i in range(self.blocks):
            x = ResidualConv(self.features, self.groups, self.dtype, name=f"block_{i}")(x)
            if self.attention:
                x = SpatialAttention(self.groups, self.dtype, name=f"attn_{i}")(x)
        return x


class Middle(nn.Module):
    """Two residual blocks at the coarsest side, with attention between."""

    attention: bool
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "N rows columns D"]) -> Float[Array, "N rows columns D"]:
        block = functools.partial(ResidualConv, x.shape[-1], self.groups, self.dtype)
        x = block(name="block_1")(x)
        if self.attention:
            x = SpatialAttention(self.groups, self.dtype, name="attn_1")(x)
        return block(name="block_2")(x)


class Encoder(nn.Module):
    """Pictures -> latents, a `patch_size`-th of the side."""

    config: VQConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "N tall wide 3"]) -> Float[Array, "N rows columns D"]:
        c = self.config
        x = Conv(c.channels, dtype=self.dtype, name="conv_in")(pixels)
        for i, (side, times) in enumerate(zip(c.sides, c.multipliers)):
            attends = side in c.attention
            x = Level(c.channels * times, c.blocks, attends, c.groups, self.dtype, name=f"down_{i}")(x)
            if i + 1 < len(c.sides):
                x = Downsample(self.dtype, name=f"downsample_{i}")(x)
        x = Middle(c.middle_attention, c.groups, self.dtype, name="middle")(x)
        x = nn.silu(GroupNorm(c.groups, EPS, self.dtype, name="norm_out")(x))
        return Conv(c.latent, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents -> pictures: the encoder turned round, with one block more a level."""

    config: VQConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, latents: Float[Array, "N rows columns D"]) -> Float[Array, "N tall wide 3"]:
        c = self.config
        x = Conv(c.channels * c.multipliers[-1], dtype=self.dtype, name="conv_in")(latents)
        x = Middle(c.middle_attention, c.groups, self.dtype, name="middle")(x)
        for i in reversed(range(len(c.sides))):
            width, attends = c.channels * c.multipliers[i], c.sides[i] in c.attention
            x = Level(width, c.blocks + 1, attends, c.groups, self.dtype, name=f"up_{i}")(x)
            if i:
                x = Upsample(self.dtype, name=f"upsample_{i}")(x)
        x = nn.silu(GroupNorm(c.groups, EPS, self.dtype, name="norm_out")(x))
        return Conv(3, dtype=self.dtype, name="conv_out")(x)


class VQ(nn.Module):
    """A picture tokenizer.

    Pixels are about -1 to 1. Parameters: ``encoder``, ``to_code``, ``codebook``, ``from_code``, and ``decoder`` where
    the config has one.
    """

    config: VQConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Encoder, codebook, decoder."""
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.to_code = Conv(c.code_width, size=1, dtype=self.dtype)
        self.from_code = Conv(c.latent, size=1, dtype=self.dtype)
        spread = lambda key, shape: jax.random.uniform(key, shape, minval=-1 / c.codes, maxval=1 / c.codes)  # noqa: E731
        self.codebook = self.param("codebook", named(spread, (None, "embed")), (c.codes, c.code_width))
        if c.decoder:
            self.decoder = Decoder(c, self.dtype)

    def __call__(self, pixels: Float[Array, "N tall wide 3"]) -> Reading:
        """Pictures read and written back; gradients pass the codebook straight through (arXiv 1711.00937)."""
        latents = self.latents(pixels)
        codes = self.nearest(latents)
        vectors = self.codebook[codes].reshape(latents.shape)
        through = latents + jax.lax.stop_gradient(vectors - latents)
        if not self.config.decoder:
            if self.is_initializing():
                self.from_code(through)
            return Reading(latents, vectors, codes, None)
        return Reading(latents, vectors, codes, self._write(through))

    def latents(self, pixels: Float[Array, "N tall wide 3"]) -> Float[Array, "N rows columns D"]:
        """What the encoder gives, in the codebook's width; float32."""
        return self.to_code(self.encoder(pixels)).astype(jnp.float32)

    def nearest(self, latents: Float[Array, "N rows columns D"]) -> Int[Array, "N P"]:
        """The number of the codebook's nearest row to each latent, in reading order."""
        table = self.codebook.astype(jnp.float32)
        # Rounded products would choose another row; what the latent's own length adds is the same for all rows.
        dot = jnp.einsum("NYXD,VD->NYXV", latents, table, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.square(table).sum(-1) - 2 * dot
        return jnp.argmin(distance, axis=-1).astype(jnp.int32).reshape(latents.shape[0], -1)

    def encode(self, pixels: Float[Array, "N tall wide 3"]) -> Int[Array, "N P"]:
        """Pictures -> codes."""
        return self.nearest(self.latents(pixels))

    def decode(self, codes: Int[Array, "N P"]) -> Float[Array, "N tall wide 3"]:
        """Codes -> pictures."""
        side = self.config.grid
        return self._write(self.codebook[codes].reshape(codes.shape[0], side, side, -1))

    def _write(self, vectors: Array) -> Array:
        if not self.config.decoder:
            raise ValueError("this tokenizer has no decoder (decoder=False): it reads pictures and writes none")
        vectors = unit(vectors) if self.config.unit_codes else vectors
        return self.decoder(self.from_code(vectors)).astype(jnp.float32)


def to_pixels(patches: Float[Array, "N P C"], config: VQConfig) -> Float[Array, "N tall wide 3"]:
    """Pictures out of their patches of `patch_size` x `patch_size` pixels (`Batch.patches`)."""
    side, patch = config.grid, config.patch_size
    grid = patches.reshape(-1, side, side, patch, patch, 3)
    return grid.swapaxes(2, 3).reshape(-1, config.image_size, config.image_size, 3)
