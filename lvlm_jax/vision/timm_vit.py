"""timm's names for a plain vision transformer, and its config.json: one of the families of `vision.timm`.

The tower is `vision.plain_vit`'s with a smaller epsilon; queries, keys and values stand in one tensor.
Source: timm's `VisionTransformer` (github.com/huggingface/pytorch-image-models).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, UNBATCHED, Change, Row, dense, joined, layer_norm, one_of, patches
from lvlm_jax.vision.plain_vit import TOKEN
from lvlm_jax.vision.vit import ViTConfig

SIZES = {
    # name in the architecture -> width, depth, heads; the feed-forward is four times as wide
    "tiny": (192, 12, 3),  # vit_tiny_patch16_224
    "small": (384, 12, 6),  # vit_small_patch16_224
    "base": (768, 12, 12),  # vit_base_patch16_224
    "large": (1024, 24, 16),  # vit_large_patch16_224
    "huge": (1280, 32, 16),  # vit_huge_patch14_224
}
"""Sizes by name, as the releases are built."""

NAME = re.compile(rf"vit_({'|'.join(SIZES)})_patch(\d+)_(\d+)")
NAMES = f"vit_SIZE_patchP_R, SIZE being {', '.join(SIZES)}"
"""The architectures that are read here, and in words."""

_ARGS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "class_token", "global_pool")
_POOLS = {"token": "token", "map": "map"}


def from_config(config: Mapping[str, Any]) -> ViTConfig:
    """The tower of a timm folder's config.json: its ``architecture``, changed by its ``model_args``.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    found = NAME.fullmatch(config["architecture"].partition(".")[0])
    width, depth, heads = SIZES[found[1]]
    given = config.get("model_args") or {}
    for field in given:
        one_of("model_args field", field, _ARGS)
    args = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0, "class_token": True} | given
    pool = one_of("global_pool", given.get("global_pool") or config.get("global_pool") or "token", _POOLS)
    return ViTConfig(
        image_size=args.get("img_size") or int(found[3]),
        patch_size=args.get("patch_size") or int(found[2]),
        width=args["embed_dim"],
        depth=args["depth"],
        heads=args["num_heads"],
        mlp_dim=int(args["embed_dim"] * args["mlp_ratio"]),
        activation="gelu",
        norm_eps=1e-6,
        class_token=args["class_token"],
        pre_norm=False,
        patch_bias=True,
        pool=_POOLS[pool],
        classes=config.get("num_classes") or 0,
    )


def fits(config: ViTConfig) -> bool:
    """Whether timm's class can hold this tower."""
    plain = config.is_basic and not config.pre_norm and config.patch_bias
    return plain and config.pool in _POOLS and (config.activation, config.norm_eps) == ("gelu", 1e-6)


def to_config(config: ViTConfig) -> dict[str, Any]:
    """timm's config.json; `from_config` reads it back. Every size stands in ``model_args``."""
    pool = next(name for name, ours in _POOLS.items() if ours == config.pool)
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": config.classes,
        "num_features": config.width,
        "global_pool": pool,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": ratio(config),
            "class_token": config.class_token,
            "global_pool": pool,
        },
    }


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower; with an attention pool or a classifier where the config has one.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys.
    """
    base = f"{ours}/" if ours else ""
    trunk, out = f"{base}trunk", ends(config, ours, theirs)
    for i in range(config.depth):
        a, b = f"{trunk}/layers/{i}", f"{theirs}blocks.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.norm1") + layer_norm(f"{a}/norm2", f"{b}.norm2")
        out += _joined(f"{a}/attn", ("q", "k", "v"), f"{b}.attn.qkv", joined(3, TRANSPOSE), joined(3))
        out += dense(f"{a}/attn/o", f"{b}.attn.proj", bias=True) + mlp_rows(f"{a}/mlp", f"{b}.mlp")
    if config.pool == "map":
        a, b = f"{base}head", f"{theirs}attn_pool"
        out += [Row(f"{a}/probe", f"{b}.latent", UNBATCHED), *dense(f"{a}/attn/q", f"{b}.q", bias=True)]
        out += _joined(f"{a}/attn", ("k", "v"), f"{b}.kv", joined(2, TRANSPOSE), joined(2))
        out += dense(f"{a}/attn/o", f"{b}.proj", bias=True)
        out += layer_norm(f"{a}/norm", f"{b}.norm") + mlp_rows(f"{a}/mlp", f"{b}.mlp")
    return out


def ends(config: ViTConfig, ours: str, theirs: str) -> list[Row]:
    """The key table of what stands before and behind the blocks, which EVA's towers name alike; arguments as `rows`."""
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}trunk/class_embed", f"{theirs}cls_token", TOKEN)] if config.class_token else []
    out += [
        Row(f"{base}trunk/position_embed", f"{theirs}pos_embed", UNBATCHED),
        Row(f"{base}trunk/patch_embed/kernel", f"{theirs}patch_embed.proj.weight", patches(config.patch_size)),
        Row(f"{base}trunk/patch_embed/bias", f"{theirs}patch_embed.proj.bias"),
        *layer_norm(f"{base}post_norm", f"{theirs}norm"),
    ]
    return out + (dense(f"{base}classifier", f"{theirs}head", bias=True) if config.classes else [])


def ratio(config: ViTConfig) -> float:
    """The ratio of which timm, which cuts off what is behind the point, makes the very width."""
    ratio = config.mlp_dim / config.width
    while int(config.width * ratio) < config.mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def _joined(ours: str, names: tuple[str, ...], theirs: str, kernel: Change, bias: Change) -> list[Row]:
    """Several dense layers of ours that are one of theirs."""
    return [
        Row(tuple(f"{ours}/{name}/kernel" for name in names), f"{theirs}.weight", kernel),
        Row(tuple(f"{ours}/{name}/bias" for name in names), f"{theirs}.bias", bias),
    ]


def mlp_rows(ours: str, theirs: str) -> list[Row]:
    """The key table of a feed-forward of two dense layers."""
    return dense(f"{ours}/up", f"{theirs}.fc1", bias=True) + dense(f"{ours}/down", f"{theirs}.fc2", bias=True)
