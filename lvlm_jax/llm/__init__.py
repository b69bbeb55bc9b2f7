"""Language models: one decoder and one encoder-decoder, whose families are config values; one family a file."""

from types import ModuleType

from lvlm_jax.llm import (
    chatglm,
    chatglm_6b,
    chinchilla,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mosaic_gpt,
    mpt,
    opt,
    palm,
    qwen,
    qwen2,
    qwen2_vl,
    qwen3,
    qwen3_vl,
    smollm2,
    t5,
)
from lvlm_jax.llm.decoder import Decoder, DecoderConfig
from lvlm_jax.llm.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "opt": opt,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "mpt": mpt,
    "mosaic_gpt": mosaic_gpt,
    "glm": glm,
    "glm4": glm4,
    "chatglm": chatglm,
    "chatglm_6b": chatglm_6b,
    "qwen": qwen,
    "palm": palm,
    "chinchilla": chinchilla,
    "qwen2_vl_text": qwen2_vl,
    "qwen2_5_vl_text": qwen2_vl,
    "qwen3_vl_text": qwen3_vl,
}
"""Public ``model_type`` -> module with PRESETS, rows, from_hf, to_hf, fits, UNUSED, BASE, LAYERS.

ChatGLM-6B's files say "chatglm" as its successors' do; here it has a name of its own."""

ENCODER_DECODERS: dict[str, ModuleType] = {"t5": t5}
"""The same for encoder-decoders."""

PRESETS: dict[str, DecoderConfig] = {
    name: config for family in (*FAMILIES.values(), smollm2) for name, config in family.PRESETS.items()
}
"""Every released decoder by name."""


def family_of(config: DecoderConfig | EncoderDecoderConfig) -> str:
    """The public ``model_type`` that can hold a language model of these values.

    Raises:
      ValueError: no public family has this combination.
    """
    if isinstance(config, EncoderDecoderConfig):
        return next(name for name, family in ENCODER_DECODERS.items() if family.fits(config))
    names = list(FAMILIES) if config.public is None else [config.public]
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"public={name!r} is no public family of decoders; they are {', '.join(FAMILIES)}")
        if FAMILIES[name].fits(config):
            return name
    parts = ", ".join(f"{name}={value!r}" for name, value in config.parts.items()) or "no parts of its own"
    raise ValueError(
        f"no public family ({', '.join(names)}) holds a decoder with {parts} and {config.heads} heads of "
        f"{config.head_width} at width {config.width}; Qwen, OPT, GPT and MPT need heads x head width = width, Gemma 2 "
        "and 3 a width that their heads divide"
    )


__all__ = [
    "ENCODER_DECODERS",
    "FAMILIES",
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "chatglm",
    "chatglm_6b",
    "chinchilla",
    "family_of",
    "gemma",
    "gemma2",
    "gemma3",
    "glm",
    "glm4",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mosaic_gpt",
    "mpt",
    "opt",
    "palm",
    "qwen",
    "qwen2",
    "qwen2_vl",
    "qwen3",
    "qwen3_vl",
    "smollm2",
    "t5",
]
