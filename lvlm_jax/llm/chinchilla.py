"""Chinchilla and Gopher: RMS norms, Transformer-XL's relative positions, a plain feed-forward, a tied head, no biases.

Sizes, config.json and key table. There is no public checkpoint and no public code: keys and the config's words are our
own. What the papers leave open follows from their counts: a layer of 13 squares of the width (4 of attention, 8 of the
feed-forward, 1 that projects the distances) and a table of 32,000 rows, read twice, give 70 billion for Chinchilla's 80
layers of 8,192, and 280 billion for Gopher's of 16,384.
Source: Gopher (arXiv 2112.11446), section 3.1; Chinchilla (arXiv 2203.15556), section 4.1; Flamingo (arXiv 2204.14198),
table 4. Table 5 there counts 7.1 billion for the second, which 32 such layers would have, not the 40 of table 4.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, one_of
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import sizes

PARTS = {"positions": "relative", "mlp": "plain", "activation": "gelu"}
"""What all its sizes have and LLaMA has not."""

_COMMON = {**PARTS, "vocab": 32000, "norm_eps": 1e-5, "tied": True, "context": 2048}

PRESETS: dict[str, DecoderConfig] = {
    "chinchilla_1.4b": DecoderConfig(**_COMMON, **sizes(2048, 24, 16)),
    "chinchilla_7b": DecoderConfig(**_COMMON, **sizes(4096, 40, 32)),
    "chinchilla_70b": DecoderConfig(**_COMMON, **sizes(8192, 80, 64)),
}
"""Decoders, those that Flamingo stands on."""

UNUSED = ()
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "decoder.", "layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {"vocab_size": 32000, "layer_norm_epsilon": 1e-5, "max_seq_len": 2048, "tie_word_embeddings": True}
"""What is assumed for fields that a config leaves out."""

_NEEDED = ("d_model", "n_layers", "n_heads")


def fits(config: DecoderConfig) -> bool:
    """Whether this family can hold a decoder."""
    return config.holds(PARTS) and config.whole_heads and config.mlp_dim == 4 * config.width


_DENSE = {
    "attn/o": "attn.o_proj",
    "attn/relative/r": "attn.r_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_BIASES = {"content_bias": "attn.u", "position_bias": "attn.v"}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys.
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}embed_tokens.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        out += [Row(f"{a}/norm{n}/scale", f"{b}.norm_{n}.weight") for n in (1, 2)]
        for x in ("q", "k", "v"):
            out += dense(f"{a}/attn/{x}", f"{b}.attn.{x}_proj")
        out += [Row(f"{a}/attn/relative/{x}", f"{b}.{y}") for x, y in _BIASES.items()]
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}")
    out.append(Row(f"{base}norm/scale", f"{theirs}norm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A config.json that `to_hf` wrote.

    Raises:
      ValueError: a field is absent, or has a value that cannot be run.
    """
    one_of("model_type", config.get("model_type"), ["chinchilla"])
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise ValueError(f"config.json of a Chinchilla lacks {', '.join(missing)}")
    f = fields(config, DEFAULTS)
    return DecoderConfig(
        **PARTS,
        **sizes(f["d_model"], f["n_layers"], f["n_heads"]),
        vocab=f["vocab_size"],
        norm_eps=float(f["layer_norm_epsilon"]),
        context=f["max_seq_len"],
        tied=bool(f["tie_word_embeddings"]),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config in our own words; `from_hf` reads it back."""
    return {
        "model_type": "chinchilla",
        "d_model": config.width,
        "n_layers": config.depth,
        "n_heads": config.heads,
        "vocab_size": config.vocab,
        "layer_norm_epsilon": config.norm_eps,
        "max_seq_len": config.context,
        "tie_word_embeddings": config.tied,
    }
