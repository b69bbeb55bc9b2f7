"""VideoChat2: UMT's tower over the patches of all frames, a Q-Former of 32 and 64 queries, one dense layer to a LLaMA.

The system here is what its second stage trains. Its third has adapters in the language model, and a Q-Former that reads
the question too: the same with `connector.vocab`. A whole model is written under the authors' names.
Source: MVBench (arXiv 2311.17005), section 4, and OpenGVLab/Ask-Anything, video_chat2/.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.config import build, to_dict
from lvlm_jax.connectors import QFormerConfig, qformer
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.keymap import Row, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import video
from lvlm_jax.vision.video import ClipConfig
from lvlm_jax.zoo import minigpt4
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "lvlm_jax_videochat2", None
"""Our own ``model_type``: the torch library has no class for it, and stops at a name that it does not know."""

LAYOUTS = {"videochat2": "vision_encoder.encoder."}
"""The name of the layout and the keys that it is known by."""

SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            name="videochat2_7b",
            config=LVLMConfig(
                # scripts/videochat_vicuna/config_7b_stage2.py: 8 frames, 32 and 64 queries
                vision=dataclasses.replace(video.PRESETS["videochat2_umt_l16_224"], frames=8),
                connector=dataclasses.replace(qformer.PRESETS["qformer_blip2"], extra=64),
                llm=dataclasses.replace(llm.PRESETS["llama1_7b"], vocab=32001),
            ),
            image=ImageSpec(size=224, patch=16, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="crop"),
            template="videochat",
            source="Vision-CAIR/vicuna-7b",
            image_token_id=32000,
            released=False,
            video=VideoSpec(sampler="videochat", frames=8, sentence="videochat", stills=True),
        ),
    )
}
"""Systems by name; `source` has the tokenizer and the language model."""


def rows(config: LVLMConfig, layout: str = "videochat2") -> list[Row]:
    """The key table of a whole model under the authors' names."""
    if layout not in LAYOUTS:
        raise ValueError(f"a VideoChat2 has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return [
        *video.rows(config.vision, "vision", "vision_encoder.encoder.", "vision_layernorm"),
        *qformer.rows(config.connector, "connector/qformer", layout="videochat2"),
        *minigpt4.projection_rows(),
        *minigpt4.host_rows(config),
    ]


def fits(config: LVLMConfig) -> bool:
    """Whether a model is of this kind; its Q-Former may read an instruction, as that of the third stage does."""
    if not isinstance(config.vision, ClipConfig) or not isinstance(config.connector, QFormerConfig):
        return False
    plain = config.attention == "causal" and config.fusion is None and not (config.newline or config.expert)
    return plain and config.vision.joint and llm.family_of(config.llm) == "llama"


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("vision_config", "text_config", "connector"):
        if not config.get(part):
            raise ValueError(f"config.json: {part} is missing; a VideoChat2 names it")
    host = llm.FAMILIES[one_of("text_config.model_type", config["text_config"].get("model_type"), llm.FAMILIES)]
    whole = LVLMConfig(
        vision=build(ClipConfig, config["vision_config"], "config.json: vision_config"),
        connector=connector_keys.from_dict(config["connector"]),
        llm=host.from_hf(config["text_config"]),
        compat_bos_bug=config.get("compat_bos_bug"),
    )
    return whole, int(config["image_token_id"])


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """A config.json of our own, which `from_hf` reads back. It says nothing of `image`."""
    return {
        "model_type": MODEL_TYPE,
        "vision_config": to_dict(config.vision),
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "connector": connector_keys.to_dict(config.connector),
        "compat_bos_bug": config.compat_bos_bug,
        "image_token_id": image_token_id,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: it has none for this kind."""
    return {}
