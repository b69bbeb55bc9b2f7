"""The plain vision transformer: sizes, checkpoint keys, config.json.

Source: ViT (arXiv 2010.11929). Keys are those that the torch library's `ViTModel` and `ViTForImageClassification` have
in every file.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import UNBATCHED, Change, Row, dense, fields, layer_norm, one_of, patches
from lvlm_jax.vision.clip import public_vision_values, vision_values
from lvlm_jax.vision.vit import ViTConfig

_TRUNK = {"activation": "gelu", "norm_eps": 1e-12, "pre_norm": False, "patch_bias": True}
_HEAD = {**_TRUNK, "pool": "token", "classes": 1000}
_BARE = {**_TRUNK, "pool": "tanh"}
_B = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}
_H = {"width": 1280, "depth": 32, "heads": 16, "mlp_dim": 5120}

PRESETS: dict[str, ViTConfig] = {
    "vit_b16_224": ViTConfig(image_size=224, patch_size=16, **_B, **_HEAD),  # google/vit-base-patch16-224
    "vit_b16_384": ViTConfig(image_size=384, patch_size=16, **_B, **_HEAD),  # google/vit-base-patch16-384
    "vit_b32_384": ViTConfig(image_size=384, patch_size=32, **_B, **_HEAD),  # google/vit-base-patch32-384
    "vit_l16_224": ViTConfig(image_size=224, patch_size=16, **_L, **_HEAD),  # google/vit-large-patch16-224
    "vit_l16_384": ViTConfig(image_size=384, patch_size=16, **_L, **_HEAD),  # google/vit-large-patch16-384
    "vit_b16_224_in21k": ViTConfig(image_size=224, patch_size=16, **_B, **_BARE),  # google/vit-base-patch16-224-in21k
    "vit_b32_224_in21k": ViTConfig(image_size=224, patch_size=32, **_B, **_BARE),  # google/vit-base-patch32-224-in21k
    "vit_l16_224_in21k": ViTConfig(image_size=224, patch_size=16, **_L, **_BARE),  # google/vit-large-patch16-224-in21k
    "vit_h14_224_in21k": ViTConfig(image_size=224, patch_size=14, **_H, **_BARE),  # google/vit-huge-patch14-224-in21k
}
"""Vision towers, each from the config.json of the release named beside it."""

HUB_NAMES = {
    "google/vit-base-patch16-224": "vit_b16_224",
    "google/vit-base-patch16-384": "vit_b16_384",
    "google/vit-base-patch32-384": "vit_b32_384",
    "google/vit-large-patch16-224": "vit_l16_224",
    "google/vit-large-patch16-384": "vit_l16_384",
    "google/vit-base-patch16-224-in21k": "vit_b16_224_in21k",
    "google/vit-base-patch32-224-in21k": "vit_b32_224_in21k",
    "google/vit-large-patch16-224-in21k": "vit_l16_224_in21k",
    "google/vit-huge-patch14-224-in21k": "vit_h14_224_in21k",
}
"""Hub name of a release -> preset."""

UNUSED: tuple[str, ...] = ()
"""Patterns of checkpoint keys that hold no weights."""

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "pooler_act": "tanh",
    "pooler_output_size": None,
    "architectures": ["ViTModel"],
}
"""What the public class assumes for fields that a config leaves out."""

LAYOUTS = ("hf-vit", "hf-vit-classifier")
"""How the torch library writes a tower alone, and one that has a classifier."""

TOKEN = Change(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
"""One learned token that torch keeps with two axes before it."""


def fits(config: ViTConfig) -> bool:
    """Whether the public class can hold this tower."""
    head = (config.pool == "token" and config.classes > 0) or (config.pool == "tanh" and config.classes == 0)
    return config.is_basic and config.class_token and not config.pre_norm and config.patch_bias and head


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower; with a pooler or a classifier where the config has one.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys. The classifier of a `ViTForImageClassification` stands outside its ``vit.``
    """
    base = f"{ours}/" if ours else ""
    out = [*embedding_rows(config, f"{base}trunk/", theirs), *layer_norm(f"{base}post_norm", f"{theirs}layernorm")]
    for i in range(config.depth):
        a, b = f"{base}trunk/layers/{i}", f"{theirs}encoder.layer.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.layernorm_before")
        out += attention_rows(f"{a}/attn", f"{b}.attention")
        out += layer_norm(f"{a}/norm2", f"{b}.layernorm_after")
        out += dense(f"{a}/mlp/up", f"{b}.intermediate.dense", bias=True)
        out += dense(f"{a}/mlp/down", f"{b}.output.dense", bias=True)
    if config.pool == "tanh":
        out += dense(f"{base}pooler", f"{theirs}pooler.dense", bias=True)
    if config.classes:
        out += dense(f"{base}classifier", f"{theirs.removesuffix('vit.')}classifier", bias=True)
    return out


def embedding_rows(config: ViTConfig, ours: str, theirs: str) -> list[Row]:
    """The key table of what stands before the first layer, which ViT and DINOv2 name alike."""
    emb = f"{theirs}embeddings."
    return [
        Row(f"{ours}class_embed", f"{emb}cls_token", TOKEN),
        Row(f"{ours}position_embed", f"{emb}position_embeddings", UNBATCHED),
        Row(f"{ours}patch_embed/kernel", f"{emb}patch_embeddings.projection.weight", patches(config.patch_size)),
        Row(f"{ours}patch_embed/bias", f"{emb}patch_embeddings.projection.bias"),
    ]


def attention_rows(ours: str, theirs: str) -> list[Row]:
    """The key table of one layer's attention, which ViT and DINOv2 name alike."""
    names = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
    return [row for x, y in names.items() for row in dense(f"{ours}/{x}", f"{theirs}.{y}", bias=True)]


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public config.json; its ``architectures`` says whether a classifier or a pooler stands behind the tower.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("qkv_bias", f["qkv_bias"], [True])
    one_of("pooler_act", f["pooler_act"], ["tanh"])
    one_of("pooler_output_size", f["pooler_output_size"], [None, f["hidden_size"]])
    kind = one_of("architectures", f["architectures"][0], ["ViTModel", "ViTForImageClassification"])
    values = {**vision_values(f), "pre_norm": False, "patch_bias": True}
    if kind == "ViTModel":
        return ViTConfig(**values, pool="tanh")
    # The torch library leaves out the names of two classes, its default.
    return ViTConfig(**values, pool="token", classes=len(f.get("id2label") or {}) or f.get("num_labels") or 2)


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    out = {"model_type": "vit", **public_vision_values(config), "qkv_bias": True, "architectures": ["ViTModel"]}
    if not config.classes:
        return {**out, "pooler_act": "tanh", "pooler_output_size": config.width}
    names = {str(i): f"LABEL_{i}" for i in range(config.classes)}
    labels = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    return {**out, "architectures": ["ViTForImageClassification"], **labels}
