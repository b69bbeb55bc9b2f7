"""DINOv2, with and without registers: sizes, checkpoint keys, config.json.

Source: DINOv2 (arXiv 2304.07193); registers (arXiv 2309.16588). Keys are those that the torch library's `Dinov2Model`
and `Dinov2WithRegistersModel` have in every file. A position table is resized as they do it; the authors' own code adds
0.1 to the new side (without registers): ``resize_offset=0.1`` gives their numbers.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    TRANSPOSE,
    UNBATCHED,
    Row,
    activation,
    dense,
    fields,
    joined,
    layer_norm,
    one_of,
    square,
)
from lvlm_jax.vision import plain_vit
from lvlm_jax.vision.plain_vit import attention_rows, embedding_rows
from lvlm_jax.vision.vit import ViTConfig

_TRUNK = {
    "image_size": 518,
    "patch_size": 14,
    "activation": "gelu",
    "norm_eps": 1e-6,
    "pre_norm": False,
    "patch_bias": True,
    "pool": "token",
    "layer_scale": True,
    "mask_token": True,
    "resize": "cubic",
}
_S = {**_TRUNK, "width": 384, "depth": 12, "heads": 6, "mlp_dim": 1536}
_B = {**_TRUNK, "width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}
_L = {**_TRUNK, "width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096}
_G = {**_TRUNK, "width": 1536, "depth": 40, "heads": 24, "mlp_dim": 4096, "gated": True, "activation": "silu"}
_REGISTERS = {"registers": 4, "resize": "cubic_antialias"}

PRESETS: dict[str, ViTConfig] = {
    "dinov2_s14": ViTConfig(**_S),  # facebook/dinov2-small
    "dinov2_b14": ViTConfig(**_B),  # facebook/dinov2-base
    "dinov2_l14": ViTConfig(**_L),  # facebook/dinov2-large
    "dinov2_g14": ViTConfig(**_G),  # facebook/dinov2-giant
    "dinov2_s14_reg": ViTConfig(**_S | _REGISTERS),  # facebook/dinov2-with-registers-small
    "dinov2_b14_reg": ViTConfig(**_B | _REGISTERS),  # facebook/dinov2-with-registers-base
    "dinov2_l14_reg": ViTConfig(**_L | _REGISTERS),  # facebook/dinov2-with-registers-large
    "dinov2_g14_reg": ViTConfig(**_G | _REGISTERS),  # facebook/dinov2-with-registers-giant
}
"""Vision towers, each from the config.json of the release named beside it."""

HUB_NAMES = {
    "facebook/dinov2-small": "dinov2_s14",
    "facebook/dinov2-base": "dinov2_b14",
    "facebook/dinov2-large": "dinov2_l14",
    "facebook/dinov2-giant": "dinov2_g14",
    "facebook/dinov2-with-registers-small": "dinov2_s14_reg",
    "facebook/dinov2-with-registers-base": "dinov2_b14_reg",
    "facebook/dinov2-with-registers-large": "dinov2_l14_reg",
    "facebook/dinov2-with-registers-giant": "dinov2_g14_reg",
}
"""Hub name of a release -> preset."""

LAYOUTS = plain_vit.LAYOUTS
UNUSED: tuple[str, ...] = ()
"""Patterns of checkpoint keys that hold no weights."""

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
    "num_register_tokens": 4,
}
"""What the public classes assume for fields that a config leaves out."""

_TYPES = {False: "dinov2", True: "dinov2_with_registers"}


def fits(config: ViTConfig) -> bool:
    """Whether the public classes can hold this tower."""
    resize = "cubic_antialias" if config.registers else "cubic"
    mask = config.mask_token or not config.registers  # with registers there is always one
    return (
        config.is_basic_but("layer_scale", "gated", "registers", "mask_token", "resize")
        and config.class_token
        and not config.pre_norm
        and config.patch_bias
        and config.pool == "token"
        and config.layer_scale
        and (config.resize, config.resize_offset) == (resize, 0.0)
        and mask
        and not config.classes
        and config.mlp_dim == _hidden(config.width, 4, config.gated)
    )


def _hidden(width: int, ratio: int, gated: bool) -> int:
    """The feed-forward's hidden width: two thirds of it, up to a multiple of 8, where it is gated."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def rows(config: ViTConfig, ours: str = "vision", theirs: str = "") -> list[Row]:
    """The key table of the tower.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys, e.g. ``dinov2.``
    """
    base, emb = f"{ours}/" if ours else "", f"{theirs}embeddings."
    out = [*embedding_rows(config, f"{base}trunk/", theirs), *layer_norm(f"{base}post_norm", f"{theirs}layernorm")]
    if config.mask_token:
        out.append(Row(f"{base}trunk/mask_embed", f"{emb}mask_token", UNBATCHED))
    if config.registers:
        out.append(Row(f"{base}trunk/register_embed", f"{emb}register_tokens", UNBATCHED))
    for i in range(config.depth):
        a, b = f"{base}trunk/layers/{i}", f"{theirs}encoder.layer.{i}"
        out += layer_norm(f"{a}/norm1", f"{b}.norm1") + layer_norm(f"{a}/norm2", f"{b}.norm2")
        out += attention_rows(f"{a}/attn", f"{b}.attention")
        out += [Row(f"{a}/scale{n}", f"{b}.layer_scale{n}.lambda1") for n in (1, 2)]
        out += _gated_rows(f"{a}/mlp", f"{b}.mlp") if config.gated else _mlp_rows(f"{a}/mlp", f"{b}.mlp")
    return out


def _mlp_rows(ours: str, theirs: str) -> list[Row]:
    return dense(f"{ours}/up", f"{theirs}.fc1", bias=True) + dense(f"{ours}/down", f"{theirs}.fc2", bias=True)


def _gated_rows(ours: str, theirs: str) -> list[Row]:
    """Gate and what it weighs stand in one tensor there, in this order."""
    return [
        Row((f"{ours}/gate/kernel", f"{ours}/up/kernel"), f"{theirs}.weights_in.weight", joined(2, TRANSPOSE)),
        Row((f"{ours}/gate/bias", f"{ours}/up/bias"), f"{theirs}.weights_in.bias", joined(2)),
        *dense(f"{ours}/down", f"{theirs}.weights_out", bias=True),
    ]


def from_hf(config: Mapping[str, Any]) -> ViTConfig:
    """A public config.json, with or without registers.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("num_channels", f["num_channels"], [3])
    one_of("qkv_bias", f["qkv_bias"], [True])
    one_of("mlp_ratio", f["mlp_ratio"], [4])
    one_of("architectures", (f.get("architectures") or ["Dinov2Model"])[0], ["Dinov2Model", "Dinov2WithRegistersModel"])
    gated, registers = bool(f["use_swiglu_ffn"]), f.get("model_type") == _TYPES[True]
    return ViTConfig(
        image_size=square("image_size", f["image_size"]),
        patch_size=square("patch_size", f["patch_size"]),
        width=f["hidden_size"],
        depth=f["num_hidden_layers"],
        heads=f["num_attention_heads"],
        mlp_dim=_hidden(f["hidden_size"], f["mlp_ratio"], gated),
        activation="silu" if gated else activation("hidden_act", f["hidden_act"]),
        norm_eps=float(f["layer_norm_eps"]),
        pre_norm=False,
        patch_bias=True,
        pool="token",
        layer_scale=True,
        gated=gated,
        mask_token=registers or bool(f["use_mask_token"]),
        registers=f["num_register_tokens"] if registers else 0,
        resize="cubic_antialias" if registers else "cubic",
    )


def to_hf(config: ViTConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    registers = config.registers > 0
    out = {
        "model_type": _TYPES[registers],
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": 4,
        # A gated feed-forward is SiLU's whatever stands here.
        "hidden_act": "gelu" if config.gated else PUBLIC_ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": True,
        "use_swiglu_ffn": config.gated,
    }
    return out | ({"num_register_tokens": config.registers} if registers else {"use_mask_token": config.mask_token})
