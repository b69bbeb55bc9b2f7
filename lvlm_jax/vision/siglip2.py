"""SigLIP 2's towers for pictures of any shape (NaFlex): sizes, checkpoint keys, config.json.

A picture keeps its shape: it comes in at most so many patches, and the position table is resized to its own grid. The
releases of one fixed size are SigLIP's towers with another vocabulary and stand there (`vision.siglip`).
Source: SigLIP 2 (arXiv 2502.14786). Keys are those of the torch library's `Siglip2Model`, `Siglip2VisionModel` and
`Siglip2TextModel`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import Row, dense, fields, square
from lvlm_jax.vision import siglip
from lvlm_jax.vision.clip import public_vision_values, vision_values
from lvlm_jax.vision.siglip import text_fits, text_from_hf, text_rows
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig

__all__ = [
    "HUB_NAMES",
    "LAYOUTS",
    "PRESETS",
    "TEXT_PRESETS",
    "UNUSED",
    "fits",
    "from_hf",
    "rows",
    "text_fits",
    "text_from_hf",
    "text_rows",
    "text_to_hf",
    "to_hf",
]

_NAFLEX = {"resize": "linear_antialias"}

PRESETS: dict[str, ViTConfig] = {
    # google/siglip2-base-patch16-naflex and google/siglip2-so400m-patch16-naflex: a table of 16 x 16 places
    "siglip2_b16_naflex": dataclasses.replace(siglip.PRESETS["siglip_b16_224"], image_size=256, **_NAFLEX),
    "siglip2_so400m_16_naflex": dataclasses.replace(
        siglip.PRESETS["siglip_so400m_14_384"], image_size=256, patch_size=16, **_NAFLEX
    ),
}
"""Vision towers, each from the config.json of the release named beside it."""

TEXT_PRESETS: dict[str, TextTowerConfig] = {
    "siglip2_b16_naflex": siglip.TEXT_PRESETS["siglip2_b16_224"],
    "siglip2_so400m_16_naflex": siglip.TEXT_PRESETS["siglip2_so400m_14_384"],
}
"""The text tower of each release."""

HUB_NAMES = {
    "google/siglip2-base-patch16-naflex": "siglip2_b16_naflex",
    "google/siglip2-so400m-patch16-naflex": "siglip2_so400m_16_naflex",
}
"""Hub name of a release -> preset."""

LAYOUTS, UNUSED = siglip.LAYOUTS, siglip.UNUSED
"""Patterns of checkpoint keys that hold no weights."""

VISION_DEFAULTS = {name: value for name, value in siglip.VISION_DEFAULTS.items() if name != "image_size"} | {
    "num_patches": 256
}
"""What the public class assumes for fields that a vision config leaves out."""


def fits(config: ViTConfig) -> bool:
    """Whether SigLIP 2's public class can hold this tower."""
    plain = dataclasses.replace(config, resize="none", max_patches=None)
    whole = config.image_size == config.grid * config.patch_size
    return config.resize == "linear_antialias" and whole and siglip.fits(plain)


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "vision_model.") -> list[Row]:
    """The key table of the vision tower: SigLIP's, with patches that meet a dense layer in place of a convolution.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys, e.g. ``vision_tower.vision_model.``
    """
    base = f"{ours}/" if ours else ""
    patch = dense(f"{base}trunk/patch_embed", f"{theirs}embeddings.patch_embedding", bias=True)
    mine = {row.theirs for row in patch}
    return patch + [row for row in siglip.rows(config, ours, theirs) if row.theirs not in mine]


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public vision config (``vision_config`` of a larger one, or a tower's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, VISION_DEFAULTS)
    side = math.isqrt(f["num_patches"])
    if side * side != f["num_patches"]:
        raise ValueError(
            f"config.json: num_patches is {f['num_patches']}, which is not supported; supported: the square of a side"
        )
    values = vision_values({**f, "image_size": side * square("patch_size", f["patch_size"])})
    pool = "map" if f["vision_use_head"] else "none"
    return ViTConfig(**values, class_token=False, pre_norm=False, patch_bias=True, pool=pool, resize="linear_antialias")


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public vision config; `from_hf` reads it back."""
    values = {name: value for name, value in public_vision_values(config).items() if name != "image_size"}
    rest = {"num_patches": config.grid**2, "vision_use_head": config.pool == "map"}
    return {"model_type": "siglip2_vision_model", **values, **rest}


def text_to_hf(config: TextTowerConfig) -> dict[str, Any]:
    """The public text config; `text_from_hf` reads it back."""
    return {**siglip.text_to_hf(config), "model_type": "siglip2_text_model"}
