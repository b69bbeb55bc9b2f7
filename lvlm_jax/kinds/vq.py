"""Stages that train a picture tokenizer: pictures to codes and back (`vision.vq`)."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.kinds.kind import Kind, without_senses
from lvlm_jax.kinds.unified import UnifiedModel
from lvlm_jax.processing.encode import DataError
from lvlm_jax.processing.schema import TEXT, Batch, Encoded, Example
from lvlm_jax.train import unified
from lvlm_jax.vision.vq import VQ, Reading, VQConfig, to_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Weights of `losses.tokenizer_loss`; codebook_from: "latents" starts the codebook among those of the first batch.

    "random" leaves it as it was drawn.
    """

    distance: Literal["l1", "l2"] = "l1"
    commitment: float = 0.25
    codebook: float = 1.0
    codebook_from: Literal["latents", "random"] = "latents"


class PictureTokenizer(nn.Module):
    """A picture tokenizer alone, its parameters under ``vision``, where `models.unified.Unified` has them."""

    config: VQConfig

    def setup(self) -> None:
        """The tokenizer, in float32: rounded latents have other neighbours."""
        self.vision = VQ(self.config, jnp.float32)

    def __call__(self, batch: Batch) -> Reading:
        """The pictures of a batch, read and written back."""
        return self.vision(to_pixels(batch.patches.reshape(-1, *batch.patches.shape[2:]), self.config))


def picture_alone(example: Example) -> Encoded:
    """The pictures of an example, and one position of nothing: a picture tokenizer reads no text.

    Raises:
      DataError: an example without one.
    """
    without_senses(example)
    if not example.images:
        raise DataError(f"{example.origin or example.id}: no picture, and a picture tokenizer learns from nothing else")
    return Encoded(np.zeros(1, np.int32), np.ones(1, np.float32), np.full(1, TEXT, np.int32), example.images)


def _loss(model: Any, settings: Settings, head_trained: bool, shards: int) -> Callable:
    weights = {"distance": settings.distance, "commitment": settings.commitment, "codebook": settings.codebook}
    alone = unified.tokenizer_loss(VQ(model.config), **weights)
    return lambda params, batch: alone(params["vision"], batch)


def _begin(recipe: Any, stage: Any, model: Any, params: dict, batch: Callable[[], Batch], key: jax.Array) -> dict:
    if KIND.settings_of("", stage).codebook_from == "random":
        return params
    old = params["vision"]["codebook"]
    first = jax.tree.map(jnp.asarray, batch())
    new = unified.started_codebook(VQ(model.config), params["vision"], first, key)["codebook"]
    return {**params, "vision": {**params["vision"], "codebook": jax.device_put(new, old.sharding)}}


KIND = Kind(
    section=UnifiedModel,
    settings=Settings,
    model=lambda recipe, options: PictureTokenizer(recipe.model.vision),
    loss=_loss,
    sizes=lambda recipe: recipe.model.config,
    length=lambda recipe: 1,
    pairs=True,
    frozen="float32",
    encoder=lambda recipe, stage, tokenizer: picture_alone,
    begin=_begin,
)
"""A picture tokenizer by what it writes back; its perceptual and adversarial terms are not here."""
