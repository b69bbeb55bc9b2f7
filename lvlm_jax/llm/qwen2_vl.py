"""The language models of Qwen2-VL and Qwen2.5-VL: Qwen2's decoder, rotated by time, row and column.

Sizes and config.json; the key table is LLaMA's. Source: Qwen2-VL (arXiv 2409.12191), section 2.1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import fields
from lvlm_jax.llm import llama, qwen2
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.llm.rope import mrope_from_hf, mrope_to_hf

rows = llama.rows
UNUSED, BASE, LAYERS = llama.UNUSED, llama.BASE, llama.LAYERS

MODEL_TYPE, SECTIONS, INTERLEAVED = "qwen2_vl_text", (16, 24, 24), False
"""Name of the public class's config; pairs of a head that turn by time, row and column, in blocks."""

_AXES = {"mrope": SECTIONS, "mrope_interleaved": INTERLEAVED}
_25 = _AXES | {"qkv_bias": True, "rope_theta": 1000000.0, "norm_eps": 1e-6, "context": 128000}
_3B = {"vocab": 151936, "width": 2048, "depth": 36, "heads": 16, "kv_heads": 2, "mlp_dim": 11008, "tied": True}
_32B = {"vocab": 152064, "width": 5120, "depth": 64, "heads": 40, "kv_heads": 8, "mlp_dim": 27648}

PRESETS: dict[str, DecoderConfig] = {
    "qwen2_vl_2b_llm": dataclasses.replace(qwen2.PRESETS["qwen2_1.5b"], **_AXES),  # Qwen/Qwen2-VL-2B-Instruct
    "qwen2_vl_7b_llm": dataclasses.replace(qwen2.PRESETS["qwen2_7b"], **_AXES),  # Qwen/Qwen2-VL-7B-Instruct
    "qwen2_vl_72b_llm": dataclasses.replace(qwen2.PRESETS["qwen2_72b"], **_AXES),  # Qwen/Qwen2-VL-72B-Instruct
    "qwen2_5_vl_3b_llm": DecoderConfig(**_25, **_3B),  # Qwen/Qwen2.5-VL-3B-Instruct
    "qwen2_5_vl_7b_llm": dataclasses.replace(qwen2.PRESETS["qwen25_7b"], **_25),  # Qwen/Qwen2.5-VL-7B-Instruct
    "qwen2_5_vl_32b_llm": DecoderConfig(**_25, **_32B),  # Qwen/Qwen2.5-VL-32B-Instruct
    "qwen2_5_vl_72b_llm": dataclasses.replace(qwen2.PRESETS["qwen25_72b"], **_25),  # Qwen/Qwen2.5-VL-72B-Instruct
}
"""Decoders, each from the config.json of the release named beside it."""

DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
"""What the public class assumes for fields that a config leaves out, where Qwen2's assumes something else."""


def without_axes(config: DecoderConfig) -> DecoderConfig:
    """The same decoder with positions that are counted once."""
    return dataclasses.replace(config, mrope=None, mrope_interleaved=False)


def fits(config: DecoderConfig) -> bool:
    """Whether Qwen2-VL's public class can hold this decoder."""
    axes = config.mrope is not None and config.mrope_interleaved == INTERLEAVED
    return axes and qwen2.fits(without_axes(config))


def from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """A public config (``text_config`` of a larger one).

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    plain, axes = mrope_from_hf(fields(config, DEFAULTS), SECTIONS, INTERLEAVED)
    return dataclasses.replace(qwen2.from_hf(plain), **axes)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The public config; `from_hf` reads it back."""
    public = mrope_to_hf(qwen2.to_hf(without_axes(config)), config.mrope, config.mrope_interleaved)
    return {**public, "model_type": MODEL_TYPE, "architectures": ["Qwen2VLTextModel"]}
