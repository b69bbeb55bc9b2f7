"""Language models: one decoder, whose families are config values; one family a file."""

from types import ModuleType

from lvlm_jax.llm import llama, qwen2
from lvlm_jax.llm.decoder import Decoder, DecoderConfig

FAMILIES: dict[str, ModuleType] = {"llama": llama, "qwen2": qwen2}
"""Public ``model_type`` -> module with PRESETS, rows, from_hf, to_hf, fits."""


def family_of(config: DecoderConfig) -> str:
    """The public ``model_type`` that can hold a decoder of these values.

    Raises:
      ValueError: no public family has this combination.
    """
    for name, family in FAMILIES.items():
        if family.fits(config):
            return name
    raise ValueError(
        f"no public family ({', '.join(FAMILIES)}) holds a decoder with qkv_bias={config.qkv_bias} and "
        f"{config.heads} heads of {config.head_width} at width {config.width}; Qwen2 needs heads x head width = width"
    )


__all__ = ["FAMILIES", "Decoder", "DecoderConfig", "family_of", "llama", "qwen2"]
