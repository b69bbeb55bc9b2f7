"""GPT-2: learned positions, layer norms, a plain feed-forward, biases everywhere; its head is the embedding table.

Sizes, config.json and key table: their kernels stand as ours do, [in, out], with queries, keys and values side by side.
Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import (
    PUBLIC_ACTIVATIONS,
    TRANSPOSE,
    Change,
    Row,
    activation,
    fields,
    joined,
    layer_norm,
    one_of,
)
from lvlm_jax.llm.config import DecoderConfig

LAYER = {"norm": "layer", "mlp": "plain", "qkv_bias": True, "out_bias": True, "mlp_bias": True}
"""What its layers have, and those of its kin, and LLaMA's have not."""

PARTS = {**LAYER, "positions": "learned"}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("activation",)
"""What its public class also has values for."""

_GPT2 = {**PARTS, "activation": "gelu_tanh", "vocab": 50257, "norm_eps": 1e-5, "tied": True, "context": 1024}


def sizes(width: int, depth: int, heads: int) -> dict[str, int]:
    """Sizes of a decoder whose heads share its width and whose feed-forward is four times as wide."""
    return {"width": width, "depth": depth, "heads": heads, "kv_heads": heads, "mlp_dim": 4 * width}


PRESETS: dict[str, DecoderConfig] = {
    "gpt2": DecoderConfig(**_GPT2, **sizes(768, 12, 12)),  # openai-community/gpt2
    "gpt2_medium": DecoderConfig(**_GPT2, **sizes(1024, 24, 16)),  # openai-community/gpt2-medium
    "gpt2_large": DecoderConfig(**_GPT2, **sizes(1280, 36, 20)),  # openai-community/gpt2-large
    "gpt2_xl": DecoderConfig(**_GPT2, **sizes(1600, 48, 25)),  # openai-community/gpt2-xl
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = (r".*\.attn\.(masked_)?bias",)
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "transformer.", "h."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether GPT-2's public class can hold this decoder."""
    return config.holds(PARTS, OPTIONAL) and config.whole_heads


_DENSE = {"attn/o": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
_THREE = {
    "kernel": Change(lambda x: joined(3, TRANSPOSE).load(x.T), lambda *parts: joined(3, TRANSPOSE).save(*parts).T),
    "bias": joined(3),
}
"""Queries, keys and values side by side."""


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``text_decoder.transformer.``
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}wte.weight"), Row(f"{base}position_embed", f"{theirs}wpe.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            three = tuple(f"{a}/attn/{x}/{leaf}" for x in ("q", "k", "v"))
            out.append(Row(three, f"{b}.attn.c_attn.{name}", _THREE[leaf]))
            out += [Row(f"{a}/{x}/{leaf}", f"{b}.{y}.{name}") for x, y in _DENSE.items()]
        out += layer_norm(f"{a}/norm1", f"{b}.ln_1") + layer_norm(f"{a}/norm2", f"{b}.ln_2")
    out += layer_norm(f"{base}norm", f"{theirs}ln_f")
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("scale_attn_weights", f["scale_attn_weights"], [True])
    one_of("scale_attn_by_inverse_layer_idx", f["scale_attn_by_inverse_layer_idx"], [False])
    one_of("add_cross_attention", f["add_cross_attention"], [False])
    found = sizes(f["n_embd"], f["n_layer"], f["n_head"])
    return DecoderConfig(
        **PARTS,
        **found | {"mlp_dim": f["n_inner"] or found["mlp_dim"]},
        vocab=f["vocab_size"],
        norm_eps=float(f["layer_norm_epsilon"]),
        context=f["n_positions"],
        tied=bool(f["tie_word_embeddings"]),
        activation=activation("activation_function", f["activation_function"]),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.mlp_dim,
        "activation_function": PUBLIC_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
