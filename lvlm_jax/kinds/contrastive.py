"""Stages that teach a vision tower by comparing pictures with texts, beside a text tower (CLIP, SigLIP)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lvlm_jax.config import ConfigError
from lvlm_jax.hub.configs import public_config
from lvlm_jax.kinds.kind import Kind, NoSettings
from lvlm_jax.models.contrastive import DualEncoder
from lvlm_jax.train import losses
from lvlm_jax.vision.text_tower import TextTowerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTower:
    """What a contrastive stage adds to the model's vision tower: a text tower and the joint width."""

    text: TextTowerConfig
    projection: int | None = None
    bias: bool = False


def _check(recipe: Any, name: str, stage: Any) -> None:
    if recipe.contrastive is None:
        raise ConfigError(f"stages.{name}.loss='contrastive' needs config.contrastive: the text tower")


def _loss(model: Any, settings: NoSettings, head_trained: bool, shards: int) -> Callable:
    def contrastive(params: dict, batch: Any) -> tuple:
        image, text, scale, bias = model.apply({"params": params}, batch)
        same = (batch.tokens[:, None] == batch.tokens[None]).all(-1)
        real = batch.segments.max(1) > 0  # an epoch's last group may have rows that only fill it up
        if model.config.bias:
            loss, weight, correct = losses.sigmoid_loss(image, text, scale, bias, same, real)
        else:
            loss, weight, correct = losses.contrastive_loss(image, text, jnp.minimum(scale, 100.0), same, real)
        return loss, weight, {"correct": correct}

    return contrastive


KIND = Kind(
    int8=True,
    model=lambda recipe, options: DualEncoder(recipe.dual_encoder, **options),
    loss=_loss,
    sizes=lambda recipe: recipe.model.lvlm,
    length=lambda recipe: recipe.contrastive.text.context,
    couples=True,
    pairs=True,
    check=_check,
    text=lambda recipe: recipe.contrastive.text,
    exported=lambda recipe: {"config": recipe.dual_encoder, "image_spec": recipe.model.image},
    public=lambda recipe: public_config(recipe.dual_encoder),
)
"""Multi-positive InfoNCE, or SigLIP's pairwise loss where the text tower has a bias."""
