"""Vision towers, and the text towers that stand beside them: one family a file."""

import dataclasses
from types import ModuleType
from typing import Any

from lvlm_jax.vision import (
    blip2_vit,
    clip,
    dinov2,
    eva,
    nfnet,
    plain_vit,
    qwen_vl,
    siglip,
    siglip2,
    timm,
    video,
    vit_jax,
)
from lvlm_jax.vision.native import NativeViT, NativeViTConfig, check_pictures
from lvlm_jax.vision.nfnet import NFNet, NFNetConfig
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.video import ClipConfig
from lvlm_jax.vision.vit import ViT, ViTConfig, patchify

VisionConfig = ViTConfig | ClipConfig | NFNetConfig | NativeViTConfig
"""What a model may hold as its tower: image_size, patch_size, patches and values say how it is fed, features and width
what it gives, `build` makes the module; `frames` vision rows are read as one (1: each by itself)."""

FAMILIES: dict[str, ModuleType] = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
    "siglip2_vision_model": siglip2,
    "vit": plain_vit,
    "dinov2": dinov2,
    "dinov2_with_registers": dinov2,
    "blip_2_vision_model": blip2_vit,
    "timm_wrapper": timm,
    nfnet.MODEL_TYPE: nfnet,
    **dict.fromkeys(qwen_vl.TOWERS, qwen_vl),
}
"""Public ``model_type`` -> module with LAYOUTS, rows, from_hf, to_hf, fits."""

CONVOLUTIONAL = ("timm_wrapper", nfnet.MODEL_TYPE)
"""The families that hold towers which are no transformers."""


def family_of(config: VisionConfig) -> str:
    """The public ``model_type`` that can hold a tower of these values.

    Raises:
      ValueError: no public family has this combination.
    """
    if isinstance(config, NativeViTConfig):
        return qwen_vl.type_of(config)
    for name, family in FAMILIES.items():
        if (isinstance(config, ViTConfig) or name in CONVOLUTIONAL) and family.fits(config):
            return name
    raise ValueError(
        f"no public family ({', '.join(FAMILIES)}) holds a vision tower with class_token={config.class_token}, "
        f"pre_norm={config.pre_norm}, patch_bias={config.patch_bias}, pool={config.pool!r}, "
        f"layer_scale={config.layer_scale}, key_bias={config.key_bias}, rotary_grid={config.rotary_grid}, "
        f"resize={config.resize!r} and classes={config.classes}; "
        "CLIP's has the first two and no patch bias, SigLIP's the reverse, ViT's and DINOv2's have the first and a bias"
    )


def reading(config: VisionConfig, **fields: Any) -> VisionConfig:
    """The tower with another choice of what is read of it: feature_layer, class_feature, feature_norm.

    Raises:
      ValueError: a choice that this kind of tower does not have.
    """
    other = {name: value for name, value in fields.items() if getattr(config, name) != value}
    for name in other.keys() - {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"{name}={other[name]!r}: a tower of {type(config).__name__} has no such thing; leave it out")
    return dataclasses.replace(config, **other)


TEXT_FAMILIES: dict[str, ModuleType] = {
    "clip_text_model": clip,
    "siglip_text_model": siglip,
    "siglip2_text_model": siglip2,
}
"""Public ``model_type`` -> module with TEXT_PRESETS, text_rows, text_from_hf, text_to_hf, text_fits.

SigLIP 2's text tower is SigLIP's, value by value: it is read under its own name and found under the first."""


def text_family_of(config: TextTowerConfig) -> str:
    """The public ``model_type`` that can hold a text tower of these values.

    Raises:
      ValueError: no public family has this combination.
    """
    for name, family in TEXT_FAMILIES.items():
        if family.text_fits(config):
            return name
    raise ValueError(
        f"no public family ({', '.join(TEXT_FAMILIES)}) holds a text tower with causal={config.causal}, "
        f"pool={config.pool!r}, head={config.head}; CLIP's is causal, pools at an id and has no head, SigLIP's the "
        "reverse"
    )


__all__ = [
    "CONVOLUTIONAL",
    "FAMILIES",
    "TEXT_FAMILIES",
    "ClipConfig",
    "NFNet",
    "NFNetConfig",
    "NativeViT",
    "NativeViTConfig",
    "TextTowerConfig",
    "ViT",
    "ViTConfig",
    "VisionConfig",
    "blip2_vit",
    "check_pictures",
    "clip",
    "eva",
    "family_of",
    "nfnet",
    "patchify",
    "qwen_vl",
    "reading",
    "siglip",
    "text_family_of",
    "timm",
    "video",
    "vit_jax",
]
