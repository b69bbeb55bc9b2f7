"""Gemma 2: Gemma with norms before and after each branch, soft-capped scores, every other layer a sliding window.

Sizes and config.json; the key table is LLaMA's. Source: Gemma 2 (arXiv 2408.00118).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields
from lvlm_jax.llm import gemma, llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.layer_types import every, pattern_from_hf, types_to_hf

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

PARTS = {**gemma.PARTS, "post_norms": True}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("query_scalar", "attn_softcap", "final_softcap", "window", "pattern")
"""What its public class also has values for."""

_GEMMA2 = {
    **PARTS,
    "vocab": 256000,
    "norm_eps": 1e-6,
    "tied": True,
    "context": 8192,
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
    "window": 4096,
    "pattern": ("local", "global"),
}

PRESETS: dict[str, DecoderConfig] = {
    "gemma2_2b": DecoderConfig(  # google/gemma-2-2b
        **_GEMMA2, width=2304, depth=26, heads=8, kv_heads=4, mlp_dim=9216, head_dim=256, query_scalar=256
    ),
    "gemma2_9b": DecoderConfig(  # google/gemma-2-9b
        **_GEMMA2, width=3584, depth=42, heads=16, kv_heads=8, mlp_dim=14336, head_dim=256, query_scalar=256
    ),
    "gemma2_27b": DecoderConfig(  # google/gemma-2-27b
        **_GEMMA2, width=4608, depth=46, heads=32, kv_heads=16, mlp_dim=36864, head_dim=128, query_scalar=144
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    **gemma.DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "layer_types": None,
}
"""What the public class assumes for fields that a config leaves out."""

NULLABLE = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""The same for fields in which null is a value: none of it."""


def fits(config: DecoderConfig) -> bool:
    """Whether Gemma 2's public class can hold this decoder (it wants a width that its heads divide)."""
    return config.holds(PARTS, OPTIONAL) and config.width % config.heads == 0


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS) | {name: config.get(name, default) for name, default in NULLABLE.items()}
    depth = f["num_hidden_layers"]
    pattern = pattern_from_hf(f["layer_types"] or every(2, depth), depth)
    return DecoderConfig(
        **PARTS | gemma.values(f),
        query_scalar=f["query_pre_attn_scalar"],
        attn_softcap=f["attn_logit_softcapping"],
        final_softcap=f["final_logit_softcapping"],
        window=f["sliding_window"] if "local" in pattern else None,
        pattern=pattern,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        **gemma.public_values(config),
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config.query_scalar or config.head_width,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
        # The public class builds the mask of a window whether a layer uses it or not.
        "sliding_window": config.window or config.context,
        "layer_types": types_to_hf(config),
    }
