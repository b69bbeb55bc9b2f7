"""InstructBLIP: BLIP-2 whose Q-Former reads the instruction too, so that it asks the picture what the user asks.

Source: InstructBLIP (arXiv 2305.06500). Keys are those of the torch library's `InstructBlipForConditionalGeneration`,
the same in memory and in every file. The instruction is read by the Q-Former's own tokenizer, BERT's, which stands in
a folder beside the language model's (`QFORMER_TOKENIZER`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import qformer
from lvlm_jax.keymap import Row, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import blip2_vit
from lvlm_jax.zoo import blip2
from lvlm_jax.zoo.blip2 import HEAD, Layout
from lvlm_jax.zoo.spec import Spec

MODEL_TYPE, ARCHITECTURE = "instructblip", "InstructBlipForConditionalGeneration"

LAYOUTS = {"instructblip": Layout("qformer.embeddings.", HEAD)}

# ---------------------------------------------------------------------------------------------------------------------
# Systems


def _vicuna(name: str, llama: str, source: str) -> Spec:
    # Vicuna 1.1, which is LLaMA 1's sizes; the hub's files: 32000 words, [PAD], <image>, padded to a multiple of 64.
    config = LVLMConfig(
        vision=blip2_vit.PRESETS["blip2_vit_g14_224"],
        connector=qformer.PRESETS["qformer_text"],
        llm=dataclasses.replace(llm.llama.PRESETS[llama], vocab=32064),
    )
    image = blip2.squashed(224)
    return Spec(name=name, config=config, image=image, template="instructblip", source=source, image_token_id=32001)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _vicuna("instructblip_vicuna_7b", "llama1_7b", "Salesforce/instructblip-vicuna-7b"),
        _vicuna("instructblip_vicuna_13b", "llama1_13b", "Salesforce/instructblip-vicuna-13b"),
        blip2.flan_t5("instructblip_flan_t5_xl", "flan_t5_xl", "qformer_text", "Salesforce/instructblip-flan-t5-xl"),
        blip2.flan_t5("instructblip_flan_t5_xxl", "flan_t5_xxl", "qformer_text", "Salesforce/instructblip-flan-t5-xxl"),
    )
}
"""Systems by name."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys and config.json


def rows(config: LVLMConfig, layout: str = "instructblip") -> list[Row]:
    """The key table of a whole InstructBLIP."""
    if layout not in LAYOUTS:
        raise ValueError(f"an InstructBLIP has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return blip2.whole_rows(config, "instructblip")


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    return blip2.holds(config, reads=True)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    return blip2.read(config, "instructblip_qformer")


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back. It says nothing of `image`."""
    out = blip2.write(config, image_token_id, "instructblip_qformer")
    out["vision_config"] |= {"model_type": "instructblip_vision_model"}
    return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **out}


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model."""
    return {**blip2.processor(config), "processor_class": "InstructBlipProcessor"}


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
