"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: sizes, checkpoint keys, config.json.

Nobody publishes such a tower alone: its keys stand in a whole model's file, beside the merger's (`connectors.merger`),
which is part of the tower there. Keys are those of the torch library's `Qwen2VLForConditionalGeneration` and kin.
Source: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923), Qwen3-VL (arXiv 2511.21631).
"""

from collections.abc import Callable, Mapping
from typing import Any

from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    TRANSPOSE,
    Row,
    activation,
    clips,
    dense,
    fields,
    joined,
    layer_norm,
    one_of,
    square,
)
from lvlm_jax.vision.native import NativeViTConfig

_H = {"depth": 32, "width": 1280, "heads": 16, "patch_size": 14}
_25 = {"norm": "rms", "activation": "silu", "gated": True, "window": 8, "whole": (7, 15, 23, 31)}
_3 = {"activation": "gelu_tanh", "patch_bias": True, "patch_size": 16, "heads": 16, "position_grid": 48}

PRESETS: dict[str, NativeViTConfig] = {
    "qwen2_vl": NativeViTConfig(**_H, mlp_dim=5120),  # Qwen/Qwen2-VL-2B-Instruct, -7B-, -72B-
    "qwen2_5_vl": NativeViTConfig(**_H, **_25, mlp_dim=3420),  # Qwen/Qwen2.5-VL-3B-Instruct, -7B-
    "qwen2_5_vl_wide": NativeViTConfig(**_H, **_25, mlp_dim=3456),  # Qwen/Qwen2.5-VL-32B-Instruct, -72B-
    # Qwen/Qwen3-VL-2B-Instruct, -4B-
    "qwen3_vl_small": NativeViTConfig(**_3, depth=24, width=1024, mlp_dim=4096, taps=(5, 11, 17)),
    # Qwen/Qwen3-VL-8B-Instruct, -32B-
    "qwen3_vl": NativeViTConfig(**_3, depth=27, width=1152, mlp_dim=4304, taps=(8, 16, 24)),
}
"""Towers, each from the config.json of the releases named beside it."""

LAYOUTS: tuple[str, ...] = ()
"""How a tower alone is written: nobody does."""

UNUSED = (r".*rotary_pos_emb\.inv_freq",)
"""Patterns of checkpoint keys that hold no weights."""

_COMMON = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "max_patches": 5120}
DEFAULTS_2 = _COMMON | {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "patch_size": 14,
}
DEFAULTS_25 = _COMMON | {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
DEFAULTS_3 = _COMMON | {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
"""What the public classes assume for fields that a vision config leaves out; ``max_patches`` is a field of ours."""

_PLAIN = {"norm": "layer", "gated": False, "window": None}
_MAKES: dict[str, dict[str, Any]] = {
    "qwen2_vl_vision": {**_PLAIN, "position_grid": None, "patch_bias": False, "taps": ()},
    "qwen2_5_vl_vision": {"norm": "rms", "gated": True, "position_grid": None, "patch_bias": False, "taps": ()},
    "qwen3_vl_vision": {**_PLAIN, "patch_bias": True},
}
"""What all sizes of a release have in common."""


def type_of(config: NativeViTConfig) -> str:
    """The public ``model_type`` that can hold a tower of these values.

    Raises:
      ValueError: no public family has this combination.
    """
    for name, make in _MAKES.items():
        same = all(getattr(config, field) == value for field, value in make.items()) and config.norm_eps == 1e-6
        # Each class has something that the others must lack.
        own = {"qwen2_5_vl_vision": config.window, "qwen3_vl_vision": config.position_grid}.get(name, True)
        whole = name != "qwen2_vl_vision" or config.mlp_dim % config.width == 0
        if same and own is not None and whole:
            return name
    raise ValueError(
        f"no public family ({', '.join(_MAKES)}) holds a tower for pictures of any size with norm={config.norm!r}, "
        f"gated={config.gated}, window={config.window}, position_grid={config.position_grid}, "
        f"patch_bias={config.patch_bias}, taps={config.taps}, norm_eps={config.norm_eps} and mlp_dim={config.mlp_dim}"
    )


def fits(config: Any) -> bool:
    """Whether one of the public classes can hold this tower."""
    try:
        return isinstance(config, NativeViTConfig) and bool(type_of(config))
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Keys

_MLPS = {
    "qwen2_vl_vision": {"up": "fc1", "down": "fc2"},
    "qwen2_5_vl_vision": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "qwen3_vl_vision": {"up": "linear_fc1", "down": "linear_fc2"},
}


def rows(config: NativeViTConfig, ours: str = "vision", theirs: str = "visual.") -> list[Row]:
    """The key table of a tower, without its merger.

    Args:
      ours: path of the tower's parameters ("" for a tower alone).
      theirs: prefix of its keys.
    """
    base, mlp = f"{ours}/" if ours else "", _MLPS[type_of(config)]
    patch = f"{theirs}patch_embed.proj"
    out = [Row(f"{base}patch_embed/kernel", f"{patch}.weight", clips(config.patch_frames, config.patch_size))]
    if config.patch_bias:
        out.append(Row(f"{base}patch_embed/bias", f"{patch}.bias"))
    if config.position_grid is not None:
        out.append(Row(f"{base}position_embed", f"{theirs}pos_embed.weight"))
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}blocks.{i}"
        for norm in ("norm1", "norm2"):
            both = layer_norm(f"{a}/{norm}", f"{b}.{norm}")
            out += both if config.norm == "layer" else both[:1]
        q, k, v = (f"{a}/attn/{x}" for x in "qkv")
        out += [
            Row((f"{q}/kernel", f"{k}/kernel", f"{v}/kernel"), f"{b}.attn.qkv.weight", joined(3, TRANSPOSE)),
            Row((f"{q}/bias", f"{k}/bias", f"{v}/bias"), f"{b}.attn.qkv.bias", joined(3)),
            *dense(f"{a}/attn/o", f"{b}.attn.proj", bias=True),
        ]
        for x, y in mlp.items():
            out += dense(f"{a}/mlp/{x}", f"{b}.mlp.{y}", bias=True)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def _shared(f: Mapping[str, Any]) -> dict[str, Any]:
    one_of("in_channels", f["in_channels"], [3])
    return {
        "depth": f["depth"],
        "heads": f["num_heads"],
        "patch_size": square("patch_size", f["patch_size"]),
        "activation": activation("hidden_act", f["hidden_act"]),
        "patch_frames": square("temporal_patch_size", f["temporal_patch_size"]),
        "merge": f["spatial_merge_size"],
        "max_patches": f["max_patches"],
    }


def _read_2(config: Mapping[str, Any]) -> NativeViTConfig:
    f = fields(config, DEFAULTS_2)
    return NativeViTConfig(**_shared(f), width=f["embed_dim"], mlp_dim=int(f["embed_dim"] * f["mlp_ratio"]))


def _read_25(config: Mapping[str, Any]) -> NativeViTConfig:
    f = fields(config, DEFAULTS_25)
    return NativeViTConfig(
        **_shared(f),
        width=f["hidden_size"],
        mlp_dim=f["intermediate_size"],
        norm="rms",
        gated=True,
        window=f["window_size"] // f["spatial_merge_size"] // f["patch_size"] * f["spatial_merge_size"],
        whole=tuple(f["fullatt_block_indexes"]),
    )


def _read_3(config: Mapping[str, Any]) -> NativeViTConfig:
    f = fields(config, DEFAULTS_3)
    side = round(f["num_position_embeddings"] ** 0.5)
    one_of("num_position_embeddings", f["num_position_embeddings"], [side**2])
    return NativeViTConfig(
        **_shared(f),
        width=f["hidden_size"],
        mlp_dim=f["intermediate_size"],
        patch_bias=True,
        position_grid=side,
        taps=tuple(f["deepstack_visual_indexes"]),
    )


TOWERS: dict[str, Callable[[Mapping[str, Any]], NativeViTConfig]] = {
    "qwen2_vl_vision": _read_2,
    "qwen2_5_vl_vision": _read_25,
    "qwen3_vl_vision": _read_3,
}
"""Public ``model_type`` of a vision config -> what reads it."""


def from_hf(config: Mapping[str, Any]) -> NativeViTConfig:
    """A public vision config (``vision_config`` of a larger one).

    The most patches of a vision row are no public field: ``max_patches`` where we wrote one, else 5120, which at 14
    pixels a patch is the 28 * 28 * 1280 pixels that the torch library's picture processor allows by default.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    return TOWERS[one_of("vision_config.model_type", config.get("model_type"), TOWERS)](config)


def to_hf(config: NativeViTConfig, out_width: int | None = None) -> dict[str, Any]:
    """The public vision config; `from_hf` reads it back.

    Args:
      out_width: width of the language model, which the public classes count among the tower's sizes.
    """
    name = type_of(config)
    act = PUBLIC_ACTIVATIONS[one_of("hidden_act", config.activation, PUBLIC_ACTIVATIONS)]
    out = {
        "model_type": name,
        "depth": config.depth,
        "num_heads": config.heads,
        "in_channels": 3,
        "hidden_act": act,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge,
        "temporal_patch_size": config.patch_frames,
        "max_patches": config.max_patches,
    }
    if name == "qwen2_vl_vision":
        width = {} if out_width is None else {"hidden_size": out_width}
        return {**out, **width, "embed_dim": config.width, "mlp_ratio": config.mlp_dim // config.width}
    out |= {"hidden_size": config.width, "intermediate_size": config.mlp_dim}
    out |= {} if out_width is None else {"out_hidden_size": out_width}
    if name == "qwen2_5_vl_vision":
        return {
            **out,
            "window_size": config.window * config.patch_size,
            "fullatt_block_indexes": list(config.whole),
        }
    return {
        **out,
        "num_position_embeddings": config.position_grid**2,
        "deepstack_visual_indexes": list(config.taps),
    }
