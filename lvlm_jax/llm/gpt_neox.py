"""GPT-NeoX, Pythia, RedPajama-INCITE: attention and a plain feed-forward side by side, a part of each head rotated.

Sizes, config.json and key table: layer norms, biases everywhere; queries, keys and values of a head stand together in
one matrix. Source: GPT-NeoX-20B (arXiv 2204.06745); Pythia (arXiv 2304.01373).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    SAME,
    TRANSPOSE,
    Row,
    activation,
    by_head,
    dense,
    fields,
    layer_norm,
    one_of,
)
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import LAYER, sizes
from lvlm_jax.llm.rope import DEFAULT_THETA, fraction_from_hf, rope_from_hf, rope_to_hf

PARTS = LAYER
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("activation", "order", "rotary_fraction")
"""What its public class also has values for."""

_NEOX = {**PARTS, "activation": "gelu", "norm_eps": 1e-5, "context": 2048}
_PYTHIA = {**_NEOX, "order": "parallel", "rotary_fraction": 0.25}

PRESETS: dict[str, DecoderConfig] = {
    "pythia_70m": DecoderConfig(**_PYTHIA, **sizes(512, 6, 8), vocab=50304),  # EleutherAI/pythia-70m
    "pythia_160m": DecoderConfig(**_PYTHIA, **sizes(768, 12, 12), vocab=50304),  # EleutherAI/pythia-160m
    "pythia_410m": DecoderConfig(**_PYTHIA, **sizes(1024, 24, 16), vocab=50304),  # EleutherAI/pythia-410m
    "pythia_1b": DecoderConfig(**_PYTHIA, **sizes(2048, 16, 8), vocab=50304),  # EleutherAI/pythia-1b
    "pythia_1.4b": DecoderConfig(**_PYTHIA, **sizes(2048, 24, 16), vocab=50304),  # EleutherAI/pythia-1.4b
    "pythia_2.8b": DecoderConfig(**_PYTHIA, **sizes(2560, 32, 32), vocab=50304),  # EleutherAI/pythia-2.8b
    "pythia_6.9b": DecoderConfig(**_PYTHIA, **sizes(4096, 32, 32), vocab=50432),  # EleutherAI/pythia-6.9b
    "pythia_12b": DecoderConfig(**_PYTHIA, **sizes(5120, 36, 40), vocab=50688),  # EleutherAI/pythia-12b
    "gpt_neox_20b": DecoderConfig(  # EleutherAI/gpt-neox-20b
        **{**_PYTHIA, "activation": "gelu_tanh"}, **sizes(6144, 44, 64), vocab=50432
    ),
    "redpajama_3b": DecoderConfig(  # togethercomputer/RedPajama-INCITE-Base-3B-v1
        **_NEOX, **sizes(2560, 32, 32), vocab=50432
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*\.attention\.(masked_)?bias", r".*rotary_emb\.inv_freq")
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "gpt_neox.", "layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "rotary_emb_base": DEFAULT_THETA,
    "rotary_pct": 0.25,
    "attention_bias": True,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether GPT-NeoX's public class can hold this decoder."""
    return config.holds(PARTS, OPTIONAL) and config.whole_heads and config.order in ("pre", "parallel")


_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_DENSE = {"attn/o": "attention.dense", "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "embed_out.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``lang_encoder.gpt_neox.``
      head: the whole key of the output head (in memory the torch library calls it ``lm_head.weight``); a tied one has
        no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}embed_in.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        for x, y in _NORMS.items():
            out += layer_norm(f"{a}/{x}", f"{b}.{y}")
        for leaf, name, inner in (("kernel", "weight", TRANSPOSE), ("bias", "bias", SAME)):
            three = tuple(f"{a}/attn/{x}/{leaf}" for x in ("q", "k", "v"))
            out.append(Row(three, f"{b}.attention.query_key_value.{name}", by_head(config.heads, inner)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}", bias=True)
    out += layer_norm(f"{base}norm", f"{theirs}final_layer_norm")
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("attention_bias", f["attention_bias"], [True])
    theta, scaling = rope_from_hf({"rope_theta": f["rotary_emb_base"], **f}, partial=True)
    return DecoderConfig(
        **PARTS,
        **sizes(f["hidden_size"], f["num_hidden_layers"], f["num_attention_heads"])
        | {"mlp_dim": f["intermediate_size"]},
        vocab=f["vocab_size"],
        norm_eps=float(f["layer_norm_eps"]),
        context=f["max_position_embeddings"],
        tied=bool(f["tie_word_embeddings"]),
        activation=activation("hidden_act", f["hidden_act"]),
        order="parallel" if f["use_parallel_residual"] else "pre",
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_fraction=fraction_from_hf(f, f["rotary_pct"]),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": PUBLIC_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "use_parallel_residual": config.order == "parallel",
        "attention_bias": True,
        **rope_to_hf(config.rope_theta, config.rope_scaling, config.rotary_fraction),
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_fraction,
    }
