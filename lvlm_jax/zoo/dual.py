"""CLIP, SigLIP and SigLIP 2, whole: sizes by name, key table, config.json both ways."""

from collections.abc import Mapping
from typing import Any

from lvlm_jax import vision
from lvlm_jax.keymap import SCALAR, Row, dense, one_of
from lvlm_jax.models.contrastive import DualEncoderConfig
from lvlm_jax.vision import clip, siglip, siglip2

PRESETS: dict[str, DualEncoderConfig] = {
    # The joint width of each release: its config.json's projection_dim.
    "clip_b32": DualEncoderConfig(vision=clip.PRESETS["clip_b32"], text=clip.TEXT_PRESETS["clip_b32"], projection=512),
    "clip_b16": DualEncoderConfig(vision=clip.PRESETS["clip_b16"], text=clip.TEXT_PRESETS["clip_b16"], projection=512),
    "clip_l14": DualEncoderConfig(vision=clip.PRESETS["clip_l14"], text=clip.TEXT_PRESETS["clip_l14"], projection=768),
    "clip_l14_336": DualEncoderConfig(
        vision=clip.PRESETS["clip_l14_336"], text=clip.TEXT_PRESETS["clip_l14_336"], projection=768
    ),
} | {
    name: DualEncoderConfig(vision=tower, text=family.TEXT_PRESETS[name], bias=True)
    for family in (siglip, siglip2)
    for name, tower in family.PRESETS.items()
}
"""Dual encoders by name; the releases are named in `vision.clip`, `vision.siglip` and `vision.siglip2`."""

"""Patterns of checkpoint keys that hold no weights."""


def rows(config: DualEncoderConfig) -> list[Row]:
    """The key table of a dual encoder; its keys are the same in memory and in every file.

    SigLIP keeps its two numbers with one axis, CLIP its one with none.
    """
    out = vision.FAMILIES[vision.family_of(config.vision)].rows(config.vision, "vision", "vision_model.")
    out += vision.TEXT_FAMILIES[vision.text_family_of(config.text)].text_rows(config.text, "text", "text_model.")
    if config.projection:
        out += dense("visual_projection", "visual_projection") + dense("text_projection", "text_projection")
    if config.bias:
        return [*out, Row("logit_scale", "logit_scale", SCALAR), Row("logit_bias", "logit_bias", SCALAR)]
    return [*out, Row("logit_scale", "logit_scale")]


def from_hf(config: Mapping[str, Any]) -> DualEncoderConfig:
    """The model from the torch library's config.json.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    return _READERS[one_of("model_type", config.get("model_type"), _READERS)](config)


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One tower's entry; old files repeat it, complete, under a second name that wins."""
    return {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}


def _clip_from_hf(config: Mapping[str, Any]) -> DualEncoderConfig:
    return DualEncoderConfig(
        vision=clip.from_hf(_part(config, "vision_config")),
        text=clip.text_from_hf(_part(config, "text_config")),
        projection=config.get("projection_dim") or 512,
    )


def _siglip_from_hf(config: Mapping[str, Any]) -> DualEncoderConfig:
    family = {"siglip": siglip, "siglip2": siglip2}[config["model_type"]]
    return DualEncoderConfig(
        vision=family.from_hf(_part(config, "vision_config")),
        text=family.text_from_hf(_part(config, "text_config")),
        bias=True,
    )


_READERS = {"clip": _clip_from_hf, "siglip": _siglip_from_hf, "siglip2": _siglip_from_hf}

TYPES = tuple(_READERS)
"""Every public ``model_type`` of a dual encoder."""


def to_hf(config: DualEncoderConfig) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back.

    Raises:
      ValueError: no public class holds this pair of towers.
    """
    pair = (vision.family_of(config.vision), vision.text_family_of(config.text), bool(config.projection), config.bias)
    kinds = {
        ("clip_vision_model", "clip_text_model", True, False): _clip_to_hf,
        ("siglip_vision_model", "siglip_text_model", False, True): _siglip_to_hf,
        ("siglip2_vision_model", "siglip_text_model", False, True): _siglip2_to_hf,
    }
    if pair not in kinds:
        raise ValueError(
            f"no public class holds a {pair[0]} with a {pair[1]}, projection={config.projection}, bias={config.bias}; "
            "CLIP has a projection and no bias, SigLIP the reverse"
        )
    return kinds[pair](config)


def _clip_to_hf(config: DualEncoderConfig) -> dict[str, Any]:
    width = {"projection_dim": config.projection}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "vision_config": clip.to_hf(config.vision) | width,
        "text_config": clip.text_to_hf(config.text) | width,
        **width,
    }


def _siglip_to_hf(config: DualEncoderConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "vision_config": siglip.to_hf(config.vision),
        "text_config": siglip.text_to_hf(config.text),
    }


def _siglip2_to_hf(config: DualEncoderConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip2",
        "architectures": ["Siglip2Model"],
        "vision_config": siglip2.to_hf(config.vision),
        "text_config": siglip2.text_to_hf(config.text),
    }
