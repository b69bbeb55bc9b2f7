"""Qwen2-VL: pictures and videos at their own resolution, positions by time, row and column.

Source: Qwen2-VL (arXiv 2409.12191); sizes from the releases' config.json.
"""

import dataclasses

from lvlm_jax import llm
from lvlm_jax.connectors.keys import QWEN2_MERGER
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import qwen_vl as towers
from lvlm_jax.zoo.qwen_vl import FLAT, NESTED, Family, pictures
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

TEXT_DEFAULTS = {
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
"""What the public class assumes for fields that a text config leaves out."""

FAMILY = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    tower="qwen2_vl_vision",
    decoder=llm.qwen2,
    sections=(16, 24, 24),
    interleaved=False,
    defaults=TEXT_DEFAULTS,
    merger_names=QWEN2_MERGER,
    layouts={**FLAT, **NESTED},
)
MODEL_TYPE, ARCHITECTURE, LAYOUTS = FAMILY.model_type, FAMILY.architecture, FAMILY.layouts
fits, rows, layout_of = FAMILY.fits, FAMILY.rows, FAMILY.layout_of
from_hf, to_hf, processor = FAMILY.from_hf, FAMILY.to_hf, FAMILY.processor

# As released, from 4 to 16384 tokens; a vision row of 5120 patches holds 1280 of them.
_NATIVE = Native(min_pixels=3136, max_pixels=12845056, min_frame=128 * 28**2, max_frame=768 * 28**2)


def _system(name: str, decoder: str, source: str, vocab: int | None = None) -> Spec:
    tower, text = towers.PRESETS["qwen2_vl"], llm.qwen2.PRESETS[decoder]
    config = FAMILY.config(tower, dataclasses.replace(text, vocab=vocab or text.vocab))
    return FAMILY.system(name, config, "qwen2_vl", source, pictures(tower, _NATIVE, CLIP_MEAN, CLIP_STD))


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("qwen2_vl_2b", "qwen2_1.5b", "Qwen/Qwen2-VL-2B-Instruct"),
        _system("qwen2_vl_7b", "qwen2_7b", "Qwen/Qwen2-VL-7B-Instruct"),
        _system("qwen2_vl_72b", "qwen2_72b", "Qwen/Qwen2-VL-72B-Instruct"),
    )
}
"""Systems by name."""
