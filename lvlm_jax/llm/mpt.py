"""MPT: scores that fall with the distance (ALiBi), layer norms and dense layers without biases, a plain feed-forward.

Sizes, config.json and key table: queries, keys and values one after the other in one matrix; the head is the embedding
table. Source: MosaicML's MPT-7B and MPT-30B (2023); ALiBi (arXiv 2108.12409).
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import sizes

PARTS = {"norm": "layer_no_bias", "mlp": "plain", "activation": "gelu", "positions": "alibi"}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("clip_qkv", "alibi_max")
"""What its config also has values for. (The torch library's class clips, but takes `alibi_max` 8 whatever it says.)"""

_TIMES = 4
"""The feed-forward's hidden width over the model's: the class has no other."""

_MPT = {**PARTS, "vocab": 50432, "norm_eps": 1e-5, "tied": True}

PRESETS: dict[str, DecoderConfig] = {
    "mpt_7b": DecoderConfig(**_MPT, **sizes(4096, 32, 32), context=2048),  # mosaicml/mpt-7b
    "mpt_7b_storywriter": DecoderConfig(  # mosaicml/mpt-7b-storywriter
        **_MPT, **sizes(4096, 32, 32), context=65536, clip_qkv=6.0, alibi_max=16.0
    ),
    "mpt_30b": DecoderConfig(**_MPT, **sizes(7168, 48, 64), context=8192),  # mosaicml/mpt-30b
}
"""Decoders, each from the config.json of the release named beside it."""

UNUSED = ()
"""Patterns of checkpoint keys that hold no weights."""

BASE, LAYERS = "transformer.", "blocks."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {
    "d_model": 2048,
    "n_heads": 16,
    "n_layers": 24,
    "expansion_ratio": _TIMES,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "layer_norm_epsilon": 1e-5,
    "no_bias": True,
    "tie_word_embeddings": True,
}
"""What the public class assumes for fields that a config leaves out."""

ATTENTION = {"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True}
"""What of ``attn_config`` the class runs and nothing else, and what it assumes where that is left out."""


def fits(config: DecoderConfig) -> bool:
    """Whether MPT's public class can hold this decoder."""
    fits = config.holds(PARTS, OPTIONAL) and config.whole_heads and config.mlp_dim == _TIMES * config.width
    return fits and config.alibi_max == int(config.alibi_max)


_DENSE = {"attn/o": "attn.out_proj", "mlp/up": "ffn.up_proj", "mlp/down": "ffn.down_proj"}


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "lm_head.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys, e.g. ``lang_encoder.transformer.``
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}wte.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}"
        out += [Row(f"{a}/norm{n}/scale", f"{b}.norm_{n}.weight") for n in (1, 2)]
        three = tuple(f"{a}/attn/{x}/kernel" for x in ("q", "k", "v"))
        out.append(Row(three, f"{b}.attn.Wqkv.weight", joined(3, TRANSPOSE)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}")
    out.append(Row(f"{base}norm/scale", f"{theirs}norm_f.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("no_bias", f["no_bias"], [True])
    one_of("expansion_ratio", f["expansion_ratio"], [_TIMES])
    one_of("logit_scale", f.get("logit_scale"), [None])
    attention = fields(f.get("attn_config") or {}, ATTENTION)
    for name, value in ATTENTION.items():
        one_of(f"attn_config.{name}", attention[name], [value])
    one_of("attn_config.softmax_scale", attention.get("softmax_scale"), [None])
    clip = attention.get("clip_qkv")
    return DecoderConfig(
        **PARTS,
        **sizes(f["d_model"], f["n_layers"], f["n_heads"]),
        vocab=f["vocab_size"],
        norm_eps=float(f["layer_norm_epsilon"]),
        context=f["max_seq_len"],
        tied=bool(f["tie_word_embeddings"]),
        clip_qkv=float(clip) if clip else None,
        alibi_max=float(attention.get("alibi_bias_max", 8)),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "d_model": config.width,
        "n_heads": config.heads,
        "n_layers": config.depth,
        "expansion_ratio": _TIMES,
        "max_seq_len": config.context,
        "vocab_size": config.vocab,
        "layer_norm_epsilon": config.norm_eps,
        "no_bias": True,
        "tie_word_embeddings": config.tied,
        "attn_config": {**ATTENTION, "clip_qkv": config.clip_qkv, "alibi_bias_max": int(config.alibi_max)},
    }
