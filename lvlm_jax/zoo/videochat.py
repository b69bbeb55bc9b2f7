"""VideoChat (Embed): BLIP-2's front with a query over time beside EVA's last blocks, and 64 queries more.

A clip of some frames is 96 tokens, whatever their number; a picture is a clip of one frame, or stands still in one of
several. What the authors train, and release, are the blocks over time, the norm behind them, the extra queries and the
dense layer to the language model. A whole model is written under their names.
Source: VideoChat (arXiv 2305.06355), section 4, and OpenGVLab/Ask-Anything, video_chat/.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import QFormerConfig, qformer
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.keymap import Row, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import blip2_vit, video
from lvlm_jax.vision.video import ClipConfig
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo import minigpt4
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "lvlm_jax_videochat", None
"""Our own ``model_type``: the torch library has no class for it, and stops at a name that it does not know."""

LAYOUTS = {"videochat": "extra_query_tokens"}
"""The name of the layout and the key that it is known by."""

# ---------------------------------------------------------------------------------------------------------------------
# Systems

# conversation.py, `load_video`; its training (dataset/__init__.py) takes ImageNet's mean and deviation instead.
_IMAGE = ImageSpec(size=224, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="crop")
_VIDEO = VideoSpec(sampler="videochat", frames=8, sentence="videochat", stills=True)


def _system(name: str, decoder: str, source: str) -> Spec:
    config = LVLMConfig(
        vision=video.PRESETS["videochat_eva_g14_224"],
        connector=dataclasses.replace(qformer.PRESETS["qformer_blip2"], extra=64),
        llm=dataclasses.replace(llm.PRESETS[decoder], vocab=32001),
    )
    return Spec(
        name=name,
        config=config,
        image=_IMAGE,
        template="videochat",
        source=source,
        image_token_id=32000,
        released=False,
        video=_VIDEO,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("videochat_7b", "llama1_7b", "Vision-CAIR/vicuna-7b"),
        # config.json: StableVicuna
        _system("videochat_13b", "llama1_13b", "CarperAI/stable-vicuna-13b-delta"),
    )
}
"""Systems by name; `source` has the tokenizer and the language model."""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: LVLMConfig, layout: str = "videochat") -> list[Row]:
    """The key table of a whole model under the authors' names."""
    if layout not in LAYOUTS:
        raise ValueError(f"a VideoChat has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return [
        *video.rows(config.vision),
        *qformer.rows(config.connector, "connector/qformer", layout="lavis"),
        *minigpt4.projection_rows(),
        *minigpt4.host_rows(config),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# config.json

_OWN = ("frames", "global_blocks", "final_eps")
"""What a tower has beside BLIP-2's: fields of `ClipConfig`."""


def _frame_by_frame(tower: ClipConfig) -> ViTConfig:
    """BLIP-2's tower in it."""
    return ViTConfig(**{field.name: getattr(tower, field.name) for field in dataclasses.fields(ViTConfig)})


def fits(config: LVLMConfig) -> bool:
    """Whether a model is of this kind."""
    tower, between = config.vision, config.connector
    if not isinstance(tower, ClipConfig) or tower.joint or not isinstance(between, QFormerConfig):
        return False
    plain = dataclasses.replace(config, vision=_frame_by_frame(tower), connector=dataclasses.replace(between, extra=0))
    return between.extra > 0 and between.vocab is None and minigpt4.fits_front(plain)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("vision_config", "text_config", "connector"):
        if not config.get(part):
            raise ValueError(f"config.json: {part} is missing; a VideoChat names it")
    host = llm.FAMILIES[one_of("text_config.model_type", config["text_config"].get("model_type"), llm.FAMILIES)]
    tower = dataclasses.asdict(blip2_vit.from_hf(config["vision_config"]))
    whole = LVLMConfig(
        vision=ClipConfig(**tower, **{name: config["vision_read"][name] for name in _OWN}),
        connector=connector_keys.from_dict(config["connector"]),
        llm=host.from_hf(config["text_config"]),
        compat_bos_bug=config.get("compat_bos_bug"),
    )
    return whole, int(config["image_token_id"])


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """A config.json of our own, which `from_hf` reads back. It says nothing of `image`."""
    return {
        "model_type": MODEL_TYPE,
        "vision_config": blip2_vit.to_hf(_frame_by_frame(config.vision)),
        "vision_read": {name: getattr(config.vision, name) for name in _OWN},
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "connector": connector_keys.to_dict(config.connector),
        "compat_bos_bug": config.compat_bos_bug,
        "image_token_id": image_token_id,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: it has none for this kind."""
    return {}
