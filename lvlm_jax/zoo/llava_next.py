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
from lvlm_jax.llm.decoder import DecoderConfig
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


def _system(
    name: str, decoder: DecoderConfig, source: str, template: str = "vicuna_v1", image_token_id: int = 32000
) -> Spec:
    config = LVLMConfig(vision=vision.clip.PRESETS["clip_l14_336"], connector=MlpConfig(), llm=decoder, newline=True)
    return Spec(
        name=name, config=config, image=_CLIP_336, template=template, source=source, image_token_id=image_token_id
    )


# Words of the language model, <image>, <pad>, padded to a multiple of 64, as the hub's files are.
_VICUNA = {size: dataclasses.replace(llm.llama.PRESETS[f"vicuna15_{size}"], vocab=32064) for size in ("7b", "13b")}
_MISTRAL = dataclasses.replace(llm.mistral.PRESETS["mistral_7b_v02"], vocab=32064)
_YI_34B = dataclasses.replace(llm.llama.PRESETS["yi_34b"], vocab=64064)
_LLAMA3_8B = dataclasses.replace(llm.llama.PRESETS["llama3_8b"], vocab=128320)

SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("llavanext_7b", _VICUNA["7b"], "llava-hf/llava-v1.6-vicuna-7b-hf"),
        _system("llavanext_13b", _VICUNA["13b"], "llava-hf/llava-v1.6-vicuna-13b-hf"),
        _system("llavanext_mistral_7b", _MISTRAL, "llava-hf/llava-v1.6-mistral-7b-hf", "mistral_instruct"),
        _system("llavanext_34b", _YI_34B, "llava-hf/llava-v1.6-34b-hf", "chatml_direct", 64000),
        _system("llavanext_llama3_8b", _LLAMA3_8B, "llava-hf/llama3-llava-next-8b-hf", "llava_llama_3", 128256),
    )
}
"""Systems by name."""


def fits(config: LVLMConfig) -> bool:
    """Whether the torch library's class can hold this model."""
    alone = dataclasses.replace(config, newline=False, public=None)
    others = config.pools_frames or config.public not in (None, MODEL_TYPE)
    return config.newline and not others and llava.fits(alone)


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
      ValueError: no `image`, whose tiles the file names; tiles that the class reads otherwise.
    """
    if image is None or image.tiles is None:
        raise ValueError(
            "image_spec: config.json of a model with a newline names the sizes that pictures are cut from; give the "
            "image spec with its tiles"
        )
    if image.tiles.most is not None or image.tiles.several != "tiles":
        raise ValueError(
            f"image.tiles: their class keeps every token of every picture, but here most={image.tiles.most} and "
            f"several={image.tiles.several!r}; leave both out, or set public='llava_onevision'"
        )
    return {
        **llava.to_hf(dataclasses.replace(config, newline=False, public=None), image_token_id),
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
