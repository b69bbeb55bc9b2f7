"""LLaVA-NeXT (LLaVA 1.6): LLaVA-1.5 with pictures cut into tiles, and a learned newline after each row of them.

Source: LLaVA-NeXT, the authors' post of January 2024 and their repository. Keys, in every layout, are LLaVA's and
``image_newline``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm, vision
from lvlm_jax.connectors import MlpConfig
from lvlm_jax.keymap import one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.processing.tiles import Tiles
from lvlm_jax.zoo import llava
from lvlm_jax.zoo.llava import LAYOUTS, layout_of, processor, rows
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "llava_next", "LlavaNextForConditionalGeneration"

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The released grids, (height, width)."""

_CLIP_336 = ImageSpec(
    size=336,
    patch=14,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resample="bicubic",
    fit="squash",
    tiles=Tiles(pinpoints=PINPOINTS),
)


def _system(name: str, decoder: str, source: str) -> Spec:
    # 32000 words, <image>, <pad>, padded to a multiple of 64, as the hub's files are.
    config = LVLMConfig(
        vision=vision.clip.PRESETS["clip_l14_336"],
        connector=MlpConfig(),
        llm=dataclasses.replace(llm.llama.PRESETS[decoder], vocab=32064),
        newline=True,
    )
    return Spec(name=name, config=config, image=_CLIP_336, template="vicuna_v1", source=source, image_token_id=32000)


SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("llavanext_7b", "vicuna15_7b", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        _system("llavanext_13b", "vicuna15_13b", "llava-hf/llava-v1.6-vicuna-13b-hf"),
    )
}
"""Systems by name."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    return config.newline and llava.fits(dataclasses.replace(config, newline=False))


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json of the torch library.

    The tiles themselves are read from the picture processor's file, which has them too.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    plain, image_token_id = llava.from_hf({**config, "model_type": llava.MODEL_TYPE})
    return dataclasses.replace(plain, newline=True), image_token_id


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """The config.json that the torch library reads; `from_hf` reads it back.

    Raises:
      ValueError: no `image`, whose tiles the file names.
    """
    if image is None or image.tiles is None:
        raise ValueError(
            "image_spec: config.json of a model with a newline names the sizes that pictures are cut from; give the "
            "image spec with its tiles"
        )
    return {
        **llava.to_hf(dataclasses.replace(config, newline=False), image_token_id),
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "image_grid_pinpoints": [list(pair) for pair in image.tiles.pinpoints],
    }


__all__ = [
    "ARCHITECTURE",
    "LAYOUTS",
    "MODEL_TYPE",
    "PINPOINTS",
    "SYSTEMS",
    "fits",
    "from_hf",
    "layout_of",
    "processor",
    "rows",
    "to_hf",
]
