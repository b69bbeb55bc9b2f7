"""PaliGemma 1 and 2: SigLIP to its very end, one dense layer, Gemma, and attention that is whole over the prefix.

Source: PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555). Keys are those of the torch library's
`PaliGemmaForConditionalGeneration`; parts stand where LLaVA's do. Places (``<loc0000>`` ...) and shapes (``<seg000>``
...) are ordinary words of the vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm, vision
from lvlm_jax.connectors import LinearConfig
from lvlm_jax.keymap import Row, dense, fields, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo import llava
from lvlm_jax.zoo.spec import HALF, Spec

MODEL_TYPE, ARCHITECTURE = "paligemma", "PaliGemmaForConditionalGeneration"

DECODERS = ("gemma", "gemma2")
"""The language models that its public class is released with."""

LAYOUTS = {name: at for name, at in llava.LAYOUTS.items() if name != "llava-original"}

# ---------------------------------------------------------------------------------------------------------------------
# Systems


def _system(name: str, decoder: str, side: int, source: str) -> Spec:
    tower = dataclasses.replace(
        vision.siglip.PRESETS["siglip_so400m_14_384"],
        image_size=side,
        pool="none",
        feature_layer=-1,
        feature_norm=True,
    )
    # Gemma's words, 1024 places, 128 shapes and <image>, padded to a multiple of 64 as the hub's files are.
    words = {**llm.gemma.PRESETS, **llm.gemma2.PRESETS}[decoder]
    config = LVLMConfig(
        vision=tower,
        connector=LinearConfig(),
        llm=dataclasses.replace(words, vocab=257216),
        attention="prefix",
    )
    image = ImageSpec(size=side, patch=14, mean=HALF, std=HALF, resample="bicubic", fit="squash")
    return Spec(name=name, config=config, image=image, template="paligemma", source=source, image_token_id=257152)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("paligemma_3b_224", "gemma_2b", 224, "google/paligemma-3b-pt-224"),
        _system("paligemma_3b_448", "gemma_2b", 448, "google/paligemma-3b-pt-448"),
        _system("paligemma_3b_896", "gemma_2b", 896, "google/paligemma-3b-pt-896"),
        _system("paligemma2_3b_224", "gemma2_2b", 224, "google/paligemma2-3b-pt-224"),
        _system("paligemma2_10b_224", "gemma2_9b", 224, "google/paligemma2-10b-pt-224"),
        _system("paligemma2_28b_224", "gemma2_27b", 224, "google/paligemma2-28b-pt-224"),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys and config.json


def rows(config: LVLMConfig, layout: str = "hf-5") -> list[Row]:
    """The key table of a whole PaliGemma in one layout, a key of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"a PaliGemma has no layout {layout!r}; the layouts are {', '.join(LAYOUTS)}")
    at = LAYOUTS[layout]
    tower, decoder = vision.FAMILIES[vision.family_of(config.vision)], llm.FAMILIES[llm.family_of(config.llm)]
    return [
        *tower.rows(config.vision, "vision", at.vision),
        *dense("connector/linear_1", f"{at.connector}.linear", bias=True),
        *decoder.rows(config.llm, "llm", at.llm, at.head),
    ]


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    return (
        isinstance(config.connector, LinearConfig)
        and config.fusion is None
        and (config.attention, config.newline, config.vision.feature_norm) == ("prefix", False, True)
        and vision.family_of(config.vision) == "siglip_vision_model"
        and llm.family_of(config.llm) in DECODERS
    )


DEFAULTS = {"image_token_index": 256000, "projection_dim": 2048, "tie_word_embeddings": True}
"""What the public class assumes for fields that a config leaves out."""


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("vision_config", "text_config"):
        if not config.get(part):
            raise ValueError(
                f"config.json: {part} is missing; is this a config of the torch library's PaliGemma class?"
            )
    f = fields(config, DEFAULTS | {"image_token_index": config.get("image_token_id", DEFAULTS["image_token_index"])})
    one_of("vision_config.model_type", f["vision_config"].get("model_type"), ["siglip_vision_model"])
    tower = vision.siglip.from_hf(f["vision_config"])
    # The class makes the prefix whole by itself, whatever the decoder's own field says.
    text = {name: value for name, value in f["text_config"].items() if name != "use_bidirectional_attention"}
    text["tie_word_embeddings"] = f["tie_word_embeddings"]
    decoder = llm.FAMILIES[one_of("text_config.model_type", text.get("model_type", "gemma"), DECODERS)].from_hf(text)
    one_of("projection_dim", f["projection_dim"], [decoder.width])
    whole = LVLMConfig(
        vision=dataclasses.replace(tower, feature_layer=-1, feature_norm=True),
        connector=LinearConfig(),
        llm=decoder,
        attention="prefix",
    )
    return whole, int(f["image_token_index"])


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back. It says nothing of `image`."""
    tower = {"projection_dim": config.llm.width, "num_image_tokens": config.visual_tokens}
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vision_config": {**vision.siglip.to_hf(config.vision), **tower},
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "image_token_index": image_token_id,
        "projection_dim": config.llm.width,
        "hidden_size": config.llm.width,
        "tie_word_embeddings": config.llm.tied,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model."""
    return {"processor_class": "PaliGemmaProcessor", "image_seq_length": config.visual_tokens}


__all__ = [
    "ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "SYSTEMS",
    "fits",
    "from_hf",
    "processor",
    "rows",
    "to_hf",
]
