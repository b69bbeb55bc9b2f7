"""Qwen3: LLaMA's decoder with norms on queries and keys, and heads wider than their share.

Sizes and config.json; the key table is LLaMA's. Source: Qwen3 (arXiv 2505.09388).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.layer_types import pattern_from_hf, types_to_hf

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

PARTS = {"qk_norm": True}
"""What all its sizes have and LLaMA has not."""

_QWEN3 = {
    **PARTS,
    "vocab": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "context": 40960,
}

PRESETS: dict[str, DecoderConfig] = {
    "qwen3_0.6b": DecoderConfig(**_QWEN3, width=1024, depth=28, heads=16, mlp_dim=3072, tied=True),  # Qwen/Qwen3-0.6B
    "qwen3_1.7b": DecoderConfig(  # Qwen/Qwen3-1.7B
        **{**_QWEN3, "head_dim": None}, width=2048, depth=28, heads=16, mlp_dim=6144, tied=True
    ),
    "qwen3_4b": DecoderConfig(**_QWEN3, width=2560, depth=36, heads=32, mlp_dim=9728, tied=True),  # Qwen/Qwen3-4B
    "qwen3_8b": DecoderConfig(  # Qwen/Qwen3-8B
        **{**_QWEN3, "head_dim": None}, width=4096, depth=36, heads=32, mlp_dim=12288
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "layer_types": None,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether Qwen3's public class can hold this decoder."""
    return config.holds(PARTS, ("window", "pattern"))


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    one_of("attention_bias", f["attention_bias"], [False])
    depth = f["num_hidden_layers"]
    window = config.get("sliding_window", 4096) if f["use_sliding_window"] else None
    first = depth if window is None else f["max_window_layers"]  # the lower layers see all
    types = f["layer_types"] or ["full_attention" if i < first else "sliding_attention" for i in range(depth)]
    pattern = pattern_from_hf(types, depth)
    if "local" in pattern and window is None:
        raise ValueError(
            "config.json: layer_types has sliding_attention, but use_sliding_window is false or sliding_window is null"
        )
    return DecoderConfig(
        **PARTS,
        **llama.values(f),
        head_dim=llama.head_dim(f),
        window=window if "local" in pattern else None,
        pattern=pattern,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        **llama.public_values(config),
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": False,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": config.depth,
        "layer_types": types_to_hf(config),
    }
