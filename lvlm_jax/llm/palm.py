"""PaLM: attention and a SwiGLU feed-forward side by side from one norm, one head of keys and values, no biases.

Sizes, config.json and key table. There is no public checkpoint; the keys and the config's words are those of
flamingo-pytorch's `FlamingoPaLM`, whose layers hold q, k, v, up and gate in one matrix. Like it, this leaves out the
paper's factor 1/sqrt(width) before the softmax, which goes with embeddings that start at N(0, 1). Source: PaLM (arXiv
2204.02311), section 2.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, joined, one_of
from lvlm_jax.llm.config import DecoderConfig

PARTS = {"norm": "layer_no_bias", "order": "parallel_shared"}
"""What all its sizes have and LLaMA has not."""

_PALM = {**PARTS, "kv_heads": 1, "vocab": 256000, "norm_eps": 1e-5, "tied": True, "context": 2048, "head_dim": 256}

PRESETS: dict[str, DecoderConfig] = {  # table 1 of the paper
    "palm_8b": DecoderConfig(**_PALM, width=4096, depth=32, heads=16, mlp_dim=16384),
    "palm_62b": DecoderConfig(**_PALM, width=8192, depth=64, heads=32, mlp_dim=32768),
    "palm_540b": DecoderConfig(**_PALM, width=18432, depth=118, heads=48, mlp_dim=73728),
}
"""Decoders, each from the table of the paper."""

UNUSED = (r".*\.beta", r".*\.rotary_emb\.inv_freq", r"to_logits\.1\.weight")
"""Patterns of checkpoint keys that hold no weights of their own: the last is the embedding table over again."""

BASE, LAYERS = "", "layers."
"""Prefix of the keys in a whole language model (the bare one's have none), and what comes before a layer's number."""

DEFAULTS = {"dim_head": 64, "heads": 8, "ff_mult": 4, "max_seq_len": 2048}
"""What `FlamingoPaLM` assumes, and the length the paper trained for."""

_EPS, _THETA = 1e-5, 10000.0


def fits(config: DecoderConfig) -> bool:
    """Whether `FlamingoPaLM` can hold this decoder."""
    fits = config.holds(PARTS) and config.tied and config.kv_heads == 1 and config.mlp_dim % config.width == 0
    return fits and (config.norm_eps, config.rope_theta, config.rope_scaling) == (_EPS, _THETA, None)


def rows(config: DecoderConfig, ours: str = "llm", theirs: str = BASE, head: str = "to_logits.1.weight") -> list[Row]:
    """The key table of a decoder.

    Args:
      ours: path of the decoder's parameters ("" for a decoder alone).
      theirs: prefix of its keys.
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    one, mlp = config.head_width, config.mlp_dim
    each = (config.heads * one, one, one, mlp, mlp)
    out = [Row(f"{base}embed/table", f"{theirs}token_emb.weight")]
    for i in range(config.depth):
        a, b = f"{base}layers/{i}", f"{theirs}{LAYERS}{i}.0.fn"
        five = tuple(f"{a}/{x}/kernel" for x in ("attn/q", "attn/k", "attn/v", "mlp/up", "mlp/gate"))
        out.append(Row(f"{a}/norm1/scale", f"{b}.norm.gamma"))
        out.append(Row(five, f"{b}.fused_attn_ff_proj.weight", joined(each, TRANSPOSE)))
        out += dense(f"{a}/attn/o", f"{b}.attn_out") + dense(f"{a}/mlp/down", f"{b}.ff_out.1")
    out.append(Row(f"{base}norm/scale", f"{theirs}to_logits.0.gamma"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A config.json in the words of `FlamingoPaLM`.

    Raises:
      ValueError: a field is absent, or has a value that cannot be run.
    """
    f = fields(config, DEFAULTS)
    if missing := [name for name in ("num_tokens", "dim", "depth") if f.get(name) is None]:
        raise ValueError(f"config.json of a PaLM lacks {', '.join(missing)}")
    one_of("tie_word_embeddings", f.get("tie_word_embeddings", True), [True])
    share, rest = divmod(f["dim"], f["heads"])
    return DecoderConfig(
        **PARTS,
        vocab=f["num_tokens"],
        width=f["dim"],
        depth=f["depth"],
        heads=f["heads"],
        kv_heads=1,
        head_dim=None if f["dim_head"] == share and not rest else f["dim_head"],
        mlp_dim=f["dim"] * f["ff_mult"],
        norm_eps=_EPS,
        tied=True,
        context=f["max_seq_len"],
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config in the words of `FlamingoPaLM`; `from_hf` reads it back."""
    return {
        "model_type": "palm",
        "num_tokens": config.vocab,
        "dim": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "dim_head": config.head_width,
        "ff_mult": config.mlp_dim // config.width,
        "max_seq_len": config.context,
        "tie_word_embeddings": True,
    }
