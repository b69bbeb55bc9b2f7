"""big_vision's names for PaliGemma 1 in a flat ``.npz``, and the config that its shapes tell.

SigLIP's tower without its pooling head, a dense layer that is called the tower's head, and Gemma with its layers
stacked: kernels for einsums, the heads on an axis of their own, keys beside values and gate beside up in one tensor.
Source: github.com/google-research/big_vision, models/ppp/gemma.py and models/proj/paligemma.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lvlm_jax.keymap import SAME, Change, Row, stacked
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.zoo import big_vision

LAYOUTS = {"big_vision-paligemma": "llm/layers/"}
"""The name of the layout and the keys that it is known by."""


def rows(config: LVLMConfig) -> list[Row]:
    """The key table of a PaliGemma, less the prefix ``params/``."""
    return [
        *big_vision.vision_rows(config.vision, "vision", "img", scan=True),
        Row("connector/linear_1/kernel", "img/head/kernel"),
        Row("connector/linear_1/bias", "img/head/bias"),
        *_decoder_rows(config.llm, "llm", "llm"),
    ]


def _decoder_rows(config: DecoderConfig, ours: str, theirs: str) -> list[Row]:
    """Gemma's: of each kind of tensor one row for all layers."""
    q, kv, gated = _heads(config.heads), _pair(_heads(config.kv_heads)), _pair(SAME)
    merged = Change(
        lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(config.heads, config.head_width, x.shape[-1])
    )
    table: list[tuple[tuple[str, ...], str, Change]] = [
        (("norm1/scale",), "pre_attention_norm/scale", SAME),
        (("attn/q/kernel",), "attn/q_einsum/w", q),
        (("attn/k/kernel", "attn/v/kernel"), "attn/kv_einsum/w", kv),
        (("attn/o/kernel",), "attn/attn_vec_einsum/w", merged),
        (("norm2/scale",), "pre_ffw_norm/scale", SAME),
        (("mlp/gate/kernel", "mlp/up/kernel"), "mlp/gating_einsum", gated),
        (("mlp/down/kernel",), "mlp/linear", SAME),
    ]
    layers = range(config.depth)
    return [
        Row(f"{ours}/embed/table", f"{theirs}/embedder/input_embedding"),
        *(
            Row(
                tuple(f"{ours}/layers/{i}/{leaf}" for i in layers for leaf in leaves),
                f"{theirs}/layers/{key}",
                stacked(change, len(leaves)),
            )
            for leaves, key, change in table
        ),
        Row(f"{ours}/norm/scale", f"{theirs}/final_norm/scale"),
    ]


def _heads(heads: int) -> Change:
    """A kernel [heads, in, width of a head] there, [in, heads x width] here."""
    return Change(
        lambda x: x.transpose(1, 0, 2).reshape(x.shape[1], -1),
        lambda x: x.reshape(len(x), heads, -1).transpose(1, 0, 2),
    )


def _pair(inner: Change) -> Change:
    """Two leaves of ours, one after the other along the first axis there."""
    return Change(
        lambda x: tuple(inner.load(part) for part in x), lambda *parts: np.stack([inner.save(part) for part in parts])
    )


def public_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The torch library's config.json of the PaliGemma whose tensors have these shapes: such a file has none.

    No word of its vocabulary stands for a picture (the torch library adds one): id 0 does, which is laid over.

    Raises:
      ValueError: PaliGemma 2, or a tensor that every PaliGemma has is missing.
    """
    if "llm/layers/post_attention_norm/scale" in shapes:
        raise ValueError(
            "llm/layers/post_attention_norm: a PaliGemma 2, whose soft-caps no tensor tells, is not read from .npz; "
            "load the torch library's folder of it"
        )
    vocab, width = big_vision.shape_of(shapes, "llm/embedder/input_embedding")
    depth, heads, _, head_dim = big_vision.shape_of(shapes, "llm/layers/attn/q_einsum/w")
    return {
        "model_type": "paligemma",
        "vision_config": big_vision.vision_config(shapes),
        "text_config": {
            "model_type": "gemma",
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": big_vision.shape_of(shapes, "llm/layers/attn/kv_einsum/w")[2],
            "head_dim": head_dim,
            "intermediate_size": big_vision.shape_of(shapes, "llm/layers/mlp/linear")[1],
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        "image_token_index": 0,
        "projection_dim": big_vision.shape_of(shapes, "img/head/kernel")[1],
        "tie_word_embeddings": True,
    }
