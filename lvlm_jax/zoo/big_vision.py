"""big_vision's names for SigLIP's two towers in a flat ``.npz``, and the config that its shapes tell.

Kernels are [in, out] there as here, those of attention have the heads on an axis of their own. Layers stand apart
(``encoderblock_0``) or, of a scanned model, in one tensor each (``encoderblock``).
Source: github.com/google-research/big_vision, models/vit.py and models/proj/image_text.
"""

import math
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import SCALAR, UNBATCHED, Row, flax_patches, stacked
from lvlm_jax.models.contrastive import DualEncoderConfig
from lvlm_jax.vision.text_tower import TextTowerConfig
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.vision.vit_jax import attention_rows, pair

LAYOUTS = {"big_vision": "img/Transformer/encoderblock_0/", "big_vision-scan": "img/Transformer/encoderblock/"}
"""Layers apart, or stacked: the name of the layout and the keys that it is known by."""


def rows(config: DualEncoderConfig, layout: str) -> list[Row]:
    """The key table of a SigLIP, less the prefix ``params/``."""
    scan = layout == "big_vision-scan"
    return [
        *vision_rows(config.vision, "vision", "img", scan),
        *_text_rows(config.text, "text", "txt", scan),
        Row("logit_scale", "t", SCALAR),
        Row("logit_bias", "b", SCALAR),
    ]


def vision_rows(config: ViTConfig, ours: str, theirs: str, scan: bool) -> list[Row]:
    """The key table of the picture tower, with its pooling head where it has one; arguments as `vision.siglip.rows`."""
    at, head = f"{ours}/" if ours else "", f"{theirs}/MAPHead_0"
    out = [
        Row(f"{at}trunk/patch_embed/kernel", f"{theirs}/embedding/kernel", flax_patches(config.patch_size)),
        Row(f"{at}trunk/patch_embed/bias", f"{theirs}/embedding/bias"),
        Row(f"{at}trunk/position_embed", f"{theirs}/pos_embedding", UNBATCHED),
        *_encoder_rows(f"{at}trunk", f"{theirs}/Transformer", config.depth, config.heads, scan),
        *pair(f"{at}post_norm", f"{theirs}/Transformer/encoder_norm", "scale"),
    ]
    if config.pool != "map":
        return out
    return [
        *out,
        Row(f"{at}head/probe", f"{head}/probe", UNBATCHED),
        *attention_rows(f"{at}head/attn", f"{head}/MultiHeadDotProductAttention_0", config.heads),
        *pair(f"{at}head/norm", f"{head}/LayerNorm_0", "scale"),
        *pair(f"{at}head/mlp/up", f"{head}/MlpBlock_0/Dense_0", "kernel"),
        *pair(f"{at}head/mlp/down", f"{head}/MlpBlock_0/Dense_1", "kernel"),
    ]


def _text_rows(config: TextTowerConfig, ours: str, theirs: str, scan: bool) -> list[Row]:
    return [
        Row(f"{ours}/embed/table", f"{theirs}/Embed_0/embedding"),
        Row(f"{ours}/position_embed", f"{theirs}/pos_embedding", UNBATCHED),
        *_encoder_rows(ours, f"{theirs}/Encoder_0", config.depth, config.heads, scan),
        *pair(f"{ours}/norm", f"{theirs}/Encoder_0/encoder_norm", "scale"),
        *pair(f"{ours}/head", f"{theirs}/head", "kernel"),
    ]


def _encoder_rows(ours: str, theirs: str, depth: int, heads: int, scan: bool) -> list[Row]:
    """The layers: of one layer's table, a row a layer, or one row for all."""

    def layer(a: str, b: str) -> list[Row]:
        return [
            *pair(f"{a}/norm1", f"{b}/LayerNorm_0", "scale"),
            *attention_rows(f"{a}/attn", f"{b}/MultiHeadDotProductAttention_0", heads),
            *pair(f"{a}/norm2", f"{b}/LayerNorm_1", "scale"),
            *pair(f"{a}/mlp/up", f"{b}/MlpBlock_0/Dense_0", "kernel"),
            *pair(f"{a}/mlp/down", f"{b}/MlpBlock_0/Dense_1", "kernel"),
        ]

    if not scan:
        names = [(f"{ours}/layers/{i}", f"{theirs}/encoderblock_{i}") for i in range(depth)]
        return [row for a, b in names for row in layer(a, b)]
    apart = [layer(f"{ours}/layers/{i}", f"{theirs}/encoderblock") for i in range(depth)]
    return [Row(tuple(row.ours for row in same), same[0].theirs, stacked(same[0].change)) for same in zip(*apart)]


def public_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The torch library's config.json of the SigLIP whose tensors have these shapes: such a file has none.

    Args:
      shapes: key, less ``params/``, -> shape.

    Raises:
      ValueError: a tensor that every SigLIP has is missing.
    """
    vocab, _ = shape_of(shapes, "txt/Embed_0/embedding")
    width, projection = shape_of(shapes, "txt/head/kernel")
    return {
        "model_type": "siglip",
        "vision_config": vision_config(shapes),
        "text_config": {
            "model_type": "siglip_text_model",
            "vocab_size": vocab,
            "max_position_embeddings": shape_of(shapes, "txt/pos_embedding")[1],
            "projection_size": projection,
            **_encoder(shapes, "txt/Encoder_0", width),
        },
    }


def vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The picture tower's part of it."""
    side, _, _, width = shape_of(shapes, "img/embedding/kernel")
    tokens = shape_of(shapes, "img/pos_embedding")[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"img/pos_embedding has {tokens} places, which are no square; only square pictures are read")
    return {
        "model_type": "siglip_vision_model",
        "image_size": math.isqrt(tokens) * side,
        "patch_size": side,
        "vision_use_head": "img/MAPHead_0/probe" in shapes,
        **_encoder(shapes, "img/Transformer", width),
    }


def _encoder(shapes: Mapping[str, tuple[int, ...]], theirs: str, width: int) -> dict[str, Any]:
    scan = f"{theirs}/encoderblock/LayerNorm_0/scale"
    if scan in shapes:
        first, depth = f"{theirs}/encoderblock", shapes[scan][0]
    else:
        first, depth = f"{theirs}/encoderblock_0", 0
        while f"{theirs}/encoderblock_{depth}/LayerNorm_0/scale" in shapes:
            depth += 1
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": shape_of(shapes, f"{first}/MultiHeadDotProductAttention_0/query/bias")[-2],
        "intermediate_size": shape_of(shapes, f"{first}/MlpBlock_0/Dense_0/bias")[-1],
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def shape_of(shapes: Mapping[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there; ValueError names it."""
    if key not in shapes:
        raise ValueError(
            f"{key} is missing; is it a whole checkpoint (of SigLIP img/, txt/, t, b; of PaliGemma img/, llm/)?"
        )
    return shapes[key]
