"""The language models of Qwen3-VL, the dense ones: Qwen3's decoder, rotated by time, row and column by turns.

Sizes and config.json; the key table is LLaMA's. Source: Qwen3-VL (arXiv 2511.21631), section 2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields
from lvlm_jax.llm import llama, qwen3
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.qwen2_vl import without_axes
from lvlm_jax.llm.rope import mrope_from_hf, mrope_to_hf

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

MODEL_TYPE, SECTIONS, INTERLEAVED = "qwen3_vl_text", (24, 20, 20), True
"""Name of the public class's config; pairs of a head that turn by time, row and column, by turns."""

_QWEN3 = {
    **qwen3.PARTS,
    "vocab": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "context": 262144,
    "mrope": SECTIONS,
    "mrope_interleaved": INTERLEAVED,
}
_SHARED = _QWEN3 | {"head_dim": None}  # heads that share the width out

PRESETS: dict[str, DecoderConfig] = {
    "qwen3_vl_2b_llm": DecoderConfig(  # Qwen/Qwen3-VL-2B-Instruct
        **_SHARED, width=2048, depth=28, heads=16, mlp_dim=6144, tied=True
    ),
    "qwen3_vl_4b_llm": DecoderConfig(  # Qwen/Qwen3-VL-4B-Instruct
        **_QWEN3, width=2560, depth=36, heads=32, mlp_dim=9728, tied=True
    ),
    "qwen3_vl_8b_llm": DecoderConfig(**_SHARED, width=4096, depth=36, heads=32, mlp_dim=12288),  # Qwen/Qwen3-VL-8B-...
    "qwen3_vl_32b_llm": DecoderConfig(**_QWEN3, width=5120, depth=64, heads=64, mlp_dim=25600),  # Qwen/Qwen3-VL-32B-...
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {"max_position_embeddings": 128000, "rope_theta": 500000.0}
"""What the public class assumes for fields that a config leaves out, where Qwen3's assumes something else."""


def fits(config: DecoderConfig) -> bool:
    """Whether Qwen3-VL's public class can hold this decoder."""
    axes = config.mrope is not None and config.mrope_interleaved == INTERLEAVED
    return axes and config.window is None and qwen3.fits(without_axes(config))


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    plain, axes = mrope_from_hf(fields(config, DEFAULTS), SECTIONS, INTERLEAVED)
    return dataclasses.replace(qwen3.from_hf(plain), **axes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    public = mrope_to_hf(qwen3.to_hf(without_axes(config)), config.mrope, config.mrope_interleaved)
    windows = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
    public = {name: value for name, value in public.items() if name not in windows}
    return {**public, "model_type": MODEL_TYPE, "architectures": ["Qwen3VLTextModel"]}
