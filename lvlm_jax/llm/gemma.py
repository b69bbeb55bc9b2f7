"""Gemma 1: LLaMA's decoder with GeGLU, norms that scale by 1 + weight, scaled embeddings, heads wider than their share.

Sizes and config.json; the key table is LLaMA's. Source: Gemma (arXiv 2403.08295).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

PARTS = {"activation": "gelu_tanh", "norm": "offset_rms", "scale_embeddings": True}
"""What all Gemmas have and LLaMA has not."""

_GEMMA = {**PARTS, "vocab": 256000, "norm_eps": 1e-6, "tied": True, "context": 8192}

PRESETS: dict[str, DecoderConfig] = {
    "gemma_2b": DecoderConfig(  # google/gemma-2b
        **_GEMMA, width=2048, depth=18, heads=8, kv_heads=1, mlp_dim=16384
    ),
    "gemma_7b": DecoderConfig(  # google/gemma-7b
        **_GEMMA, width=3072, depth=28, heads=16, kv_heads=16, mlp_dim=24576, head_dim=256
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether Gemma's public class can hold this decoder."""
    return config.holds(PARTS)


def values(f: Mapping[str, Any]) -> dict[str, Any]:
    """The `DecoderConfig` fields that all Gemmas write under the same public names."""
    one_of("hidden_activation", f["hidden_activation"], ["gelu_pytorch_tanh"])
    one_of("attention_bias", f["attention_bias"], [False])
    one_of("use_bidirectional_attention", f["use_bidirectional_attention"], [False])
    return {**PARTS, **llama.values(f), "head_dim": llama.head_dim(f)}


def public_values(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `values`."""
    return {
        **llama.public_values(config),
        "head_dim": config.head_width,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    # The first releases wrote "gelu" and meant the tanh form, which is what every version of the public class runs.
    one_of("hidden_act", f["hidden_act"], ["gelu_pytorch_tanh", "gelu"])
    return DecoderConfig(**values(f))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        **public_values(config),
        "hidden_act": "gelu_pytorch_tanh",
    }
