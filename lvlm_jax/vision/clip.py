"""CLIP's vision and text towers: sizes, checkpoint keys, config.json.

Source: CLIP (arXiv 2103.00020). Keys are those of the torch library's `CLIPModel`, `CLIPVisionModel` and
`CLIPTextModel`; `pre_layrnorm` is spelt as in the files.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    Row,
    activation,
    dense,
    fields,
    layer_norm,
    one_of,
    patches,
    square,
)
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig

_B = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}

PRESETS: dict[str, ViTConfig] = {
    "clip_b32": ViTConfig(image_size=224, patch_size=32, **_B),  # openai/clip-vit-base-patch32
    "clip_b16": ViTConfig(image_size=224, patch_size=16, **_B),  # openai/clip-vit-base-patch16
    "clip_l14": ViTConfig(image_size=224, patch_size=14, **_L),  # openai/clip-vit-large-patch14
    "clip_l14_336": ViTConfig(image_size=336, patch_size=14, **_L),  # openai/clip-vit-large-patch14-336
}
"""Vision towers, each from the config.json of the release named beside it."""

_TEXT_B = TextTowerConfig(vocab=49408, width=512, depth=12, heads=8, mlp_dim=2048, context=77)
_TEXT_L = TextTowerConfig(vocab=49408, width=768, depth=12, heads=12, mlp_dim=3072, context=77)

TEXT_PRESETS: dict[str, TextTowerConfig] = {
    "clip_b32": _TEXT_B,
    "clip_b16": _TEXT_B,
    "clip_l14": _TEXT_L,
    "clip_l14_336": _TEXT_L,
}
"""The text tower of each release."""

HUB_NAMES = {
    "openai/clip-vit-base-patch32": "clip_b32",
    "openai/clip-vit-base-patch16": "clip_b16",
    "openai/clip-vit-large-patch14": "clip_l14",
    "openai/clip-vit-large-patch14-336": "clip_l14_336",
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
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What the public class assumes for fields that a vision config leaves out."""

TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
"""What the public class assumes for fields that a text config leaves out."""


def fits(config: ViTConfig) -> bool:
    """Whether CLIP's public class can hold this tower."""
    plain = config.is_basic and not config.classes
    return plain and config.class_token and config.pre_norm and not config.patch_bias and config.pool == "class"


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "vision_model.") -> list[Row]:
    """The key table of the vision tower.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys, e.g. ``vision_tower.vision_model.``
    """
    base, trunk, emb = _join(ours, ""), _join(ours, "trunk/"), f"{theirs}embeddings."
    return [
        Row(f"{trunk}patch_embed/kernel", f"{emb}patch_embedding.weight", patches(config.patch_size)),
        Row(f"{trunk}class_embed", f"{emb}class_embedding"),
        Row(f"{trunk}position_embed", f"{emb}position_embedding.weight"),
        *layer_norm(f"{trunk}pre_norm", f"{theirs}pre_layrnorm"),
        *encoder_rows(config.depth, trunk, theirs),
        *layer_norm(f"{base}post_norm", f"{theirs}post_layernorm"),
    ]


def text_fits(config: TextTowerConfig) -> bool:
    """Whether CLIP's public class can hold this text tower."""
    return config.causal and config.pool in ("eos", "argmax") and config.head is None


def text_rows(config: TextTowerConfig, ours: str = "text", theirs: str = "text_model.") -> list[Row]:
    """The key table of the text tower; arguments as `rows`."""
    base, emb = _join(ours, ""), f"{theirs}embeddings."
    return [
        Row(f"{base}embed/table", f"{emb}token_embedding.weight"),
        Row(f"{base}position_embed", f"{emb}position_embedding.weight"),
        *encoder_rows(config.depth, base, theirs),
        *layer_norm(f"{base}norm", f"{theirs}final_layer_norm"),
    ]


def encoder_rows(depth: int, ours: str, theirs: str) -> list[Row]:
    """The key table of an encoder's layers, which CLIP and SigLIP name alike, in both towers.

    Args:
      ours: path before ``layers/0``, ending in a slash (or empty).
      theirs: prefix before ``encoder.layers.0``, ending in a dot (or empty).
    """
    out: list[Row] = []
    for i in range(depth):
        a, b = f"{ours}layers/{i}", f"{theirs}encoder.layers.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.layer_norm1")
        for x, y in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            out += dense(f"{a}/attn/{x}", f"{b}.self_attn.{y}", bias=True)
        out += layer_norm(f"{a}/norm2", f"{b}.layer_norm2")
        out += dense(f"{a}/mlp/up", f"{b}.mlp.fc1", bias=True)
        out += dense(f"{a}/mlp/down", f"{b}.mlp.fc2", bias=True)
    return out


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public vision config (``vision_config`` of a larger one, or a tower's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    return ViTConfig(**vision_values(fields(config, VISION_DEFAULTS)))


def vision_values(f: Mapping[str, Any]) -> dict[str, Any]:
    """The `ViTConfig` fields that CLIP and SigLIP write under the same public names."""
    one_of("num_channels", f["num_channels"], [3])
    return {
        "image_size": square("image_size", f["image_size"]),
        "patch_size": square("patch_size", f["patch_size"]),
        "width": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "mlp_dim": f["intermediate_size"],
        "activation": activation("hidden_act", f["hidden_act"]),
        "norm_eps": float(f["layer_norm_eps"]),
    }


def public_vision_values(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `vision_values`."""
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": PUBLIC_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public vision config; `from_hf` reads it back."""
    return {"model_type": "clip_vision_model", **public_vision_values(config)}


def text_from_hf(config: Mapping[str, Any]) -> TextTowerConfig:
    """A public text config. An eos id of 2 is the mark of the pooling rule by largest id."""
    f = fields(config, TEXT_DEFAULTS)
    if not isinstance(f["eos_token_id"], int):
        raise ValueError(
            f"config.json: eos_token_id is {f['eos_token_id']!r}, which is not supported; supported: one id"
        )
    return TextTowerConfig(
        **text_values(f), pool="argmax" if f["eos_token_id"] == 2 else "eos", eos_id=f["eos_token_id"]
    )


def text_values(f: Mapping[str, Any]) -> dict[str, Any]:
    """The `TextTowerConfig` fields that CLIP and SigLIP write under the same public names."""
    return {
        "vocab": f["vocab_size"],
        "width": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "mlp_dim": f["intermediate_size"],
        "context": f["max_position_embeddings"],
        "activation": activation("hidden_act", f["hidden_act"]),
        "norm_eps": float(f["layer_norm_eps"]),
    }


def public_text_values(config: TextTowerConfig) -> dict[str, Any]:
    """The inverse of `text_values`."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context,
        "hidden_act": PUBLIC_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def text_to_hf(config: TextTowerConfig) -> dict[str, Any]:
    """The public text config; `text_from_hf` reads it back."""
    return {
        "model_type": "clip_text_model",
        **public_text_values(config),
        "eos_token_id": 2 if config.pool == "argmax" else config.eos_id,
    }


def _join(ours: str, rest: str) -> str:
    return f"{ours}/{rest}" if ours else rest
