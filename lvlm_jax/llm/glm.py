"""GLM-4 (9B, June 2024): LLaMA's decoder with biases on q, k and v, half of each head rotated, in neighbouring pairs.

Sizes, config.json and key table, in which gate and up stand in one matrix. Source: ChatGLM (arXiv 2406.12793).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.rope import fraction_from_hf, rope_to_hf

UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

PARTS = {"rotary_pairs": "interleaved"}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("qkv_bias", "rotary_fraction")
"""What its public class also has values for."""

_GLM = {
    **PARTS,
    "qkv_bias": True,
    "rotary_fraction": 0.5,
    "vocab": 151552,
    "width": 4096,
    "depth": 40,
    "heads": 32,
    "kv_heads": 2,
    "mlp_dim": 13696,
    "norm_eps": 1.5625e-7,
}

PRESETS: dict[str, DecoderConfig] = {
    "glm4_9b": DecoderConfig(**_GLM, context=8192),  # THUDM/glm-4-9b-hf
    "glm4_9b_chat": DecoderConfig(**_GLM, rope_theta=5000000.0, context=131072),  # THUDM/glm-4-9b-chat-hf
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
"""What the public class assumes for fields that a config leaves out."""

NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def fits(config: DecoderConfig) -> bool:
    """Whether GLM-4's public class can hold this decoder."""
    return config.holds(PARTS, OPTIONAL)


def rows(
    config: DecoderConfig,
    ours: str = "llm",
    theirs: str = BASE,
    head: str = "lm_head.weight",
    norms: Mapping[str, str] = NORMS,
) -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``language_model.model.``
      head: the whole key of the output head; a tied one has no row.
      norms: our name of each of a layer's norms -> theirs.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}embed_tokens.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        out += [Row(f"{a}/{x}/scale", f"{b}.{y}.weight") for x, y in norms.items()]
        for x in ("q", "k", "v"):
            out += dense(f"{a}/attn/{x}", f"{b}.self_attn.{x}_proj", bias=config.qkv_bias)
        out += dense(f"{a}/attn/o", f"{b}.self_attn.o_proj")
        both = f"{a}/mlp/gate/kernel", f"{a}/mlp/up/kernel"
        out.append(Row(both, f"{b}.mlp.gate_up_proj.weight", joined(2, TRANSPOSE)))
        out += dense(f"{a}/mlp/down", f"{b}.mlp.down_proj")
    out.append(Row(f"{base}norm/scale", f"{theirs}norm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `DecoderConfig` fields that both GLM-4s write under the same public names."""
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    return {
        **PARTS,
        **llama.values(f, partial=True),
        "head_dim": llama.head_dim(f),
        "qkv_bias": bool(f["attention_bias"]),
        "rotary_fraction": fraction_from_hf(f, 0.5),
    }


def public_values(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `values`."""
    return {
        **llama.public_values(config),
        **rope_to_hf(config.rope_theta, config.rope_scaling, config.rotary_fraction),
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
    }


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    return DecoderConfig(**values(config))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {"model_type": "glm", "architectures": ["GlmForCausalLM"], **public_values(config)}
