"""SigLIP's vision and text towers, and SigLIP 2's of one fixed size: sizes, checkpoint keys, config.json.

Source: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786): the same towers with Gemma's vocabulary. Keys are those
of the torch library's `SiglipModel`, `SiglipVisionModel` and `SiglipTextModel`.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, UNBATCHED, Row, dense, fields, joined, layer_norm, patches
from lvlm_jax.vision.clip import (
    encoder_rows,
    public_text_values,
    public_vision_values,
    text_values,
    vision_values,
)
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig

_TRUNK = {
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "class_token": False,
    "pre_norm": False,
    "patch_bias": True,
    "pool": "map",
}
_B = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}
_SO400M = {"width": 1152, "depth": 27, "heads": 16, "mlp_dim": 4304}
_GIANT = {"width": 1536, "depth": 40, "heads": 16, "mlp_dim": 6144}


def _tower(image_size: int, patch_size: int, sizes: Mapping[str, int]) -> ViTConfig:
    return ViTConfig(image_size=image_size, patch_size=patch_size, **sizes, **_TRUNK)


PRESETS: dict[str, ViTConfig] = {
    "siglip_b16_224": ViTConfig(image_size=224, patch_size=16, **_B, **_TRUNK),  # google/siglip-base-patch16-224
    "siglip_b16_384": ViTConfig(image_size=384, patch_size=16, **_B, **_TRUNK),  # google/siglip-base-patch16-384
    "siglip_l16_256": ViTConfig(image_size=256, patch_size=16, **_L, **_TRUNK),  # google/siglip-large-patch16-256
    "siglip_l16_384": ViTConfig(image_size=384, patch_size=16, **_L, **_TRUNK),  # google/siglip-large-patch16-384
    # google/siglip-so400m-patch14-384: a grid of 27, the last 6 rows and columns of pixels are not read
    "siglip_so400m_14_384": ViTConfig(image_size=384, patch_size=14, **_SO400M, **_TRUNK),
    "siglip2_b16_224": _tower(224, 16, _B),  # google/siglip2-base-patch16-224
    "siglip2_b16_256": _tower(256, 16, _B),  # google/siglip2-base-patch16-256
    "siglip2_b16_384": _tower(384, 16, _B),  # google/siglip2-base-patch16-384
    "siglip2_b16_512": _tower(512, 16, _B),  # google/siglip2-base-patch16-512
    "siglip2_b32_256": _tower(256, 32, _B),  # google/siglip2-base-patch32-256
    "siglip2_l16_256": _tower(256, 16, _L),  # google/siglip2-large-patch16-256
    "siglip2_l16_384": _tower(384, 16, _L),  # google/siglip2-large-patch16-384
    "siglip2_l16_512": _tower(512, 16, _L),  # google/siglip2-large-patch16-512
    "siglip2_so400m_14_224": _tower(224, 14, _SO400M),  # google/siglip2-so400m-patch14-224
    "siglip2_so400m_14_384": _tower(384, 14, _SO400M),  # google/siglip2-so400m-patch14-384
    "siglip2_so400m_16_256": _tower(256, 16, _SO400M),  # google/siglip2-so400m-patch16-256
    "siglip2_so400m_16_384": _tower(384, 16, _SO400M),  # google/siglip2-so400m-patch16-384
    "siglip2_so400m_16_512": _tower(512, 16, _SO400M),  # google/siglip2-so400m-patch16-512
    "siglip2_g16_256": _tower(256, 16, _GIANT),  # google/siglip2-giant-opt-patch16-256
    "siglip2_g16_384": _tower(384, 16, _GIANT),  # google/siglip2-giant-opt-patch16-384
}
"""Vision towers, each from the config.json of the release named beside it."""

_TEXT = {
    "vocab": 32000,
    "context": 64,
    "activation": "gelu_tanh",
    "norm_eps": 1e-6,
    "causal": False,
    "pool": "last",
}
_TEXT_B = TextTowerConfig(**_B, **_TEXT, head=768)
_TEXT_L = TextTowerConfig(**_L, **_TEXT, head=1024)

# SigLIP 2 reads Gemma's vocabulary; its giant has the text tower of the So400m, as wide at the end as its own pictures.
_WORDS_2 = _TEXT | {"vocab": 256000}
_TEXT_2 = {
    "b": TextTowerConfig(**_B, **_WORDS_2, head=768),
    "l": TextTowerConfig(**_L, **_WORDS_2, head=1024),
    "s": TextTowerConfig(**_SO400M, **_WORDS_2, head=1152),
    "g": TextTowerConfig(**_SO400M, **_WORDS_2, head=1536),
}

TEXT_PRESETS: dict[str, TextTowerConfig] = {
    "siglip_b16_224": _TEXT_B,
    "siglip_b16_384": _TEXT_B,
    "siglip_l16_256": _TEXT_L,
    "siglip_l16_384": _TEXT_L,
    "siglip_so400m_14_384": TextTowerConfig(**_SO400M, **_TEXT, head=1152),
} | {name: _TEXT_2[name.split("_")[1][0]] for name in PRESETS if name.startswith("siglip2_")}
"""The text tower of each release."""

HUB_NAMES = {
    "google/siglip-base-patch16-224": "siglip_b16_224",
    "google/siglip-base-patch16-384": "siglip_b16_384",
    "google/siglip-large-patch16-256": "siglip_l16_256",
    "google/siglip-large-patch16-384": "siglip_l16_384",
    "google/siglip-so400m-patch14-384": "siglip_so400m_14_384",
    "google/siglip2-base-patch16-224": "siglip2_b16_224",
    "google/siglip2-base-patch16-256": "siglip2_b16_256",
    "google/siglip2-base-patch16-384": "siglip2_b16_384",
    "google/siglip2-base-patch16-512": "siglip2_b16_512",
    "google/siglip2-base-patch32-256": "siglip2_b32_256",
    "google/siglip2-large-patch16-256": "siglip2_l16_256",
    "google/siglip2-large-patch16-384": "siglip2_l16_384",
    "google/siglip2-large-patch16-512": "siglip2_l16_512",
    "google/siglip2-so400m-patch14-224": "siglip2_so400m_14_224",
    "google/siglip2-so400m-patch14-384": "siglip2_so400m_14_384",
    "google/siglip2-so400m-patch16-256": "siglip2_so400m_16_256",
    "google/siglip2-so400m-patch16-384": "siglip2_so400m_16_384",
    "google/siglip2-so400m-patch16-512": "siglip2_so400m_16_512",
    "google/siglip2-giant-opt-patch16-256": "siglip2_g16_256",
    "google/siglip2-giant-opt-patch16-384": "siglip2_g16_384",
}
"""Hub name of a release -> preset."""

UNUSED = (r".*embeddings\.position_ids",)
"""Patterns of checkpoint keys that hold no weights."""

LAYOUTS = ("hf-4", "hf-5")
"""How versions 4 and 5 of the torch library write a tower alone."""

VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
"""What the public class assumes for fields that a vision config leaves out."""

TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
"""What the public class assumes for fields that a text config leaves out."""


def fits(config: ViTConfig) -> bool:
    """Whether SigLIP's public class can hold this tower."""
    plain = config.is_basic and not config.classes and not config.class_token
    return plain and not config.pre_norm and config.patch_bias and config.pool in ("map", "none")


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "vision_model.") -> list[Row]:
    """The key table of the vision tower; with a pooling head where the config has one.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys, e.g. ``vision_tower.vision_model.``
    """
    base, emb = f"{ours}/" if ours else "", f"{theirs}embeddings."
    return [
        Row(f"{base}trunk/patch_embed/kernel", f"{emb}patch_embedding.weight", patches(config.patch_size)),
        Row(f"{base}trunk/patch_embed/bias", f"{emb}patch_embedding.bias"),
        Row(f"{base}trunk/position_embed", f"{emb}position_embedding.weight"),
        *encoder_rows(config.depth, f"{base}trunk/", theirs),
        *layer_norm(f"{base}post_norm", f"{theirs}post_layernorm"),
        *(_head_rows(f"{base}head", f"{theirs}head") if config.pool == "map" else ()),
    ]


def _head_rows(ours: str, theirs: str) -> list[Row]:
    """Attention pooling: queries, keys and values stand in one tensor there."""
    attn = f"{ours}/attn"
    return [
        Row(f"{ours}/probe", f"{theirs}.probe", UNBATCHED),
        Row(
            (f"{attn}/q/kernel", f"{attn}/k/kernel", f"{attn}/v/kernel"),
            f"{theirs}.attention.in_proj_weight",
            joined(3, TRANSPOSE),
        ),
        Row((f"{attn}/q/bias", f"{attn}/k/bias", f"{attn}/v/bias"), f"{theirs}.attention.in_proj_bias", joined(3)),
        *dense(f"{attn}/o", f"{theirs}.attention.out_proj", bias=True),
        *layer_norm(f"{ours}/norm", f"{theirs}.layernorm"),
        *dense(f"{ours}/mlp/up", f"{theirs}.mlp.fc1", bias=True),
        *dense(f"{ours}/mlp/down", f"{theirs}.mlp.fc2", bias=True),
    ]


def text_fits(config: TextTowerConfig) -> bool:
    """Whether SigLIP's public class can hold this text tower."""
    return not config.causal and config.pool == "last" and config.head is not None


def text_rows(config: TextTowerConfig, ours: str = "text", theirs: str = "text_model.") -> list[Row]:
    """The key table of the text tower; arguments as `rows`."""
    base, emb = f"{ours}/" if ours else "", f"{theirs}embeddings."
    return [
        Row(f"{base}embed/table", f"{emb}token_embedding.weight"),
        Row(f"{base}position_embed", f"{emb}position_embedding.weight"),
        *encoder_rows(config.depth, base, theirs),
        *layer_norm(f"{base}norm", f"{theirs}final_layer_norm"),
        *dense(f"{base}head", f"{theirs}head", bias=True),
    ]


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public vision config (``vision_config`` of a larger one, or a tower's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, VISION_DEFAULTS)
    pool = "map" if f["vision_use_head"] else "none"
    return ViTConfig(**vision_values(f), class_token=False, pre_norm=False, patch_bias=True, pool=pool)


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public vision config; `from_hf` reads it back."""
    values = public_vision_values(config)
    return {"model_type": "siglip_vision_model", **values, "vision_use_head": config.pool == "map"}


def text_from_hf(config: Mapping[str, Any]) -> TextTowerConfig:
    """A public text config."""
    f = fields(config, TEXT_DEFAULTS)
    head = f["projection_size"] or f["hidden_size"]
    return TextTowerConfig(**text_values(f), causal=False, pool="last", head=head)


def text_to_hf(config: TextTowerConfig) -> dict[str, Any]:
    """The public text config; `text_from_hf` reads it back."""
    return {"model_type": "siglip_text_model", **public_text_values(config), "projection_size": config.head}
