"""Chameleon, whole: sizes by name, key table, config.json both ways.

Source: Chameleon (arXiv 2405.09818). Keys are those of the torch library's `ChameleonForConditionalGeneration`. Its
decoder is LLaMA's with a layer norm on each head's queries and keys, whose weights differ from head to head (the
authors' shards had their own; ``model_parallel_size`` says how many, and bears on nothing); 34B norms what its branches
give instead of what they get (``swin_norm``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax.config import build
from lvlm_jax.keymap import Row, fields, one_of
from lvlm_jax.llm import llama
from lvlm_jax.llm.decoder import DecoderConfig
from lvlm_jax.models.unified import UnifiedConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import vqgan

MODEL_TYPE, ARCHITECTURE = "chameleon", "ChameleonForConditionalGeneration"

OWN_TYPE = "lvlm_jax_unified"
"""``model_type`` of a model of this make that the torch library has no class for."""

PARTS = {"qk_norm": "head_layer"}
"""What its decoders have and LLaMA's has not."""

QK_EPS = 1e-5
"""Of the norms of queries and keys: written into the class, and the same as the other norms' in both releases."""

# 65536 words: <s>, <pad>, </s>, <unk>, 8192 picture tokens, <eoss> and <racm3:break>, reserved ones, text. Which code
# each picture token stands for is in the release's own config.json, whose order these ids do not keep.
_WORDS = {"code_ids": tuple(range(4, 8196)), "end_id": 8196, "begin_id": 8197, "image_id": 8711, "text_only": True}


def _decoder(**sizes: Any) -> DecoderConfig:
    return DecoderConfig(**PARTS, vocab=65536, norm_eps=1e-5, context=4096, **sizes)


PRESETS: dict[str, UnifiedConfig] = {
    "chameleon_7b": UnifiedConfig(  # facebook/chameleon-7b
        vision=vqgan.PRESETS["chameleon_vq"],
        llm=_decoder(width=4096, depth=32, heads=32, kv_heads=32, mlp_dim=11008),
        **_WORDS,
    ),
    "chameleon_34b": UnifiedConfig(  # facebook/chameleon-30b
        vision=vqgan.PRESETS["chameleon_vq"],
        llm=_decoder(width=8192, depth=48, heads=64, kv_heads=8, mlp_dim=22016, order="swin"),
        **_WORDS,
    ),
}
"""Models, each with the sizes of the release named beside it."""

IMAGE = ImageSpec(size=512, patch=16, mean=(1.0,) * 3, std=(1.0,) * 3, resample="lanczos", fit="crop", rescale=0.0078)
"""How pictures come to its tokenizer: from -1 to about 1, by its processor's own rounded factor."""

UNUSED = llama.UNUSED


def rows(config: UnifiedConfig) -> list[Row]:
    """The key table of a whole Chameleon; a tokenizer's decoder has the authors' names behind ``model.vqmodel.``"""
    decoder = llama.rows(config.llm, "llm", "model.", "lm_head.weight")
    return [*vqgan.rows(config.vision, "vision", "model.vqmodel."), *decoder]


def fits(config: UnifiedConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    return (
        vqgan.fits(config.vision) == "chameleon_vqgan"
        and config.llm.holds(PARTS, ("order",))
        and config.llm.head_dim is None
        and config.llm.norm_eps == QK_EPS
        and config.text_only
    )


# ---------------------------------------------------------------------------------------------------------------------
# config.json

IMAGE_WORD, BEGIN, END = "<image>", "<racm3:break>", "<eoss>"
"""Names in ``vocabulary_map``."""

CODE = "IMGIMG"
"""What the name of a picture token begins with; then its code's digits as letters (A is 0), then a letter that ends."""

DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "swin_norm": False,
    "vq_config": {},
}
"""What the public class assumes for fields that a config leaves out."""


def code_name(code: int) -> str:
    """The name of a picture token."""
    return CODE + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _code(name: str) -> int:
    """The code that a picture token's name says."""
    digits = "".join(str(ord(x) - ord("A")) if "A" <= x <= "J" else x for x in name[len(CODE) : -1])
    if not digits.isdigit():
        raise ValueError(
            f"config.json: vocabulary_map has {name!r}, which is not supported; supported: {CODE}, digits as letters "
            "from A to J, and one letter behind, such as "
            f"{code_name(12)!r}"
        )
    return int(digits)


def _words(words: Mapping[str, int] | None, codes: int) -> dict[str, Any]:
    """What the vocabulary's names say of pictures."""
    words = words or {}
    if missing := [name for name in (IMAGE_WORD, BEGIN, END) if name not in words]:
        raise ValueError(
            f"config.json: vocabulary_map has no {', '.join(map(repr, missing))}; is this a config of the torch "
            "library's Chameleon class?"
        )
    of_code = {_code(name): token for name, token in words.items() if name.startswith(CODE)}
    if of_code.keys() != set(range(codes)):
        raise ValueError(
            f"config.json: vocabulary_map names {len(of_code)} picture tokens, but vq_config has {codes} codes; "
            f"supported: one for each of the codes 0 to {codes - 1}"
        )
    ids = tuple(of_code[code] for code in range(codes))
    return {"code_ids": ids, "begin_id": words[BEGIN], "end_id": words[END], "image_id": words[IMAGE_WORD]}


def from_hf(config: Mapping[str, Any]) -> UnifiedConfig:
    """The model from the torch library's config.json, or one that `to_hf` wrote.

    Raises:
      ValueError: a value that cannot be run, naming the field and what is supported.
    """
    if one_of("model_type", config.get("model_type"), [MODEL_TYPE, OWN_TYPE]) == OWN_TYPE:
        return _own_from_hf(config)
    f = fields(config, DEFAULTS)
    one_of("hidden_act", f["hidden_act"], ["silu"])
    one_of("attention_bias", f["attention_bias"], [False])
    one_of("mlp_bias", f["mlp_bias"], [False])
    one_of("rms_norm_eps", f["rms_norm_eps"], [QK_EPS])
    order = "swin" if one_of("swin_norm", f["swin_norm"], [False, True]) else "pre"
    tokenizer = vqgan.from_hf(f["vq_config"])
    return UnifiedConfig(
        vision=tokenizer,
        llm=DecoderConfig(**PARTS, **llama.values(f), order=order),
        **_words(f.get("vocabulary_map"), tokenizer.codes),
        text_only=True,
    )


_OWN = ("code_ids", "begin_id", "end_id", "image_id", "text_only")


def _own_from_hf(config: Mapping[str, Any]) -> UnifiedConfig:
    """What `to_hf` wrote of a model that the torch library has no class for."""
    if missing := [name for name in ("vq_config", "decoder", *_OWN) if name not in config]:
        raise ValueError(f"config.json: {', '.join(missing)} missing; was it written by lvlm_jax?")
    parts = {"vision": config["vq_config"], "llm": config["decoder"]}
    return build(UnifiedConfig, parts | {name: config[name] for name in _OWN}, "config.json")


def to_hf(config: UnifiedConfig) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back.

    Of the vocabulary it names what the class reads: the picture tokens and those around them. A model that it has no
    class for (one that writes pictures, or whose decoder has other parts) gets our own ``model_type`` and fields, its
    weights the same keys.
    """
    if not fits(config):
        parts = {"vq_config": dataclasses.asdict(config.vision), "decoder": dataclasses.asdict(config.llm)}
        own = {name: getattr(config, name) for name in _OWN}
        return {"model_type": OWN_TYPE, **parts, **own, "code_ids": list(config.code_ids)}
    words = {code_name(code): token for code, token in enumerate(config.code_ids)}
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        **llama.public_values(config.llm),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "model_parallel_size": 1,
        "swin_norm": config.llm.order == "swin",
        "vq_config": vqgan.to_hf(config.vision),
        "vocabulary_map": {**words, IMAGE_WORD: config.image_id, BEGIN: config.begin_id, END: config.end_id},
    }
