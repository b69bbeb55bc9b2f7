"""LLaVA-NeXT-Video: LLaVA-NeXT that also reads videos, each frame's features averaged before the connector.

Source: LLaVA-NeXT-Video, the authors' post of April 2024 and their repository. Keys, in every layout, are LLaVA-NeXT's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax.keymap import one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.zoo import llava_next
from lvlm_jax.zoo.llava import LAYOUTS, layout_of, rows
from lvlm_jax.zoo.spec import Spec

MODEL_TYPE, ARCHITECTURE = "llava_next_video", "LlavaNextVideoForConditionalGeneration"

VIDEO = VideoSpec(frames=32, pool="corner", fit="crop")
"""32 frames of 12 x 12 visual tokens, cut to the square in their middle."""


def _system(name: str, base: str, source: str) -> Spec:
    config = dataclasses.replace(llava_next.SYSTEMS[base].config, pools_frames=True)
    # <video> is the word before <image>.
    return dataclasses.replace(
        llava_next.SYSTEMS[base], name=name, config=config, source=source, image_token_id=32001, video=VIDEO
    )


SYSTEMS: dict[str, Spec] = {
    "llavanext_video_7b": _system("llavanext_video_7b", "llavanext_7b", "llava-hf/LLaVA-NeXT-Video-7B-hf")
}
"""Systems by name."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    return config.pools_frames and llava_next.fits(dataclasses.replace(config, pools_frames=False))


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library; where a video stands, a text has that id, too.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    one_of("spatial_pool_mode", config.get("spatial_pool_mode", "average"), ["average"])
    one_of("spatial_pool_stride", config.get("spatial_pool_stride", 2), [2])
    missing = {"image_token_index": config.get("image_token_id", 32001)}
    plain, image_token_id = llava_next.from_hf({**missing, **config, "model_type": llava_next.MODEL_TYPE})
    return dataclasses.replace(plain, pools_frames=True), image_token_id


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back.

    Raises:
      ValueError: as `llava_next.to_hf`.
    """
    tokens = config.visual_tokens
    return {
        **llava_next.to_hf(dataclasses.replace(config, pools_frames=False), image_token_id, image),
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        # The released vocabularies have <video> before <image>.
        "video_token_index": image_token_id - 1,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
        "video_seq_length": tokens // 4,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: the fields of processor_config.json."""
    return {**llava_next.processor(config), "processor_class": "LlavaNextVideoProcessor", "video_token": "<video>"}


__all__ = [
    "ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "SYSTEMS",
    "VIDEO",
    "fits",
    "from_hf",
    "layout_of",
    "processor",
    "rows",
    "to_hf",
]
