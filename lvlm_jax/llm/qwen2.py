"""Qwen2 and Qwen2.5: LLaMA's decoder with biases on q, k and v. Sizes and config.json; the key table is LLaMA's."""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

_QWEN = {"qkv_bias": True, "rope_theta": 1000000.0, "norm_eps": 1e-6}
_05B = {"vocab": 151936, "width": 896, "depth": 24, "heads": 14, "kv_heads": 2, "mlp_dim": 4864, "tied": True}
_15B = {"vocab": 151936, "width": 1536, "depth": 28, "heads": 12, "kv_heads": 2, "mlp_dim": 8960, "tied": True}
_7B = {"vocab": 152064, "width": 3584, "depth": 28, "heads": 28, "kv_heads": 4, "mlp_dim": 18944}
_72B = {"vocab": 152064, "width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "mlp_dim": 29568}

PRESETS: dict[str, DecoderConfig] = {
    "qwen2_0.5b": DecoderConfig(**_05B, **_QWEN, context=32768),  # Qwen/Qwen2-0.5B-Instruct
    "qwen2_1.5b": DecoderConfig(**_15B, **_QWEN, context=32768),  # Qwen/Qwen2-1.5B-Instruct
    "qwen2_7b": DecoderConfig(**_7B, **_QWEN, context=32768),  # Qwen/Qwen2-7B-Instruct
    "qwen2_72b": DecoderConfig(**_72B, **_QWEN, context=32768),  # Qwen/Qwen2-72B-Instruct
    "qwen25_0.5b": DecoderConfig(**_05B, **_QWEN, context=32768),  # Qwen/Qwen2.5-0.5B-Instruct
    "qwen25_1.5b": DecoderConfig(**_15B, **_QWEN, context=32768),  # Qwen/Qwen2.5-1.5B-Instruct
    "qwen25_7b": DecoderConfig(**_7B, **_QWEN, context=32768),  # Qwen/Qwen2.5-7B-Instruct
    "qwen25_72b": DecoderConfig(**_72B, **_QWEN, context=32768),  # Qwen/Qwen2.5-72B-Instruct
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "layer_types": None,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether Qwen2's public class can hold this decoder (it has no head width of its own)."""
    return config.holds({"qkv_bias": True}) and config.head_width * config.heads == config.width


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    one_of("use_sliding_window", f["use_sliding_window"], [False])
    for kind in f["layer_types"] or ():
        one_of("layer_types", kind, ["full_attention"])
    return DecoderConfig(**llama.values(f), qkv_bias=True)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **llama.public_values(config),
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
