"""MPT-1B, the model before MPT: the same layers, with a norm of the queries and of the keys of all heads together.

Sizes, config.json and key table; the model type is that of its hub code. Source: MosaicML's MPT-1b-RedPajama-200b
(2023), github.com/mosaicml/examples, `MosaicGPT`; OpenFlamingo-3B stands on it.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm import mpt
from lvlm_jax.llm.config import DecoderConfig
from lvlm_jax.llm.gpt2 import sizes

PARTS = {**mpt.PARTS, "qk_norm": "whole"}
"""What all its sizes have and LLaMA has not."""

OPTIONAL = ("clip_qkv", "alibi_max")
"""What its config also has values for."""

_TIMES, _EPS = 4, 1e-5

PRESETS: dict[str, DecoderConfig] = {
    "mpt_1b": DecoderConfig(  # mosaicml/mpt-1b-redpajama-200b
        **PARTS, **sizes(2048, 24, 16), vocab=50432, norm_eps=_EPS, tied=True, context=2048
    ),
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
    "mlp_ratio": _TIMES,
    "max_seq_len": 2048,
    "vocab_size": 50368,
    "attn_qk_ln": False,
    "attn_clip_qkv": None,
    "prefix_lm": False,
    "alibi": False,
    "alibi_bias_max": 8,
    "no_bias": False,
}
"""What the public class assumes for fields that a config leaves out."""

RUNS = {"mlp_ratio": _TIMES, "attn_qk_ln": True, "prefix_lm": False, "alibi": True, "no_bias": True}
"""What of them is run here, and nothing else."""


def fits(config: DecoderConfig) -> bool:
    """Whether its public class can hold this decoder."""
    fits = config.holds(PARTS, OPTIONAL) and config.whole_heads and config.mlp_dim == _TIMES * config.width
    return fits and config.tied and (config.norm_eps, config.alibi_max) == (_EPS, int(config.alibi_max))


_DENSE = {"attn/o": "attn.out_proj", "mlp/up": "mlp.mlp_up", "mlp/down": "mlp.mlp_down"}
_NORMS = {"norm1": "ln_1", "norm2": "ln_2", "attn/q_norm": "attn.q_ln", "attn/k_norm": "attn.k_ln"}


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
        out += [Row(f"{a}/{x}/scale", f"{b}.{y}.weight") for x, y in _NORMS.items()]
        three = tuple(f"{a}/attn/{x}/kernel" for x in ("q", "k", "v"))
        out.append(Row(three, f"{b}.attn.Wqkv.weight", joined(3, TRANSPOSE)))
        for x, y in _DENSE.items():
            out += dense(f"{a}/{x}", f"{b}.{y}")
    out.append(Row(f"{base}norm/scale", f"{theirs}ln_f.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    for name, value in RUNS.items():
        one_of(name, f[name], [value])
    for name in ("softmax_scale", "logit_scale"):
        one_of(name, f.get(name), [None])
    clip = f["attn_clip_qkv"]
    return DecoderConfig(
        **PARTS,
        **sizes(f["d_model"], f["n_layers"], f["n_heads"]),
        vocab=f["vocab_size"],
        norm_eps=_EPS,
        context=f["max_seq_len"],
        tied=True,
        clip_qkv=float(clip) if clip else None,
        alibi_max=float(f["alibi_bias_max"]),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {
        "model_type": "mosaic_gpt",
        "architectures": ["MosaicGPT"],
        "d_model": config.width,
        "n_heads": config.heads,
        "n_layers": config.depth,
        "max_seq_len": config.context,
        "vocab_size": config.vocab,
        "attn_clip_qkv": config.clip_qkv,
        "alibi_bias_max": int(config.alibi_max),
        **RUNS,
    }
