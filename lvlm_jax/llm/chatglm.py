"""ChatGLM2, ChatGLM3 and GLM-4 as their authors wrote them: GLM-4's maths under other names.

Sizes, config.json and key table, in which q, k and v stand in one matrix, and gate and up in another. The torch library
has no class of this ``model_type``; its `GlmForCausalLM` computes the same. Source: THUDM/ChatGLM2-6B, THUDM/ChatGLM3.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import SAME, TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm import chatglm_6b, glm
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.rope import DEFAULT_THETA

PARTS = {**glm.PARTS, "rotary_fraction": 0.5}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("qkv_bias",)
"""What its code also has values for."""

_6B = {
    **PARTS,
    "qkv_bias": True,
    "vocab": 65024,
    "width": 4096,
    "depth": 28,
    "heads": 32,
    "kv_heads": 2,
    "mlp_dim": 13696,
    "norm_eps": 1e-5,
    "public": "chatglm",
}

PRESETS: dict[str, DecoderConfig] = {
    "chatglm2_6b": DecoderConfig(**_6B, context=32768),  # THUDM/chatglm2-6b
    "chatglm3_6b": DecoderConfig(**_6B, context=8192),  # THUDM/chatglm3-6b
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*rotary_pos_emb\.inv_freq",)
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "transformer.", "encoder.layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "rope_ratio": 1,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "add_qkv_bias": False,
    "tie_word_embeddings": False,
}
"""What the authors' class assumes for fields that a config leaves out."""

FIXED = {
    "rmsnorm": True,
    "add_bias_linear": False,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "pre_seq_len": None,
}
"""Fields of which the releases, and we, have one value."""


def fits(config: DecoderConfig) -> bool:
    """Whether the authors' code can hold this decoder."""
    turned = config.rope_theta == DEFAULT_THETA or config.vocab != DEFAULTS["padded_vocab_size"]  # as `from_hf` says
    return config.holds(PARTS, OPTIONAL) and turned and config.rope_scaling is None and not config.tied


_DENSE = {"attn/o": "self_attention.dense", "mlp/down": "mlp.dense_4h_to_h"}


def rows(
    config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = f"{BASE}output_layer.weight"
) -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys.
      head: the whole key of the output head.
    """
    base = f"{ours}/" if ours else ""
    each = [heads * config.head_width for heads in (config.heads, config.kv_heads, config.kv_heads)]
    out = [Row(f"{base}embed/table", f"{theirs}embedding.word_embeddings.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        out += [Row(f"{a}/{x}/scale", f"{b}.{y}.weight") for x, y in glm.NORMS.items()]
        for leaf, name, inner in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME))[: 1 + config.qkv_bias]:
            three = tuple(f"{a}/attn/{x}/{leaf}" for x in ("q", "k", "v"))
            out.append(Row(three, f"{b}.self_attention.query_key_value.{name}", joined(each, inner)))
        both = f"{a}/mlp/gate/kernel", f"{a}/mlp/up/kernel"
        out.append(Row(both, f"{b}.mlp.dense_h_to_4h.weight", joined(2, TRANSPOSE)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}")
    out.append(Row(f"{base}norm/scale", f"{theirs}encoder.final_layernorm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A config.json of the authors; one of ChatGLM-6B, the first, is `chatglm_6b`'s.

    ``rope_ratio`` multiplies the rotary base, as in ChatGLM3 and GLM-4; ChatGLM2-6B-32k, whose file has the same
    field, divides positions by it, and nothing in the file tells them apart: it is refused where it is not 1 and the
    vocabulary is not GLM-4's.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    if config.get("position_encoding_2d") or "inner_hidden_size" in config:
        return chatglm_6b.from_hf(config)
    f = fields(config, DEFAULTS)
    for name, value in FIXED.items():
        one_of(name, f.get(name, value), [value])
    one_of("tie_word_embeddings", f["tie_word_embeddings"], [False])
    if f["padded_vocab_size"] == DEFAULTS["padded_vocab_size"]:
        one_of("rope_ratio", f["rope_ratio"], [1])
    share = f["hidden_size"] // f["num_attention_heads"]
    return DecoderConfig(
        **PARTS,
        vocab=f["padded_vocab_size"],
        width=f["hidden_size"],
        depth=f["num_layers"],
        heads=f["num_attention_heads"],
        kv_heads=f["multi_query_group_num"] if f["multi_query_attention"] else f["num_attention_heads"],
        mlp_dim=f["ffn_hidden_size"],
        head_dim=None if f["kv_channels"] == share else f["kv_channels"],
        norm_eps=float(f["layernorm_epsilon"]),
        rope_theta=DEFAULT_THETA * f["rope_ratio"],
        context=f["seq_length"],
        qkv_bias=bool(f["add_qkv_bias"]),
        public="chatglm",
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The authors' config; `from_hf` reads it back."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "padded_vocab_size": config.vocab,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "multi_query_attention": True,
        "multi_query_group_num": config.kv_heads,
        "ffn_hidden_size": config.mlp_dim,
        "kv_channels": config.head_width,
        "layernorm_epsilon": config.norm_eps,
        "rope_ratio": config.rope_theta / DEFAULT_THETA,
        "original_rope": True,
        "seq_length": config.context,
        "add_qkv_bias": config.qkv_bias,
        "tie_word_embeddings": False,
        **FIXED,
    }
