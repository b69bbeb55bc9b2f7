"""Qwen3-VL, the dense ones: a tower with learned positions, deepstack, axes by turns, the time of a frame as text.

Source: Qwen3-VL (arXiv 2511.21631); sizes from the releases' config.json.
"""

from lvlm_jax import llm
from lvlm_jax.connectors.keys import QWEN3_MERGER
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.processing.native import Native
from lvlm_jax.vision import qwen_vl as towers
from lvlm_jax.zoo.qwen_vl import NESTED, Family, pictures
from lvlm_jax.zoo.spec import HALF, Spec

TEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rope_theta": 500000.0,
}
"""What the public class assumes for fields that a text config leaves out."""

FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    tower="qwen3_vl_vision",
    decoder=llm.qwen3,
    sections=(24, 20, 20),
    interleaved=True,
    defaults=TEXT_DEFAULTS,
    merger_names=QWEN3_MERGER,
    layouts=NESTED,
    stamp="qwen3_vl",
)
MODEL_TYPE, ARCHITECTURE, LAYOUTS = FAMILY.model_type, FAMILY.architecture, FAMILY.layouts
fits, rows, layout_of = FAMILY.fits, FAMILY.rows, FAMILY.layout_of
from_hf, to_hf, processor = FAMILY.from_hf, FAMILY.to_hf, FAMILY.processor

# As released: 256 * 256 to 4096 * 4096 pixels.
_NATIVE = Native(min_pixels=65536, max_pixels=16777216, min_frame=128 * 32**2, max_frame=768 * 32**2)

_QWEN3 = {
    **llm.qwen3.PARTS,
    "vocab": 151936,
    "kv_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "context": 262144,
}
_SQUARE = _QWEN3 | {"head_dim": None}  # heads that share the width out
DECODERS: dict[str, DecoderConfig] = {
    "2b": DecoderConfig(**_SQUARE, width=2048, depth=28, heads=16, mlp_dim=6144, tied=True),
    "4b": DecoderConfig(**_QWEN3, width=2560, depth=36, heads=32, mlp_dim=9728, tied=True),
    "8b": DecoderConfig(**_SQUARE, width=4096, depth=36, heads=32, mlp_dim=12288),
    "32b": DecoderConfig(**_QWEN3, width=5120, depth=64, heads=64, mlp_dim=25600),
}
"""The language models: Qwen3's sizes, for longer texts."""


def _system(size: str, tower: str) -> Spec:
    vision = towers.PRESETS[tower]
    config = FAMILY.config(vision, DECODERS[size])
    source = f"Qwen/Qwen3-VL-{size.upper()}-Instruct"
    return FAMILY.system(f"qwen3_vl_{size}", config, "qwen3_vl", source, pictures(vision, _NATIVE, HALF, HALF))


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
