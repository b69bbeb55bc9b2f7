"""Mistral 7B: LLaMA's decoder, all of whose layers slide a window in the first release and none in the later ones.

Sizes and config.json; the key table is LLaMA's. Source: Mistral 7B (arXiv 2310.06825).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

_7B = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "mlp_dim": 14336, "context": 32768, "public": "mistral"}

PRESETS: dict[str, DecoderConfig] = {
    "mistral_7b_v01": DecoderConfig(**_7B, vocab=32000, window=4096, pattern=("local",)),  # mistralai/Mistral-7B-v0.1
    "mistral_7b_v02": DecoderConfig(**_7B, vocab=32000, rope_theta=1000000.0),  # mistralai/Mistral-7B-Instruct-v0.2
    "mistral_7b_v03": DecoderConfig(**_7B, vocab=32768, rope_theta=1000000.0),  # mistralai/Mistral-7B-v0.3
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether Mistral's public class can hold this decoder (its layers are all of one kind)."""
    return config.holds({}, ("window", "pattern")) and len(set(config.layer_kinds)) == 1


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    window = config.get("sliding_window", 4096)  # null is a value here: no window
    for kind in f.get("layer_types") or ():
        one_of("layer_types", kind, ["full_attention" if window is None else "sliding_attention"])
    return DecoderConfig(
        **llama.values(f),
        head_dim=llama.head_dim(f),
        window=window,
        pattern=("global",) if window is None else ("local",),
        public="mistral",
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        **llama.public_values(config),
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "sliding_window": config.window,
    }
