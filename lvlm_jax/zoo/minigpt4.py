"""MiniGPT-4 and MiniGPT-v2: BLIP-2's frozen front, or its tower alone, and one dense layer to a LLaMA.

The first reads the Q-Former's 32 queries; its Llama-2 variant and version 2 join four patches of a row instead, and
version 2 sees pictures of 448 pixels, to which the tower's positions are interpolated. What the authors release is
the dense layer alone, and version 2's adapters (`hub.minigpt4`); a whole model is written under their names too, with a
config.json of our own, since the torch library has no class for it.
Source: MiniGPT-4 (arXiv 2304.10592), MiniGPT-v2 (arXiv 2310.09478) and their repository, Vision-CAIR/MiniGPT-4.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lvlm_jax import llm
from lvlm_jax.connectors import PixelShuffleConfig, QFormerConfig, qformer
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.keymap import Row, dense, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import blip2_vit
from lvlm_jax.vision.vit import ViTConfig
from lvlm_jax.zoo.spec import CLIP_MEAN, CLIP_STD, Spec

MODEL_TYPE, ARCHITECTURE = "lvlm_jax_minigpt4", None
"""Our own ``model_type``: the torch library has no class for it, and stops at a name that it does not know."""

LAYOUTS = {"minigpt4": "llama_proj."}
"""The name of the layout and the keys that it is known by."""

FOUR_OF_A_ROW = PixelShuffleConfig(factor=1, across=4, bias=True)
"""Four patches that follow one another in reading order become one token (models/minigpt_v2.py, `encode_img`)."""

# ---------------------------------------------------------------------------------------------------------------------
# Systems

_QFORMER_TOWER = blip2_vit.PRESETS["blip2_vit_g14_224"]
_TOWER = dataclasses.replace(_QFORMER_TOWER, class_feature=False)
# eva_vit.py, `interpolate_pos_embed`: bicubic, without antialiasing, from the centres of the places.
_TOWER_448 = dataclasses.replace(_TOWER, resize="cubic", max_patches=(448 // 14) ** 2)


def _image(size: int) -> ImageSpec:
    """processors/blip_processors.py, `Blip2ImageEvalProcessor`: squashed to a square."""
    return ImageSpec(size=size, patch=14, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic", fit="squash")


def _system(
    name: str, decoder: str, tower: ViTConfig, connector: QFormerConfig | PixelShuffleConfig, template: str, source: str
) -> Spec:
    # Vicuna v0 has a 32001st word, [PAD]; Llama 2 gets one, <image>. Over either a picture is laid.
    host = dataclasses.replace(llm.PRESETS[decoder], vocab=32001)
    return Spec(
        name=name,
        config=LVLMConfig(vision=tower, connector=connector, llm=host),
        image=_image(448 if tower.max_patches else 224),
        template=template,
        source=source,
        image_token_id=32000,
        released=False,
    )


_QFORMER = qformer.PRESETS["qformer_blip2"]
_CHAT_7B = "meta-llama/Llama-2-7b-chat-hf"

SYSTEMS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        _system("minigpt4_7b", "llama1_7b", _QFORMER_TOWER, _QFORMER, "minigpt4", "Vision-CAIR/vicuna-7b"),
        _system("minigpt4_13b", "llama1_13b", _QFORMER_TOWER, _QFORMER, "minigpt4", "Vision-CAIR/vicuna"),
        _system("minigpt4_llama2_7b", "llama2_7b", _TOWER, FOUR_OF_A_ROW, "minigpt4_llama2", _CHAT_7B),
        _system("minigpt_v2_7b", "llama2_7b", _TOWER_448, FOUR_OF_A_ROW, "minigpt_v2", _CHAT_7B),
    )
}
"""Systems by name; `source` has the tokenizer and the language model, the front is BLIP-2's, the rest one dense layer.
"""

# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: LVLMConfig, layout: str = "minigpt4") -> list[Row]:
    """The key table of a whole model under the authors' names."""
    if layout not in LAYOUTS:
        raise ValueError(f"a MiniGPT-4 has no layout {layout!r}; it has one, {', '.join(LAYOUTS)}")
    return [*front_rows(config), *projection_rows(), *host_rows(config)]


def front_rows(config: LVLMConfig) -> list[Row]:
    """The key table of the tower and, where there is one, the Q-Former: BLIP-2's part, which stays as it is."""
    out = blip2_vit.authors_rows(config.vision)
    if isinstance(config.connector, QFormerConfig):
        out += qformer.rows(config.connector, "connector/qformer", layout="lavis")
    return out


def projection_rows() -> list[Row]:
    """The key table of the one dense layer that is trained."""
    return dense("connector/linear_1", "llama_proj", bias=True)


def host_rows(config: LVLMConfig) -> list[Row]:
    """The key table of the language model, its own under the authors' prefix."""
    found = llm.FAMILIES[llm.family_of(config.llm)].rows(config.llm, "llm")
    return [dataclasses.replace(row, theirs=f"llama_model.{row.theirs}") for row in found]


# ---------------------------------------------------------------------------------------------------------------------
# config.json

READ = ("class_feature", "resize", "max_patches")
"""How the tower is read: fields of `ViTConfig` that a BLIP-2's own config.json does not name."""


def plain(tower: ViTConfig) -> ViTConfig:
    """The tower as BLIP-2 reads it."""
    return dataclasses.replace(tower, **{name: getattr(_QFORMER_TOWER, name) for name in READ})


def fits_front(config: LVLMConfig) -> bool:
    """Whether a model begins as BLIP-2 does, and its tokens stand in the text of a LLaMA."""
    tower = config.vision
    whole = config.attention == "causal" and config.fusion is None and not (config.newline or config.expert)
    whole &= isinstance(tower, ViTConfig) and tower.resize in ("none", "cubic") and not tower.resize_offset
    return whole and tower.feature_norm and blip2_vit.fits(plain(tower)) and llm.family_of(config.llm) == "llama"


def fits(config: LVLMConfig) -> bool:
    """Whether a model is of this kind."""
    between = config.connector
    reads = isinstance(between, QFormerConfig) and between.vocab is None and not between.extra
    joins = isinstance(between, PixelShuffleConfig) and between == dataclasses.replace(
        FOUR_OF_A_ROW, across=between.across, std=between.std
    )
    return config.public is None and (reads or joins) and fits_front(config)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("vision_config", "text_config", "connector"):
        if not config.get(part):
            raise ValueError(f"config.json: {part} is missing; a MiniGPT-4 names it")
    host = llm.FAMILIES[one_of("text_config.model_type", config["text_config"].get("model_type"), llm.FAMILIES)]
    read = {name: config["vision_read"][name] for name in READ}
    whole = LVLMConfig(
        vision=dataclasses.replace(blip2_vit.from_hf(config["vision_config"]), **read),
        connector=connector_keys.from_dict(config["connector"]),
        llm=host.from_hf(config["text_config"]),
    )
    return whole, int(config["image_token_id"])


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """A config.json of our own, which `from_hf` reads back. It says nothing of `image`."""
    return {
        "model_type": MODEL_TYPE,
        "vision_config": blip2_vit.to_hf(plain(config.vision)),
        "vision_read": {name: getattr(config.vision, name) for name in READ},
        "text_config": llm.FAMILIES[llm.family_of(config.llm)].to_hf(config.llm),
        "connector": connector_keys.to_dict(config.connector),
        "image_token_id": image_token_id,
    }


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the model: it has none for this kind."""
    return {}


__all__ = [
    "ARCHITECTURE",
    "FOUR_OF_A_ROW",
    "LAYOUTS",
    "MODEL_TYPE",
    "SYSTEMS",
    "fits",
    "fits_front",
    "from_hf",
    "front_rows",
    "host_rows",
    "plain",
    "processor",
    "projection_rows",
    "rows",
    "to_hf",
]
