"""LLaVA-OneVision: one model for single pictures in up to 36 tiles, several pictures whole, videos of pooled frames.

Source: LLaVA-OneVision (arXiv 2408.03326) and the authors' repository. Keys, in every layout, are LLaVA-NeXT's; how a
picture or a video is laid out stands in `ImageSpec.tiles` and `VideoSpec`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import MlpConfig
from lvlm_jax.keymap import one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.frames import VideoSpec
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tiles import Tiles
from lvlm_jax.zoo import llava
from lvlm_jax.zoo.llava import LAYOUTS, rows
from lvlm_jax.zoo.spec import HALF, Spec

MODEL_TYPE, ARCHITECTURE = "llava_onevision", "LlavaOnevisionForConditionalGeneration"

PINPOINTS = tuple((384 * high, 384 * wide) for high in range(1, 7) for wide in range(1, 7))
"""The released grids, (height, width) in pixels, in the torch library's order."""

IMAGE = ImageSpec(
    size=384,
    patch=14,
    mean=HALF,
    std=HALF,
    resample="bicubic",
    fit="squash",
    tiles=Tiles(pinpoints=PINPOINTS, most=9, several="whole"),
)

VIDEO = VideoSpec(frames=32, newline="video", pool="bilinear")
"""32 frames of 14 x 14 visual tokens, and one newline behind the last."""

VISION = llava.ORIGINAL_TOWERS["google/siglip-so400m-patch14-384"]
"""The tower without its last block and its pooling head, read to its end."""

# The hub's files: Qwen2's rows, <image> and <video> beyond them, padded to a multiple of 64.
_DECODERS = {
    size: dataclasses.replace(llm.qwen2.PRESETS[f"qwen2_{size.lower()}"], vocab=vocab)
    for size, vocab in (("0.5b", 152000), ("7b", 152128), ("72b", 152128))
}


def _system(size: str, stage: str) -> Spec:
    config = LVLMConfig(vision=VISION, connector=MlpConfig(), llm=_DECODERS[size], newline=True, public=MODEL_TYPE)
    return Spec(
        name=f"llava_onevision_{size.replace('.', '_')}_{stage}",
        config=config,
        image=IMAGE,
        template="qwen_chatml",  # the authors' qwen_1_5
        source=f"llava-hf/llava-onevision-qwen2-{size}-{stage}-hf",
        image_token_id=151646,
        video=VIDEO,
    )


SYSTEMS: dict[str, Spec] = {
    spec.name: spec for spec in (_system(size, stage) for size in _DECODERS for stage in ("si", "ov"))
}
"""Systems by name: after the single-image stage ("si"), and after the last one ("ov")."""

DEFAULTS = {
    "image_token_index": 151646,
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
}
"""What the public class assumes for fields that a config leaves out, where LLaVA's class assumes something else."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    alone = dataclasses.replace(config, newline=False, public=None)
    return config.newline and config.public == MODEL_TYPE and llava.fits(alone)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    Tiles are read from the picture processor's file, which has them too. Where a video stands, a text has the image
    token here.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    parts = {"vision_config": "siglip_vision_model", "text_config": "qwen2"}
    filled = {part: {"model_type": kind, **config[part]} for part, kind in parts.items() if config.get(part)}
    missing = DEFAULTS | {"image_token_index": config.get("image_token_id", DEFAULTS["image_token_index"])}
    plain, image_token_id = llava.from_hf({**missing, **config, **filled, "model_type": llava.MODEL_TYPE})
    return dataclasses.replace(plain, newline=True, public=MODEL_TYPE), image_token_id


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back.

    Raises:
      ValueError: no `image`, whose tiles the file names; tiles that the class reads otherwise.
    """
    if image is None or image.tiles is None:
        raise ValueError(
            "image_spec: config.json of a model with a newline names the sizes that pictures are cut from; give the "
            "image spec with its tiles"
        )
    if image.tiles.most is None or image.tiles.several != "whole":
        raise ValueError(
            f"image.tiles: their class reads several pictures whole and interpolates grids above a limit, but here "
            f"several={image.tiles.several!r} and most={image.tiles.most}; set several='whole' and most=9"
        )
    theirs = image.tiles.to_hf()
    return {
        **llava.to_hf(dataclasses.replace(config, newline=False, public=None), image_token_id),
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        # The released vocabularies have <video> behind <image>.
        "video_token_index": image_token_id + 1,
        **{name: theirs[name] for name in ("image_grid_pinpoints", "vision_aspect_ratio") if name in theirs},
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: the fields of processor_config.json."""
    return {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": config.visual_tokens,
        "vision_feature_select_strategy": "full",
        "video_token": "<video>",
    }


__all__ = [
    "ARCHITECTURE",
    "IMAGE",
    "LAYOUTS",
    "MODEL_TYPE",
    "PINPOINTS",
    "SYSTEMS",
    "VIDEO",
    "VISION",
    "fits",
    "from_hf",
    "processor",
    "rows",
    "to_hf",
]
