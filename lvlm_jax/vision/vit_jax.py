"""The names of the ViT and AugReg releases in a flat ``.npz``, and the config that its shapes tell.

The tower is `vision.plain_vit`'s with a smaller epsilon and tanh-GELU. Kernels are [in, out] there as here, those of
attention have the heads on an axis of their own.
Source: github.com/google-research/vision_transformer (vit_jax/models_vit.py), which big_vision reads as well.
"""

import math
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import UNBATCHED, Change, Row, flax_patches
from lvlm_jax.vision import plain_vit
from lvlm_jax.vision.plain_vit import TOKEN
from lvlm_jax.vision.vit import ViTConfig

_POSITIONS = "Transformer/posembed_input/pos_embedding"
_ATTENTION, _MLP = "MultiHeadDotProductAttention_1", "MlpBlock_3"


def public_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The torch library's config.json of the ViT whose tensors have these shapes: such a file has none.

    Args:
      shapes: key -> shape.

    Raises:
      ValueError: a tensor that every such ViT has is missing, or one that is not read here is there.
    """
    block = "Transformer/encoderblock_0/"
    needed = ("embedding/kernel", "cls", _POSITIONS, f"{block}{_ATTENTION}/query/bias", f"{block}{_MLP}/Dense_0/bias")
    for key in (*needed, "head/bias"):
        if key not in shapes:
            raise ValueError(f"{key} is missing; is it a whole ViT with class token, learned positions and classifier?")
    if "pre_logits/kernel" in shapes:
        raise ValueError("pre_logits is not supported; supported: a classifier directly behind the class token")
    side, _, _, width = shapes["embedding/kernel"]
    places, depth = shapes[_POSITIONS][1] - 1, 0
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"{_POSITIONS} has {places} places, which are no square; only square pictures are read")
    while f"Transformer/encoderblock_{depth}/LayerNorm_0/scale" in shapes:
        depth += 1
    config = ViTConfig(
        image_size=math.isqrt(places) * side,
        patch_size=side,
        width=width,
        depth=depth,
        heads=shapes[f"{block}{_ATTENTION}/query/bias"][0],
        mlp_dim=shapes[f"{block}{_MLP}/Dense_0/bias"][0],
        activation="gelu_tanh",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        pool="token",
        classes=shapes["head/bias"][0],
    )
    return plain_vit.to_hf(config)


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower with its classifier.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys.
    """
    base = f"{ours}/" if ours else ""
    out = [
        Row(f"{base}trunk/class_embed", f"{theirs}cls", TOKEN),
        Row(f"{base}trunk/patch_embed/kernel", f"{theirs}embedding/kernel", flax_patches(config.patch_size)),
        Row(f"{base}trunk/patch_embed/bias", f"{theirs}embedding/bias"),
        Row(f"{base}trunk/position_embed", f"{theirs}{_POSITIONS}", UNBATCHED),
        *pair(f"{base}post_norm", f"{theirs}Transformer/encoder_norm", "scale"),
    ]
    for i in range(config.depth):
        a, b = f"{base}trunk/layers/{i}", f"{theirs}Transformer/encoderblock_{i}"
        out += pair(f"{a}/norm1", f"{b}/LayerNorm_0", "scale") + pair(f"{a}/norm2", f"{b}/LayerNorm_2", "scale")
        out += attention_rows(f"{a}/attn", f"{b}/{_ATTENTION}", config.heads)
        out += pair(f"{a}/mlp/up", f"{b}/{_MLP}/Dense_0", "kernel") + pair(
            f"{a}/mlp/down", f"{b}/{_MLP}/Dense_1", "kernel"
        )
    return out + pair(f"{base}classifier", f"{theirs}head", "kernel")


def pair(ours: str, theirs: str, weight: str) -> list[Row]:
    """A kernel or scale with its bias, the same on both sides."""
    return [Row(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in (weight, "bias")]


def attention_rows(ours: str, theirs: str, heads: int) -> list[Row]:
    """Queries, keys, values and what joins them, with the heads on an axis of their own there."""
    into = Change(lambda x: x.reshape(len(x), -1), lambda x: x.reshape(len(x), heads, -1))
    bias = Change(lambda x: x.reshape(-1), lambda x: x.reshape(heads, -1))
    back = Change(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(heads, -1, x.shape[-1]))
    out = []
    for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
        out += [Row(f"{ours}/{a}/kernel", f"{theirs}/{b}/kernel", into)]
        out += [Row(f"{ours}/{a}/bias", f"{theirs}/{b}/bias", bias)]
    return [*out, Row(f"{ours}/o/kernel", f"{theirs}/out/kernel", back), Row(f"{ours}/o/bias", f"{theirs}/out/bias")]
