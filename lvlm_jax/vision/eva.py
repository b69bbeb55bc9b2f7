"""EVA-CLIP's vision towers, EVA-01 and EVA-02: sizes, timm's names and config.json.

EVA-01's giant and EVA-02's enormous have a plain feed-forward and one tensor for queries, keys and values; the enormous
has its norms behind the branches. EVA-02's base and large are gated, with norms inside attention and feed-forward, and
turn queries and keys by the patches' places. None has a bias for keys.
Source: EVA (arXiv 2211.07636), EVA-02 (arXiv 2303.11331), EVA-CLIP (arXiv 2303.15389); timm's `Eva`. The classifier of
the released towers is CLIP's projection.
"""

import re
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, joined, layer_norm, one_of, square
from lvlm_jax.vision.timm_vit import ends, mlp_rows, ratio
from lvlm_jax.vision.vit import ViTConfig

_ALL = {"norm_eps": 1e-6, "pre_norm": False, "patch_bias": True, "pool": "token", "key_bias": False}
_PLAIN = {**_ALL, "activation": "gelu"}
_GATED = {**_ALL, "activation": "silu", "gated": True, "inner_norm": True, "rotary_grid": 16}
_G = {"width": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144}
_B = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 2048}
_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 2730}
_E = {"width": 1792, "depth": 64, "heads": 16, "mlp_dim": 15360}

PRESETS: dict[str, ViTConfig] = {
    # timm/eva_giant_patch14_clip_224.laion400m and .merged2b
    "eva01_clip_g14_224": ViTConfig(image_size=224, patch_size=14, **_G, **_PLAIN, classes=1024),
    # timm/eva02_base_patch16_clip_224.merged2b
    "eva02_clip_b16_224": ViTConfig(image_size=224, patch_size=16, **_B, **_GATED, classes=512),
    # timm/eva02_large_patch14_clip_224.merged2b
    "eva02_clip_l14_224": ViTConfig(image_size=224, patch_size=14, **_L, **_GATED, classes=768),
    # timm/eva02_large_patch14_clip_336.merged2b
    "eva02_clip_l14_336": ViTConfig(image_size=336, patch_size=14, **_L, **_GATED, classes=768),
    # timm/eva02_enormous_patch14_clip_224.laion2b and .laion2b_plus
    "eva02_clip_e14_224": ViTConfig(image_size=224, patch_size=14, **_E, **_PLAIN, norm_after=True, classes=1024),
}
"""Vision towers, each as timm builds the release named beside it."""

HUB_NAMES = {
    "timm/eva_giant_patch14_clip_224.laion400m": "eva01_clip_g14_224",
    "timm/eva_giant_patch14_clip_224.merged2b": "eva01_clip_g14_224",
    "timm/eva02_base_patch16_clip_224.merged2b": "eva02_clip_b16_224",
    "timm/eva02_large_patch14_clip_224.merged2b": "eva02_clip_l14_224",
    "timm/eva02_large_patch14_clip_336.merged2b": "eva02_clip_l14_336",
    "timm/eva02_enormous_patch14_clip_224.laion2b": "eva02_clip_e14_224",
    "timm/eva02_enormous_patch14_clip_224.laion2b_plus": "eva02_clip_e14_224",
}
"""Hub name of a release -> preset."""

_ARCHITECTURES = {name.split("/")[1].partition(".")[0]: PRESETS[preset] for name, preset in HUB_NAMES.items()}
NAME = re.compile("|".join(_ARCHITECTURES))
NAMES = ", ".join(_ARCHITECTURES)
"""The architectures that are read here, and in words."""


def from_config(config: Mapping[str, Any]) -> ViTConfig:
    """The tower of a timm folder's config.json: its ``architecture``, changed by its ``model_args``.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    args = to_config(_ARCHITECTURES[config["architecture"].partition(".")[0]])["model_args"]
    for field, value in (config.get("model_args") or {}).items():
        one_of("model_args field", field, args)
        args[field] = value
    one_of("global_pool", config.get("global_pool") or args["global_pool"], ["token"])
    one_of("global_pool", args["global_pool"], ["token"])
    one_of("class_token", args["class_token"], [True])
    # The two forms of the releases: timm writes their tensors differently.
    gated = bool(args["swiglu_mlp"])
    for field in ("scale_mlp", "scale_attn_inner"):
        one_of(field, bool(args[field]), [gated])
    one_of("qkv_fused", bool(args["qkv_fused"]), [not gated])
    rotary = bool(args["use_rot_pos_emb"])
    return ViTConfig(
        image_size=square("img_size", args["img_size"]),
        patch_size=square("patch_size", args["patch_size"]),
        width=args["embed_dim"],
        depth=args["depth"],
        heads=args["num_heads"],
        mlp_dim=int(args["embed_dim"] * args["mlp_ratio"]),
        activation="silu" if gated else "gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        pool="token",
        gated=gated,
        key_bias=False,
        inner_norm=gated,
        norm_after=bool(args["use_post_norm"]),
        rotary_grid=square("ref_feat_shape", args["ref_feat_shape"] or ()) if rotary else None,
        resize="cubic_antialias" if args["dynamic_img_size"] else "none",
        classes=config.get("num_classes") or 0,
    )


def fits(config: ViTConfig) -> bool:
    """Whether timm's class, in one of the releases' two forms, can hold this tower."""
    return (
        config.is_basic_but("gated", "key_bias", "inner_norm", "norm_after", "rotary_grid", "resize")
        and not config.key_bias
        and config.class_token
        and not config.pre_norm
        and config.patch_bias
        and config.pool == "token"
        and config.norm_eps == 1e-6
        and (config.inner_norm, config.activation) == (config.gated, "silu" if config.gated else "gelu")
        and config.resize in ("none", "cubic_antialias")
    )


def to_config(config: ViTConfig) -> dict[str, Any]:
    """timm's config.json; `from_config` reads it back. Every size and part stands in ``model_args``."""
    return {
        "architecture": "eva02_large_patch14_clip_224",
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": "token",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": ratio(config),
            "qkv_fused": not config.gated,
            "swiglu_mlp": config.gated,
            "scale_mlp": config.gated,
            "scale_attn_inner": config.gated,
            "use_post_norm": config.norm_after,
            "use_rot_pos_emb": config.rotary_grid is not None,
            "ref_feat_shape": None if config.rotary_grid is None else [config.rotary_grid] * 2,
            "dynamic_img_size": config.resize != "none",
            "class_token": True,
            "global_pool": "token",
        },
    }


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower, with the classifier where the config has one.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys.
    """
    trunk, out = f"{ours}/trunk" if ours else "trunk", ends(config, ours, theirs)
    for i in range(config.depth):
        a, b = f"{trunk}/layers/{i}", f"{theirs}blocks.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.norm1") + layer_norm(f"{a}/norm2", f"{b}.norm2")
        out += (_gated_rows if config.gated else _plain_rows)(a, b)
        out += dense(f"{a}/attn/o", f"{b}.attn.proj", bias=True)
    return out


def _plain_rows(ours: str, theirs: str) -> list[Row]:
    """Queries, keys and values in one tensor, and two dense layers."""
    return [
        Row(tuple(f"{ours}/attn/{x}/kernel" for x in "qkv"), f"{theirs}.attn.qkv.weight", joined(3, TRANSPOSE)),
        Row(f"{ours}/attn/q/bias", f"{theirs}.attn.q_bias"),
        Row(f"{ours}/attn/v/bias", f"{theirs}.attn.v_bias"),
        *mlp_rows(f"{ours}/mlp", f"{theirs}.mlp"),
    ]


def _gated_rows(ours: str, theirs: str) -> list[Row]:
    """Each tensor by itself, with the norms inside."""
    out = [row for x in "qkv" for row in dense(f"{ours}/attn/{x}", f"{theirs}.attn.{x}_proj", bias=x != "k")]
    out += layer_norm(f"{ours}/attn/norm", f"{theirs}.attn.norm") + layer_norm(f"{ours}/mlp/norm", f"{theirs}.mlp.norm")
    for x, y in (("gate", "fc1_g"), ("up", "fc1_x"), ("down", "fc2")):
        out += dense(f"{ours}/mlp/{x}", f"{theirs}.mlp.{y}", bias=True)
    return out
