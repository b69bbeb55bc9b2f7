"""Qwen2-VL: pictures and videos at their own resolution, positions by time, row and column.

Source: Qwen2-VL (arXiv 2409.12191); sizes from the releases' config.json.
"""

from lvlm_jax import llm
from lvlm_jax.connectors.keys import QWEN2_MERGER
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import qwen_vl as towers
from lvlm_jax.zoo.qwen_vl import FLAT, NESTED, Family, pictures
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

FAMILY = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    tower="qwen2_vl_vision",
    decoder=llm.qwen2_vl,
    merger_names=QWEN2_MERGER,
    layouts={**FLAT, **NESTED},
)
MODEL_TYPE, ARCHITECTURE, LAYOUTS = FAMILY.model_type, FAMILY.architecture, FAMILY.layouts
fits, rows = FAMILY.fits, FAMILY.rows
from_hf, to_hf, processor = FAMILY.from_hf, FAMILY.to_hf, FAMILY.processor

# As released, from 4 to 16384 tokens; a vision row of 5120 patches holds 1280 of them.
_NATIVE = Native(
    min_pixels=3136,
    max_pixels=12845056,
    min_frame=128 * 28**2,
    max_frame=768 * 28**2,
    max_clip=int(0.9 * 128000) * 28**2,
)


def _system(size: str) -> Spec:
    name, tower = f"qwen2_vl_{size}", towers.PRESETS["qwen2_vl"]
    config = FAMILY.config(tower, llm.PRESETS[f"{name}_llm"])
    image = pictures(tower, _NATIVE, CLIP_MEAN, CLIP_STD)
    return FAMILY.system(name, config, "qwen2_vl", f"Qwen/Qwen2-VL-{size.upper()}-Instruct", image)


SYSTEMS: dict[str, Spec] = {spec.name: spec for spec in map(_system, ("2b", "7b", "72b"))}
"""Systems by name."""
