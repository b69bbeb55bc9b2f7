"""Qwen v1 (1.8B to 72B): Qwen2's maths under other names. Sizes, config.json and key table.

The torch library has no class of this ``model_type``; its `Qwen2ForCausalLM` computes the same. Beyond the length that
a release was trained for (`context`) the authors' code stretches rotations and scales queries; that is left out.
Source: Qwen (arXiv 2309.16609).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import SAME, TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.rope import DEFAULT_THETA

PARTS = {"qkv_bias": True}
"""What all its sizes have and LLaMA has not."""

_QWEN = {**PARTS, "norm_eps": 1e-6, "public": "qwen"}


def _sizes(width: int, depth: int, heads: int, mlp_dim: int) -> dict[str, int]:
    return {"width": width, "depth": depth, "heads": heads, "kv_heads": heads, "mlp_dim": mlp_dim}


PRESETS: dict[str, DecoderConfig] = {
    "qwen_1.8b": DecoderConfig(**_QWEN, **_sizes(2048, 24, 16, 5504), vocab=151936, context=8192),  # Qwen/Qwen-1_8B
    "qwen_7b": DecoderConfig(**_QWEN, **_sizes(4096, 32, 32, 11008), vocab=151936, context=8192),  # Qwen/Qwen-7B
    "qwen_14b": DecoderConfig(**_QWEN, **_sizes(5120, 40, 40, 13696), vocab=152064, context=2048),  # Qwen/Qwen-14B
    "qwen_72b": DecoderConfig(  # Qwen/Qwen-72B
        **_QWEN, **_sizes(8192, 80, 64, 24576), vocab=152064, rope_theta=1000000.0, context=32768
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*rotary_emb\.inv_freq", r".*\.attn\.masked_bias")
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "transformer.", "h."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 2048,
    "rotary_emb_base": DEFAULT_THETA,
    "tie_word_embeddings": False,
}
"""What the authors' class assumes for fields that a config leaves out."""

FIXED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
"""Fields of which the releases, and we, have one value."""


def fits(config: DecoderConfig) -> bool:
    """Whether the authors' code can hold this decoder."""
    return config.holds(PARTS) and config.whole_heads and config.rope_scaling is None


_DENSE = {"attn/o": "attn.c_proj", "mlp/up": "mlp.w1", "mlp/gate": "mlp.w2", "mlp/down": "mlp.c_proj"}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys.
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}wte.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        out += [Row(f"{a}/norm{n}/scale", f"{b}.ln_{n}.weight") for n in (1, 2)]
        for leaf, name, inner in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME)):
            three = tuple(f"{a}/attn/{x}/{leaf}" for x in ("q", "k", "v"))
            out.append(Row(three, f"{b}.attn.c_attn.{name}", joined(3, inner)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}")
    out.append(Row(f"{base}norm/scale", f"{theirs}ln_f.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A config.json of the authors; its ``intermediate_size`` counts gate and up together.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    for name, value in FIXED.items():
        one_of(name, f.get(name, value), [value])
    one_of("kv_channels", f["kv_channels"], [f["hidden_size"] // f["num_attention_heads"]])
    return DecoderConfig(
        **PARTS,
        **_sizes(f["hidden_size"], f["num_hidden_layers"], f["num_attention_heads"], f["intermediate_size"] // 2),
        vocab=f["vocab_size"],
        norm_eps=float(f["layer_norm_epsilon"]),
        rope_theta=float(f["rotary_emb_base"]),
        context=f["seq_length"],
        tied=bool(f["tie_word_embeddings"]),
        public="qwen",
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The authors' config; `from_hf` reads it back."""
    return {
        "model_type": "qwen",
        "architectures": ["QWenLMHeadModel"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": 2 * config.mlp_dim,
        "kv_channels": config.head_width,
        "layer_norm_epsilon": config.norm_eps,
        "rotary_emb_base": config.rope_theta,
        "seq_length": config.context,
        "tie_word_embeddings": config.tied,
        **FIXED,
    }
