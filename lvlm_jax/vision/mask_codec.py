"""PaliGemma's codec of masks: a 64 x 64 mask in a box is sixteen codes, each one of 128 shapes.

A VQ-VAE of Ning et al., "All in Tokens" (arXiv 2301.02229), trained on OpenImages by PaliGemma's authors, who publish
it as ``vae-oid.npz``. Source: SwinTransformer/AiT, vae/models/VQVAE.py; big_vision, pp/proj/paligemma/segmentation.py
and evaluators/proj/paligemma/transfers/segmentation.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lvlm_jax.keymap import CONV, Row
from lvlm_jax.processing.boxes import CODES, SHAPES
from lvlm_jax.shapes import Array, Float, Int

WIDTH = 512
"""Values of one code's vector."""
UP = (128, 64, 32, 16)
"""Channels behind each doubling of the decoder's side, from 4 to 64; the encoder's, backwards."""
BLOCKS = 2

UNUSED = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")
"""What training alone reads of the authors' module."""


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1 beside the identity."""

    @nn.compact
    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        conv = functools.partial(nn.Conv, x.shape[-1], padding="SAME")
        out = nn.relu(conv(kernel_size=(3, 3), name="conv1")(x))
        out = nn.relu(conv(kernel_size=(3, 3), name="conv2")(out))
        return x + conv(kernel_size=(1, 1), name="conv3")(out)


class Encoder(nn.Module):
    """A mask -> 4 x 4 vectors: four halvings, two residual blocks, a projection."""

    @nn.compact
    def __call__(self, x: Float[Array, "N 64 64 1"]) -> Float[Array, "N 4 4 D"]:
        for i, channels in enumerate(reversed(UP)):
            x = nn.relu(nn.Conv(channels, (4, 4), strides=2, padding=1, name=f"down{i}")(x))
        for i in range(BLOCKS):
            x = ResidualBlock(name=f"block{i}")(x)
        return nn.Conv(WIDTH, (1, 1), name="out")(x)


class Decoder(nn.Module):
    """4 x 4 vectors -> a mask: a projection, two residual blocks, four doublings, one channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "N 4 4 D"]) -> Float[Array, "N 64 64 1"]:
        x = nn.relu(nn.Conv(UP[0], (1, 1), name="in")(x))
        for i in range(BLOCKS):
            x = ResidualBlock(name=f"block{i}")(x)
        for i, channels in enumerate(UP):
            # Padding of the input spread out by the stride: kernel - 1 - torch's padding of 1.
            up = nn.ConvTranspose(channels, (4, 4), strides=(2, 2), padding=2, transpose_kernel=True, name=f"up{i}")
            x = nn.relu(up(x))
        return nn.Conv(1, (1, 1), name="out")(x)


class MaskCodec(nn.Module):
    """Masks to codes and back.

    Example:
      >>> import jax.numpy as jnp
      >>> from lvlm_jax.nn.linear import abstract
      >>> from lvlm_jax.vision.mask_codec import MaskCodec
      >>> shapes, _ = abstract(MaskCodec(), jnp.zeros((1, 64, 64)))  # with weights: lvlm_jax.hub.mask_codec.codec(path)
      >>> shapes["codebook"].shape
      (128, 512)
    """

    def setup(self) -> None:
        """The two halves and the vector of each code."""
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), (SHAPES, WIDTH))

    def __call__(self, masks: Float[Array, "N 64 64"]) -> Float[Array, "N 64 64"]:
        """Masks as they come back."""
        return self.decode(self.encode(masks))

    def encode(self, masks: Float[Array, "N 64 64"]) -> Int[Array, "N 16"]:
        """Masks of values in [0, 1] -> codes, row by row: of each vector the nearest in the codebook."""
        vectors = self.encoder(2 * masks[..., None] - 1).reshape(-1, CODES, WIDTH)
        # The square of the vector itself is the same for all codes.
        product = jnp.einsum("NCD,SD->NCS", vectors, self.codebook, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin(jnp.square(self.codebook).sum(-1) - 2 * product, axis=-1).astype(jnp.int32)

    def decode(self, codes: Int[Array, "N 16"]) -> Float[Array, "N 64 64"]:
        """Codes -> masks of values around [-1, 1]; above 0 is the thing."""
        return self.decoder(self.codebook[codes].reshape(-1, 4, 4, WIDTH))[..., 0]


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows() -> list[Row]:
    """The key table of the authors' file."""
    out = [Row("codebook", "_vq_vae._embedding")]
    for i in range(len(UP)):
        out += _conv(f"encoder/down{i}", f"encoder.{2 * i}") + _conv(f"decoder/up{i}", f"decoder.{4 + 2 * i}")
    for half, first in (("encoder", 8), ("decoder", 2)):
        for i in range(BLOCKS):
            for j in range(3):
                out += _conv(f"{half}/block{i}/conv{j + 1}", f"{half}.{first + i}.net.{2 * j}")
    return [
        *out,
        *_conv("encoder/out", "encoder.10"),
        *_conv("decoder/in", "decoder.0"),
        *_conv("decoder/out", "decoder.12"),
    ]


def _conv(ours: str, theirs: str) -> list[Row]:
    """A convolution, or a transposed one, whose kernel is the other way round on both sides."""
    return [Row(f"{ours}/kernel", f"{theirs}.weight", CONV), Row(f"{ours}/bias", f"{theirs}.bias")]
