"""Qwen2.5-VL: Qwen2-VL with windows in the tower, and time counted in seconds.

Source: Qwen2.5-VL (arXiv 2502.13923); sizes from the releases' config.json.
"""

from lvlm_jax import llm
from lvlm_jax.connectors.keys import QWEN2_MERGER
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import qwen_vl as towers
from lvlm_jax.zoo.qwen_vl import FLAT, NESTED, Family, pictures
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

FAMILY = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    tower="qwen2_5_vl_vision",
    decoder=llm.qwen2_vl,
    merger_names=QWEN2_MERGER,
    layouts={**FLAT, **NESTED},
)
MODEL_TYPE, ARCHITECTURE, LAYOUTS = FAMILY.model_type, FAMILY.architecture, FAMILY.layouts
fits, rows = FAMILY.fits, FAMILY.rows
from_hf, to_hf, processor = FAMILY.from_hf, FAMILY.to_hf, FAMILY.processor

# As released, with 2 time positions a second.
_NATIVE = Native(
    min_pixels=3136,
    max_pixels=12845056,
    min_frame=128 * 28**2,
    max_frame=768 * 28**2,
    max_clip=int(0.9 * 128000) * 28**2,
    rate=2.0,
)


def _system(size: str, tower: str) -> Spec:
    vision = towers.PRESETS[tower]
    name, source = f"qwen2_5_vl_{size}", f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct"
    config = FAMILY.config(vision, llm.PRESETS[f"{name}_llm"])
    return FAMILY.system(name, config, "qwen2_vl", source, pictures(vision, _NATIVE, CLIP_MEAN, CLIP_STD))


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("3b", "qwen2_5_vl"),
        _system("7b", "qwen2_5_vl"),
        _system("32b", "qwen2_5_vl_wide"),
        _system("72b", "qwen2_5_vl_wide"),
    )
}
"""Systems by name."""
