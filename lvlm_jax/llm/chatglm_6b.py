"""ChatGLM-6B, the first: positions counted twice, a context that sees itself whole, and DeepNorm's scaled sums.

Sizes, config.json and key table: layer norms, biases everywhere, a plain feed-forward; queries, keys and values of a
head stand together in one matrix; the output head is the embedding table. Its files say ``model_type`` "chatglm" as
those of its successors do, whose maths are others; `chatglm.from_hf` tells them apart. Source: GLM (arXiv 2103.10360),
section 2.2; GLM-130B (arXiv 2210.02414), section 2.1; THUDM/ChatGLM-6B.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lvlm_jax.keymap import SAME, TRANSPOSE, Row, by_head, dense, fields, layer_norm, one_of
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import LAYER, sizes
from lvlm_jax.shapes import Array, Int

PARTS = {**LAYER, "activation": "gelu_tanh", "order": "normed", "rotary_pairs": "halves"}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("residual_scale",)
"""What goes with the number of layers (`fits`)."""


def _scale(depth: int) -> float:
    """What DeepNorm multiplies the stream by."""
    return (2 * depth) ** 0.5


_EPS = 1e-5

PRESETS: dict[str, DecoderConfig] = {
    "chatglm_6b": DecoderConfig(  # THUDM/chatglm-6b
        **PARTS, **sizes(4096, 28, 32), vocab=130528, norm_eps=_EPS, tied=True, residual_scale=_scale(28), context=2048
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*\.rotary_emb\.inv_freq",)
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "transformer.", "layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "layernorm_epsilon": _EPS,
    "max_sequence_length": 2048,
    "inner_hidden_size": 16384,
    "position_encoding_2d": True,
    "tie_word_embeddings": True,
}
"""What the authors' class assumes for fields that a config leaves out."""


def count(positions: Int[Array, "B T"], context: Int[Array, "#B #T"], mask: Int[Array, "#B #T"]) -> Int[Array, "B T 2"]:
    """Both counts of each position, for `Decoder`: where it stands in the context, and how far behind it.

    The context goes (0, 0), (1, 0) ...; what follows, ``<sop>`` first, (mask, 1), (mask, 2) ... The context sees itself
    whole and what follows is causal: `ranges.packed_prefix`.

    Args:
      positions: place of each position in its example.
      context: how long the context of that example is.
      mask: where its ``[gMASK]`` or ``[MASK]`` stands, the place that what follows is written for.
    """
    first = jnp.where(positions < context, positions, mask)
    return jnp.stack([first, jnp.maximum(positions - context + 1, 0)], axis=-1)


def fits(config: DecoderConfig) -> bool:
    """Whether the authors' code can hold this decoder."""
    plain = (config.rope_theta, config.rope_scaling) == (10000.0, None)
    scaled = config.residual_scale == _scale(config.depth)
    return config.holds(PARTS, OPTIONAL) and plain and scaled and config.whole_heads


_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_DENSE = {"attn/o": "attention.dense", "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys.
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}word_embeddings.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        for x, y in _NORMS.items():
            out += layer_norm(f"{a}/{x}", f"{b}.{y}")
        for leaf, name, inner in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME)):
            three = tuple(f"{a}/attn/{x}/{leaf}" for x in ("q", "k", "v"))
            out.append(Row(three, f"{b}.attention.query_key_value.{name}", by_head(config.heads, inner)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}", bias=True)
    out += layer_norm(f"{base}norm", f"{theirs}final_layernorm")
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A config.json of the authors.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("position_encoding_2d", f["position_encoding_2d"], [True])
    one_of("pre_seq_len", f.get("pre_seq_len"), [None])
    one_of("quantization_bit", f.get("quantization_bit") or 0, [0])
    depth = f["num_layers"]
    return DecoderConfig(
        **PARTS,
        **sizes(f["hidden_size"], depth, f["num_attention_heads"]) | {"mlp_dim": f["inner_hidden_size"]},
        vocab=f["vocab_size"],
        norm_eps=float(f["layernorm_epsilon"]),
        residual_scale=_scale(depth),
        context=f["max_sequence_length"],
        tied=bool(f["tie_word_embeddings"]),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The authors' config; `from_hf` reads it back."""
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "layernorm_epsilon": config.norm_eps,
        "max_sequence_length": config.context,
        "inner_hidden_size": config.mlp_dim,
        "position_encoding_2d": True,
        "tie_word_embeddings": config.tied,
    }
