"""T5, T5 1.1 and Flan-T5: sizes, config.json and key table.

Keys are those of the torch library's `T5ForConditionalGeneration`. Sources: T5 (arXiv 1910.10683); Flan (arXiv
2210.11416), whose sizes are those of T5 1.1.
"""

from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import TRANSPOSE, Row, dense, fields, one_of
from lvlm_jax.llm.encoder_decoder import EncoderDecoderConfig

_T5 = {"vocab": 32128, "head_dim": 64}
_FIRST = {"vocab": 32128, "activation": "relu", "gated": False, "tied": True, "scale_output": True}

PRESETS: dict[str, EncoderDecoderConfig] = {
    "flan_t5_small": EncoderDecoderConfig(  # google/flan-t5-small, google/t5-v1_1-small
        **_T5, width=512, depth=8, decoder_depth=8, heads=6, mlp_dim=1024
    ),
    "flan_t5_base": EncoderDecoderConfig(  # google/flan-t5-base, google/t5-v1_1-base
        **_T5, width=768, depth=12, decoder_depth=12, heads=12, mlp_dim=2048
    ),
    "flan_t5_large": EncoderDecoderConfig(  # google/flan-t5-large, google/t5-v1_1-large
        **_T5, width=1024, depth=24, decoder_depth=24, heads=16, mlp_dim=2816
    ),
    "flan_t5_xl": EncoderDecoderConfig(  # google/flan-t5-xl, google/t5-v1_1-xl
        **_T5, width=2048, depth=24, decoder_depth=24, heads=32, mlp_dim=5120
    ),
    "flan_t5_xxl": EncoderDecoderConfig(  # google/flan-t5-xxl, google/t5-v1_1-xxl
        **_T5, width=4096, depth=24, decoder_depth=24, heads=64, mlp_dim=10240
    ),
    "t5_small": EncoderDecoderConfig(  # google-t5/t5-small
        **_FIRST, width=512, depth=6, decoder_depth=6, heads=8, head_dim=64, mlp_dim=2048
    ),
    "t5_base": EncoderDecoderConfig(  # google-t5/t5-base
        **_FIRST, width=768, depth=12, decoder_depth=12, heads=12, head_dim=64, mlp_dim=3072
    ),
    "t5_large": EncoderDecoderConfig(  # google-t5/t5-large
        **_FIRST, width=1024, depth=24, decoder_depth=24, heads=16, head_dim=64, mlp_dim=4096
    ),
    "t5_3b": EncoderDecoderConfig(  # google-t5/t5-3b
        **_FIRST, width=1024, depth=24, decoder_depth=24, heads=32, head_dim=128, mlp_dim=16384
    ),
    "t5_11b": EncoderDecoderConfig(  # google-t5/t5-11b
        **_FIRST, width=1024, depth=24, decoder_depth=24, heads=128, head_dim=128, mlp_dim=65536
    ),
}
"""Encoder-decoders, each from the config.json of the releases named beside it."""

BASE = ""
"""Prefix of the keys in a whole language model: they have none."""

UNUSED = (
    # Both stacks read the one table; old files hold it three times.
    r"(.*\.)?(encoder|decoder)\.embed_tokens\.weight",
    # A table that the first release saved and never read.
    r"(.*\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
"""Patterns of checkpoint keys that hold no weights of their own."""

DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "dense_act_fn": None,
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    "n_positions": 512,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
"""What the public class assumes for fields that a config leaves out."""

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}
"""Public name -> ours."""

_BRANCHES = {
    "encoder": {"attn": "SelfAttention", "mlp": "DenseReluDense"},
    "decoder": {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"},
}
"""The branches of a layer of each stack, in the order in which their keys are numbered."""
_NORMS = {"attn": "norm1", "cross": "norm_cross", "mlp": "norm2"}


def rows(config: EncoderDecoderConfig, ours: str = "llm", theirs: str = "", head: str = "lm_head.weight") -> list[Row]:
    """The key table.

    Args:
      ours: path of the model's parameters ("" for one alone).
      theirs: prefix of its keys, e.g. ``language_model.``
      head: the whole key of the output head; a tied one has no row.
    """
    base = f"{ours}/" if ours else ""
    out = [Row(f"{base}embed/table", f"{theirs}shared.weight")]
    wide = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for stack, depth in (("encoder", config.depth), ("decoder", config.decoder_depth)):
        # The table stands in their first layer, which hands its bias on to the others.
        first = f"{theirs}{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(Row(f"{base}{stack}/relative/table", first))
        for i in range(depth):
            for number, (branch, name) in enumerate(_BRANCHES[stack].items()):
                a, b = f"{base}{stack}/layers/{i}", f"{theirs}{stack}.block.{i}.layer.{number}"
                out.append(Row(f"{a}/{_NORMS[branch]}/scale", f"{b}.layer_norm.weight"))
                for x, y in (wide if branch == "mlp" else dict(zip("qkvo", "qkvo"))).items():
                    out += dense(f"{a}/{branch}/{x}", f"{b}.{name}.{y}")
        out.append(Row(f"{base}{stack}/norm/scale", f"{theirs}{stack}.final_layer_norm.weight"))
    return out if config.tied else [*out, Row(f"{base}head/kernel", head, TRANSPOSE)]


def fits(config: EncoderDecoderConfig) -> bool:
    """Whether T5's public class can hold this model: it can hold all that there are."""
    return True


def from_hf(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """A public config (``text_config`` of a larger one, or a model's own config.json).

    The name of the activation in ``dense_act_fn`` overrules that in ``feed_forward_proj``, in which "gated-gelu" means
    the tanh approximation: BLIP-2 runs Flan-T5 with the exact function.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    f = fields(config, DEFAULTS)
    one_of("is_encoder_decoder", f["is_encoder_decoder"], [True])
    gate, _, name = f["feed_forward_proj"].rpartition("-")
    one_of("feed_forward_proj", f["feed_forward_proj"], [name, f"gated-{name}"])
    name = "gelu_new" if (gate, name) == ("gated", "gelu") else name
    name = f["dense_act_fn"] or name
    one_of("dense_act_fn", name, _ACTIVATIONS)
    # Version 5 of the torch library always writes "tied", and whether outputs are scaled in a field of its own.
    tied, scaled = bool(f["tie_word_embeddings"]), f["scale_decoder_outputs"]
    return EncoderDecoderConfig(
        vocab=f["vocab_size"],
        width=f["d_model"],
        depth=f["num_layers"],
        decoder_depth=f["num_decoder_layers"] or f["num_layers"],
        heads=f["num_heads"],
        head_dim=f["d_kv"],
        mlp_dim=f["d_ff"],
        activation=_ACTIVATIONS[name],
        gated=bool(gate),
        norm_eps=float(f["layer_norm_epsilon"]),
        buckets=f["relative_attention_num_buckets"],
        furthest=f["relative_attention_max_distance"],
        tied=tied,
        scale_output=tied if scaled is None else bool(scaled),
        context=f["n_positions"],
        start_id=f["decoder_start_token_id"],
    )


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    name = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    proj = f"gated-{'gelu' if name == 'gelu_new' else name}" if config.gated else name
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": config.vocab,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.depth,
        "num_decoder_layers": config.decoder_depth,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.furthest,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": proj,
        "dense_act_fn": name,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scale_output,
        "n_positions": config.context,
        "decoder_start_token_id": config.start_id,
    }
