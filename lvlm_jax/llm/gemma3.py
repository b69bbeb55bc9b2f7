"""Gemma 3, its text part: Gemma 2 with norms on queries and keys for the caps, five local layers to a global one.

Local layers turn at a rotary base of their own. Sizes and config.json; the key table is LLaMA's. Source: Gemma 3
(arXiv 2503.19786).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields, one_of
from lvlm_jax.llm import gemma, gemma2, llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.layer_types import every, pattern_from_hf, types_to_hf
from lvlm_jax.llm.rope import rope_from_hf, rope_to_hf
from lvlm_jax.nn.positions import RopeScaling

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

PARTS = {**gemma2.PARTS, "qk_norm": True}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("query_scalar", "final_softcap", "window", "pattern", "local_theta")
"""What its public class also has values for."""

_LOCAL_THETA = 10000.0
_GEMMA3 = {
    **PARTS,
    "norm_eps": 1e-6,
    "tied": True,
    "rope_theta": 1000000.0,
    "local_theta": _LOCAL_THETA,
    "pattern": ("local",) * 5 + ("global",),
}
_SMALL = {**_GEMMA3, "vocab": 262144, "window": 512, "context": 32768}
_LARGE = {
    **_GEMMA3,
    "vocab": 262208,
    "window": 1024,
    "context": 131072,
    "rope_scaling": RopeScaling(kind="linear", factor=8.0),
}

PRESETS: dict[str, DecoderConfig] = {
    "gemma3_1b": DecoderConfig(  # google/gemma-3-1b-pt
        **_SMALL, width=1152, depth=26, heads=4, kv_heads=1, mlp_dim=6912, head_dim=256, query_scalar=256
    ),
    "gemma3_4b": DecoderConfig(  # google/gemma-3-4b-pt, text_config
        **_LARGE, width=2560, depth=34, heads=8, kv_heads=4, mlp_dim=10240, head_dim=256, query_scalar=256
    ),
    "gemma3_12b": DecoderConfig(  # google/gemma-3-12b-pt, text_config
        **_LARGE, width=3840, depth=48, heads=16, kv_heads=8, mlp_dim=15360, head_dim=256, query_scalar=256
    ),
    "gemma3_27b": DecoderConfig(  # google/gemma-3-27b-pt, text_config
        **_LARGE, width=5376, depth=62, heads=32, kv_heads=16, mlp_dim=21504, head_dim=128, query_scalar=168
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": _LOCAL_THETA,
    "sliding_window_pattern": 6,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether Gemma 3's public class can hold this decoder (local layers have a base of their own there)."""
    local = config.window is not None
    return (
        config.holds(PARTS, OPTIONAL) and config.width % config.heads == 0 and local == (config.local_theta is not None)
    )


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("attn_logit_softcapping", f.get("attn_logit_softcapping"), [None])
    depth = f["num_hidden_layers"]
    pattern = pattern_from_hf(f["layer_types"] or every(f["sliding_window_pattern"], depth), depth)
    local = "local" in pattern
    far, near = _ropes(f)
    return DecoderConfig(
        **PARTS | gemma.values({**f, "rope_parameters": far}),
        query_scalar=f["query_pre_attn_scalar"],
        final_softcap=f.get("final_logit_softcapping"),
        window=config.get("sliding_window", 4096) if local else None,
        pattern=pattern,
        local_theta=rope_from_hf(near)[0] if local else None,
    )


_LAYERS = {"full_attention", "sliding_attention"}


def _ropes(f: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(rotary settings of global layers, of local ones): newer files nest them by kind of layer."""
    nested = f.get("rope_parameters") or {}
    if unknown := nested.keys() - _LAYERS:
        raise ValueError(
            f"config.json: rope_parameters has {sorted(unknown)}; Gemma 3 nests it, one entry each for "
            f"{' and '.join(sorted(_LAYERS))}"
        )
    near = {"rope_theta": f["rope_local_base_freq"], **(nested.get("sliding_attention") or {})}
    one_of("rope_parameters.sliding_attention.rope_type", near.get("rope_type", "default"), ["default"])
    return nested.get("full_attention") or {}, near


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    local = config.local_theta or _LOCAL_THETA
    rope = rope_to_hf(config.rope_theta, config.rope_scaling)
    nested = {
        "full_attention": rope["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    regular = config.pattern == ("local",) * (len(config.pattern) - 1) + ("global",)
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        **gemma.public_values(config),
        **rope,
        "rope_parameters": nested,
        "rope_local_base_freq": local,
        "query_pre_attn_scalar": config.query_scalar or config.head_width,
        "final_logit_softcapping": config.final_softcap,
        "attn_logit_softcapping": None,
        # The public class builds the mask of a window whether a layer uses it or not.
        "sliding_window": config.window or config.context,
        "layer_types": types_to_hf(config),
        # What older versions read in place of the list.
        **({"sliding_window_pattern": len(config.pattern)} if regular else {}),
    }
