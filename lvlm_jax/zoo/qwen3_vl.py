"""Qwen3-VL, the dense ones: a tower with learned positions, deepstack, axes by turns, the time of a frame as text.

Source: Qwen3-VL (arXiv 2511.21631); sizes from the releases' config.json.
"""

from lvlm_jax import llm
from lvlm_jax.connectors.keys import QWEN3_MERGER
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import qwen_vl as towers
from lvlm_jax.zoo.qwen_vl import NESTED, Family, pictures
from lvlm_jax.zoo.spec import HALF, Spec

FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    tower="qwen3_vl_vision",
    decoder=llm.qwen3_vl,
    merger_names=QWEN3_MERGER,
    layouts=NESTED,
    stamp="qwen3_vl",
)
MODEL_TYPE, ARCHITECTURE, LAYOUTS = FAMILY.model_type, FAMILY.architecture, FAMILY.layouts
fits, rows = FAMILY.fits, FAMILY.rows
from_hf, to_hf, processor = FAMILY.from_hf, FAMILY.to_hf, FAMILY.processor

# As released: 256 * 256 to 4096 * 4096 pixels.
_NATIVE = Native(
    min_pixels=65536,
    max_pixels=16777216,
    min_frame=128 * 32**2,
    max_frame=768 * 32**2,
    max_clip=int(0.9 * 128000) * 32**2,
)


def _system(size: str, tower: str) -> Spec:
    vision = towers.PRESETS[tower]
    name, source = f"qwen3_vl_{size}", f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    config = FAMILY.config(vision, llm.PRESETS[f"{name}_llm"])
    return FAMILY.system(name, config, "qwen3_vl", source, pictures(vision, _NATIVE, HALF, HALF))


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("2b", "qwen3_vl_small"),
        _system("4b", "qwen3_vl_small"),
        _system("8b", "qwen3_vl"),
        _system("32b", "qwen3_vl"),
    )
}
"""Systems by name."""
