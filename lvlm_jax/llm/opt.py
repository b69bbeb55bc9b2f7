"""OPT: learned positions, layer norms, a plain ReLU feed-forward, biases everywhere; its head is the embedding table.

Sizes, config.json and key table. OPT-350m alone norms what each branch has been added to, has no norm behind its last
layer, and a table half as wide as its layers. Source: OPT (arXiv 2205.01068).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import PUBLIC_ACTIVATIONS, TRANSPOSE, Row, activation, dense, fields, layer_norm, one_of
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import LAYER, sizes

PARTS = {**LAYER, "positions": "learned", "position_offset": 2}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("activation", "order", "final_norm", "embed_width")
"""What its public class also has values for."""

_EPS = 1e-5
"""The class gives its norms no other."""

_OPT = {**PARTS, "activation": "relu", "vocab": 50272, "norm_eps": _EPS, "tied": True, "context": 2048}

PRESETS: dict[str, DecoderConfig] = {
    "opt_125m": DecoderConfig(**_OPT, **sizes(768, 12, 12)),  # facebook/opt-125m
    "opt_350m": DecoderConfig(  # facebook/opt-350m
        **_OPT, **sizes(1024, 24, 16), order="post", final_norm=False, embed_width=512
    ),
    "opt_1.3b": DecoderConfig(**_OPT, **sizes(2048, 24, 32)),  # facebook/opt-1.3b
    "opt_2.7b": DecoderConfig(**_OPT, **sizes(2560, 32, 32)),  # facebook/opt-2.7b
    "opt_6.7b": DecoderConfig(**_OPT, **sizes(4096, 32, 32)),  # facebook/opt-6.7b
    "opt_13b": DecoderConfig(**_OPT, **sizes(5120, 40, 40)),  # facebook/opt-13b
    "opt_30b": DecoderConfig(**_OPT, **sizes(7168, 48, 56)),  # facebook/opt-30b
    "opt_66b": DecoderConfig(**_OPT, **sizes(9216, 64, 72)),  # facebook/opt-66b
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = ()
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "model.", "decoder.layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
"""What the public class assumes for fields that a config leaves out."""


def fits(config: DecoderConfig) -> bool:
    """Whether OPT's public class can hold this decoder."""
    orders = {"pre": (True, False), "post": (False,)}  # and whether there is a norm behind the last layer
    fits = config.holds(PARTS, OPTIONAL) and config.whole_heads and config.norm_eps == _EPS
    return fits and config.final_norm in orders.get(config.order, ())


_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_DENSE = {
    **{f"attn/{x}": f"self_attn.{x}_proj" for x in ("q", "k", "v")},
    "attn/o": "self_attn.out_proj",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``language_model.model.``
      head: the whole key of the output head; a tied one has no row.
    """
    base, at = f"{ours}/" if ours else "", f"{theirs}decoder."
    out = [
        Row(f"{base}embed/table", f"{at}embed_tokens.weight"),
        Row(f"{base}position_embed", f"{at}embed_positions.weight"),
    ]
    if config.embed_width is not None:
        for x in ("project_in", "project_out"):
            out += dense(f"{base}{x}", f"{at}{x}")
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        for x, y in _NORMS.items():
            out += layer_norm(f"{a}/{x}", f"{b}.{y}")
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}", bias=True)
    if config.final_norm:
        out += layer_norm(f"{base}norm", f"{at}final_layer_norm")
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("enable_bias", f["enable_bias"], [True])
    one_of("layer_norm_elementwise_affine", f["layer_norm_elementwise_affine"], [True])
    before, table = f["do_layer_norm_before"], f["word_embed_proj_dim"]
    return DecoderConfig(
        **PARTS,
        **sizes(f["hidden_size"], f["num_hidden_layers"], f["num_attention_heads"]) | {"mlp_dim": f["ffn_dim"]},
        vocab=f["vocab_size"],
        norm_eps=_EPS,
        context=f["max_position_embeddings"],
        tied=bool(f["tie_word_embeddings"]),
        activation=activation("activation_function", f["activation_function"]),
        order="pre" if before else "post",
        final_norm=bool(before and not f["_remove_final_layer_norm"]),
        embed_width=None if table == f["hidden_size"] else table,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    before = config.order == "pre"
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "ffn_dim": config.mlp_dim,
        "max_position_embeddings": config.context,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "word_embed_proj_dim": config.embed_width or config.width,
        "activation_function": PUBLIC_ACTIVATIONS[config.activation],
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tied,
    }
