"""BLIP-2's vision tower, EVA01-CLIP's giant without its last block: sizes, checkpoint keys, config.json.

What BLIP-2 reads is the whole behind the final norm, class token included (`READ`). The public class has one bias for
queries, keys and values; the part of the keys, which no score feels, is zero in the releases.
Source: BLIP-2 (arXiv 2301.12597), EVA (arXiv 2211.07636). Keys are those of the torch library's `Blip2VisionModel`,
which is what `Blip2Model` and its kin hold under ``vision_model.``
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm_jax.keymap import TRANSPOSE, UNBATCHED, Change, Row, dense, fields, joined, layer_norm, one_of, patches
from lvlm_jax.vision.clip import public_vision_values, vision_values
from lvlm_jax.vision.plain_vit import TOKEN
from lvlm_jax.vision.vit import ViTConfig

READ = {"feature_layer": -1, "feature_norm": True, "class_feature": True}
"""What a Q-Former reads of the tower, as `ViTConfig` says it."""

_TRUNK = {"norm_eps": 1e-6, "activation": "gelu", "pre_norm": False, "patch_bias": True, "pool": "token_twice", **READ}
_GIANT = {"width": 1408, "depth": 39, "heads": 16, "mlp_dim": 6144}

PRESETS: dict[str, ViTConfig] = {
    # vision_config of Salesforce/blip2-opt-2.7b, blip2-opt-6.7b and blip2-flan-t5-xl
    "blip2_vit_g14_224": ViTConfig(image_size=224, patch_size=14, **_GIANT, **_TRUNK),
    # vision_config of Salesforce/blip2-opt-2.7b-coco
    "blip2_vit_g14_364": ViTConfig(image_size=364, patch_size=14, **_GIANT, **_TRUNK),
}
"""Vision towers, each from the config.json of the releases named beside it."""

HUB_NAMES = {
    "Salesforce/blip2-opt-2.7b": "blip2_vit_g14_224",
    "Salesforce/blip2-opt-6.7b": "blip2_vit_g14_224",
    "Salesforce/blip2-flan-t5-xl": "blip2_vit_g14_224",
    "Salesforce/blip2-opt-2.7b-coco": "blip2_vit_g14_364",
}
"""Hub name of a release that holds the tower -> preset."""

LAYOUTS = ("hf-5",)
"""How the torch library writes a tower alone."""

UNUSED: tuple[str, ...] = ()
"""Patterns of checkpoint keys that hold no weights."""

DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: ViTConfig) -> bool:
    """Whether the public class can hold this tower."""
    plain = config.is_basic and config.class_token and not config.pre_norm and config.patch_bias
    return plain and config.pool == "token_twice" and not config.classes


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "vision_model.") -> list[Row]:
    """The key table of the tower.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys ("" for a tower alone).
    """
    base, emb = f"{ours}/" if ours else "", f"{theirs}embeddings."
    out = [
        Row(f"{base}trunk/class_embed", f"{emb}class_embedding", TOKEN),
        Row(f"{base}trunk/position_embed", f"{emb}position_embedding", UNBATCHED),
        Row(f"{base}trunk/patch_embed/kernel", f"{emb}patch_embedding.weight", patches(config.patch_size)),
        Row(f"{base}trunk/patch_embed/bias", f"{emb}patch_embedding.bias"),
        *layer_norm(f"{base}post_norm", f"{theirs}post_layernorm"),
    ]
    for i in range(config.depth):
        a, b = f"{base}trunk/layers/{i}", f"{theirs}encoder.layers.{i}"
        qkv = [f"{a}/attn/{name}" for name in "qkv"]
        out += layer_norm(f"{a}/norm1", f"{b}.layer_norm1") + layer_norm(f"{a}/norm2", f"{b}.layer_norm2")
        out += [
            Row(tuple(f"{x}/kernel" for x in qkv), f"{b}.self_attn.qkv.weight", joined(3, TRANSPOSE)),
            Row(tuple(f"{x}/bias" for x in qkv), f"{b}.self_attn.qkv.bias", joined(3)),
            *dense(f"{a}/attn/o", f"{b}.self_attn.projection", bias=True),
            *dense(f"{a}/mlp/up", f"{b}.mlp.fc1", bias=True),
            *dense(f"{a}/mlp/down", f"{b}.mlp.fc2", bias=True),
        ]
    return out


_NO_KEY_BIAS = Change(lambda x: (x, np.zeros_like(x)), lambda q, k: q)
"""The queries' bias, of a tower whose keys have none; no score feels that of the keys, so that it may go."""


def authors_rows(
    config: ViTConfig, ours: str = "vision", theirs: str = "visual_encoder.", norm: str = "ln_vision"
) -> list[Row]:
    """The key table under the authors' names, which are EVA's own; the last norm is BLIP-2's.

    Args:
      ours: path of the tower's parameters.
      theirs: prefix of its keys ("" in EVA's file).
      norm: the last norm's.
    """
    out = [
        Row(f"{ours}/trunk/class_embed", f"{theirs}cls_token", TOKEN),
        Row(f"{ours}/trunk/position_embed", f"{theirs}pos_embed", UNBATCHED),
        Row(f"{ours}/trunk/patch_embed/kernel", f"{theirs}patch_embed.proj.weight", patches(config.patch_size)),
        Row(f"{ours}/trunk/patch_embed/bias", f"{theirs}patch_embed.proj.bias"),
        *layer_norm(f"{ours}/post_norm", norm),
    ]
    for i in range(config.depth):
        a, b = f"{ours}/trunk/layers/{i}", f"{theirs}blocks.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.norm1") + layer_norm(f"{a}/norm2", f"{b}.norm2")
        out += [
            Row(tuple(f"{a}/attn/{x}/kernel" for x in "qkv"), f"{b}.attn.qkv.weight", joined(3, TRANSPOSE)),
            (
                Row((f"{a}/attn/q/bias", f"{a}/attn/k/bias"), f"{b}.attn.q_bias", _NO_KEY_BIAS)
                if config.key_bias
                else Row(f"{a}/attn/q/bias", f"{b}.attn.q_bias")
            ),
            Row(f"{a}/attn/v/bias", f"{b}.attn.v_bias"),
            *dense(f"{a}/attn/o", f"{b}.attn.proj", bias=True),
            *dense(f"{a}/mlp/up", f"{b}.mlp.fc1", bias=True),
            *dense(f"{a}/mlp/down", f"{b}.mlp.fc2", bias=True),
        ]
    return out


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public vision config (``vision_config`` of a BLIP-2, or a tower's own config.json), read as a Q-Former does.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("qkv_bias", f["qkv_bias"], [True])
    return ViTConfig(**vision_values(f), pre_norm=False, patch_bias=True, pool="token_twice", **READ)


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public vision config; `from_hf` reads it back."""
    return {"model_type": "blip_2_vision_model", **public_vision_values(config), "qkv_bias": True}
