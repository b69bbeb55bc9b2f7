"""GLM-4-0414 (9B, 32B): GLM-4 with a norm behind each branch. Sizes, config.json and key table.

Source: ChatGLM (arXiv 2406.12793); THUDM/GLM-4, release of April 2025.
"""

import functools
from collections.abc import Mapping
from typing import Any

from lvlm_jax.llm import glm
from lvlm_jax.llm.config import DecoderConfig

UNUSED, BASE, LAYERS = glm.UNUSED, glm.BASE, glm.LAYERS

PARTS = {**glm.PARTS, "post_norms": True}
"""What all its sizes have and LLaMA has not."""

_GLM4 = {
    **PARTS,
    "rotary_fraction": 0.5,
    "vocab": 151552,
    "kv_heads": 2,
    "norm_eps": 1e-5,
    "context": 32768,
}

PRESETS: dict[str, DecoderConfig] = {
    "glm4_0414_9b": DecoderConfig(  # THUDM/GLM-4-9B-0414
        **_GLM4, width=4096, depth=40, heads=32, mlp_dim=13696, qkv_bias=True
    ),
    "glm4_0414_32b": DecoderConfig(  # THUDM/GLM-4-32B-0414
        **_GLM4, width=6144, depth=61, heads=48, mlp_dim=23040
    ),
}
"""Decoders, each from the config.json of the release named beside it."""

rows = functools.partial(
    glm.rows,
    norms={
        "norm1": "input_layernorm",
        "post_norm1": "post_self_attn_layernorm",
        "norm2": "post_attention_layernorm",
        "post_norm2": "post_mlp_layernorm",
    },
)
"""The key table of a decoder, as `glm.rows` takes its arguments."""


def fits(config: DecoderConfig) -> bool:
    """Whether GLM-4-0414's public class can hold this decoder."""
    return config.holds(PARTS, glm.OPTIONAL)


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one, or a decoder's own config.json).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    return DecoderConfig(**glm.values(config) | PARTS)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    return {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], **glm.public_values(config)}
