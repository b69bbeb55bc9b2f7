"""Dual encoders that score pictures against texts: CLIP and SigLIP."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from lvlm_jax.nn.linear import linear, named
from lvlm_jax.nn.norms import unit
from lvlm_jax.processing.schema import Batch
from lvlm_jax.shapes import Array, DTypeLike, Float
from lvlm_jax.vision import VisionConfig
from lvlm_jax.vision.text_tower import TextTower, TextTowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """Two towers; `projection` is CLIP's joint width (None: SigLIP's towers meet as they are)."""

    vision: VisionConfig
    text: TextTowerConfig
    projection: int | None = None
    bias: bool = False


class DualEncoder(nn.Module):
    """Picture and text towers with a joint space.

    Parameters: ``vision``, ``text``, ``visual_projection`` and ``text_projection`` (CLIP), ``logit_scale`` (its
    logarithm) and ``logit_bias`` (SigLIP).
    """

    config: DualEncoderConfig
    dtype: DTypeLike = jnp.float32
    scan: bool = False
    remat: str = "none"

    def setup(self) -> None:
        """Two towers, projections, temperature."""
        c = self.config
        self.vision = c.vision.build(self.dtype, self.scan, self.remat)
        self.text = TextTower(c.text, self.dtype, self.scan, self.remat)
        if c.projection:
            self.visual_projection = linear(c.projection, ("embed", None), dtype=self.dtype)
            self.text_projection = linear(c.projection, ("embed", None), dtype=self.dtype)
        start = math.log(10.0) if c.bias else math.log(1 / 0.07)
        self.logit_scale = self.param("logit_scale", named(nn.initializers.constant(start), ()), ())
        if c.bias:
            self.logit_bias = self.param("logit_bias", named(nn.initializers.constant(-10.0), ()), ())

    def __call__(self, batch: Batch) -> tuple[Float[Array, "N D"], Float[Array, "B D"], Array, Array]:
        """(picture vectors, text vectors, both of unit length, scale, bias); scores are scale * i . t + bias.

        Picture i belongs to text row i: one example a row, one picture an example.
        """
        flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        image = self.embed_images(flat(batch.patches), flat(batch.patch_positions), flat(batch.patch_segments))
        text = self.embed_text(batch.tokens)
        bias = self.logit_bias if self.config.bias else jnp.zeros(())
        return image, text, jnp.exp(self.logit_scale), bias

    def embed_images(self, patches: Array, positions: Array, segments: Array) -> Float[Array, "N D"]:
        """Unit vector of each picture; arguments as `ViT`'s."""
        x = self.vision(patches, positions, segments)[1]
        return unit(self.visual_projection(x) if self.config.projection else x)

    def embed_text(self, tokens: Array) -> Float[Array, "B D"]:
        """Unit vector of each text row."""
        x = self.text(tokens)[1]
        return unit(self.text_projection(x) if self.config.projection else x)
