"""LLaMA 1, 2, 3 and Vicuna: sizes, config.json, and the key table that its kin share.

Keys are those of the torch library's `LlamaForCausalLM`. With biases on q, k and v they are Qwen2's, with norms on q
and k Qwen3's, with a norm behind each branch Gemma 2's, with both Gemma 3's.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, one_of
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.rope import rope_from_hf, rope_to_hf
from lvlm_jax.nn.positions import RopeScaling

_7B = {"vocab": 32000, "width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008}
_13B = {"vocab": 32000, "width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "mlp_dim": 13824}
_V1 = {"norm_eps": 1e-6, "context": 2048}
_V2 = {"norm_eps": 1e-5, "context": 4096}
_V3 = {"vocab": 128256, "kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0}
_8B = {"width": 4096, "depth": 32, "heads": 32, "mlp_dim": 14336}

PRESETS: dict[str, DecoderConfig] = {
    "llama1_7b": DecoderConfig(**_7B, **_V1),  # huggyllama/llama-7b
    "llama1_13b": DecoderConfig(**_13B, **_V1),  # huggyllama/llama-13b
    "llama1_65b": DecoderConfig(  # huggyllama/llama-65b
        vocab=32000, width=8192, depth=80, heads=64, kv_heads=64, mlp_dim=22016, norm_eps=1e-5, context=2048
    ),
    "llama2_7b": DecoderConfig(**_7B, **_V2),  # meta-llama/Llama-2-7b-hf
    "llama2_13b": DecoderConfig(**_13B, **_V2),  # meta-llama/Llama-2-13b-hf
    "vicuna15_7b": DecoderConfig(**_7B, **_V2),  # lmsys/vicuna-7b-v1.5
    "vicuna15_13b": DecoderConfig(**_13B, **_V2),  # lmsys/vicuna-13b-v1.5
    "yi_34b": DecoderConfig(  # NousResearch/Nous-Hermes-2-Yi-34B
        vocab=64000,
        width=7168,
        depth=60,
        heads=56,
        kv_heads=8,
        mlp_dim=20480,
        norm_eps=1e-5,
        rope_theta=5000000.0,
        context=4096,
    ),
    "llama3_8b": DecoderConfig(**_8B, **_V3, context=8192),  # meta-llama/Meta-Llama-3-8B
    "llama31_8b": DecoderConfig(  # meta-llama/Llama-3.1-8B
        **_8B, **_V3, rope_scaling=RopeScaling(kind="llama3", factor=8.0), context=131072
    ),
    "llama32_1b": DecoderConfig(  # meta-llama/Llama-3.2-1B
        width=2048,
        depth=16,
        heads=32,
        mlp_dim=8192,
        head_dim=64,
        **_V3,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
        tied=True,
        context=131072,
    ),
    "llama32_3b": DecoderConfig(  # meta-llama/Llama-3.2-3B
        width=3072,
        depth=28,
        heads=24,
        mlp_dim=8192,
        head_dim=128,
        **_V3,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0),
        tied=True,
        context=131072,
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*rotary_emb\.inv_freq",)
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "model.", "layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether LLaMA's public class can hold this decoder."""
    return config.holds({})


_NORMS = {"norm1": "input", "norm2": "post_attention"}
_POST_NORMS = {
    "norm1": "input",
    "post_norm1": "post_attention",
    "norm2": "pre_feedforward",
    "post_norm2": "post_feedforward",
}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = "model.", head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``language_model.model.``
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}embed_tokens.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}layers.{i}"
        norms = _POST_NORMS if config.post_norms else _NORMS
        out += [Row(f"{a}/{x}/scale", f"{b}.{y}_layernorm.weight") for x, y in norms.items()]
        for x in ("q", "k", "v"):
            out += dense(f"{a}/attn/{x}", f"{b}.self_attn.{x}_proj", bias=config.qkv_bias)
        for x in ("q_norm", "k_norm") if config.qk_norm else ():
            out.append(Row(f"{a}/attn/{x}/scale", f"{b}.self_attn.{x}.weight"))
            if config.qk_norm == "head_layer":
                out.append(Row(f"{a}/attn/{x}/bias", f"{b}.self_attn.{x}.bias"))
        out += dense(f"{a}/attn/o", f"{b}.self_attn.o_proj")
        for x in ("gate", "up", "down"):
            out += dense(f"{a}/mlp/{x}", f"{b}.mlp.{x}_proj")
    out.append(Row(f"{base}norm/scale", f"{theirs}norm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def values(f: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """The `DecoderConfig` fields that LLaMA and its kin write under the same public names.

    Args:
      partial: as `rope.rope_from_hf` takes it.
    """
    theta, scaling = rope_from_hf(f, partial)
    return {
        "vocab": f["vocab_size"],
        "width": f["hidden_size"],
        "depth": f["num_hidden_layers"],
        "heads": f["num_attention_heads"],
        "kv_heads": f["num_key_value_heads"] or f["num_attention_heads"],
        "mlp_dim": f["intermediate_size"],
        "norm_eps": float(f["rms_norm_eps"]),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": bool(f["tie_word_embeddings"]),
        "context": f["max_position_embeddings"],
    }


def public_values(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `values`."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        **rope_to_hf(config.rope_theta, config.rope_scaling),
    }


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    one_of("attention_bias", f["attention_bias"], [False])
    one_of("mlp_bias", f["mlp_bias"], [False])
    return DecoderConfig(**values(f), head_dim=head_dim(f))


def head_dim(f: Mapping[str, Any]) -> int | None:
    """The ``head_dim`` of a public config; None where it is the width's share of a head."""
    share, rest = divmod(f["hidden_size"], f["num_attention_heads"])
    return None if f["head_dim"] == share and not rest else f["head_dim"]


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **public_values(config),
        "hidden_act": "silu",
        "head_dim": config.head_width,
        "attention_bias": False,
        "mlp_bias": False,
    }
