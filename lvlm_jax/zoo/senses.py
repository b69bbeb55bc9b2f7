"""Models with named senses, and one pair alone: a config.json of our own, and keys under ``senses.NAME.``.

All else of such a model is written as the family that it belongs to without its senses writes it.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lvlm_jax import vision
from lvlm_jax.config import convert, to_dict
from lvlm_jax.connectors import keys as connector_keys
from lvlm_jax.keymap import Row, one_of
from lvlm_jax.models.lvlm import LVLMConfig
from lvlm_jax.models.senses import FeatureSlot, NamedSense, Sense
from lvlm_jax.processing.image import ImageSpec
from lvlm_jax.vision import VisionConfig
from lvlm_jax.zoo import (
    blip2,
    cogvlm,
    idefics,
    instructblip,
    llava,
    llava_next,
    llava_onevision,
    minigpt4,
    open_flamingo,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    videochat,
    videochat2,
)
from lvlm_jax.zoo.spec import Spec

MODEL_TYPE, ARCHITECTURE = "lvlm_jax_senses", None
"""Our own ``model_type``: the torch library has no class for it, and stops at a name that it does not know."""

PAIR_TYPE = "lvlm_jax_sense"
"""``model_type`` of a pair alone."""

SYSTEMS: dict[str, Spec] = {}
"""Nobody released one."""

LAYOUTS = {"senses": "senses."}
"""The name of the layout and the keys that it is known by; those of the base stand beside them in its first layout."""

BASES: tuple[ModuleType, ...] = (
    *(llava, llava_next, llava_onevision, paligemma, idefics, open_flamingo, cogvlm),
    *(qwen2_vl, qwen2_5_vl, qwen3_vl, videochat2, videochat, minigpt4, blip2, instructblip),
)
"""Every family of models without named senses; what several could hold is the first one's."""
_READS = {family.MODEL_TYPE: family for family in BASES} | {llava.OWN_TYPE: llava}


def base_of(config: LVLMConfig) -> tuple[ModuleType, LVLMConfig]:
    """(family, model) without the senses."""
    plain = dataclasses.replace(config, senses=())
    return next((family for family in BASES if family.fits(plain)), llava), plain


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def rows(config: LVLMConfig, layout: str = "senses") -> list[Row]:
    """The key table of a whole model: its base's, and each pair's under its name."""
    one_of("layout", layout, LAYOUTS)
    family, plain = base_of(config)
    pairs = [pair_rows(sense, f"senses/{name}/", f"senses.{name}.") for name, sense in config.senses]
    return [*family.rows(plain, next(iter(family.LAYOUTS))), *(row for pair in pairs for row in pair)]


def pair_rows(sense: Sense, ours: str = "", theirs: str = "sense.") -> list[Row]:
    """The key table of a pair; features have no encoder's keys."""
    tower = []
    if not isinstance(sense.encoder, FeatureSlot):
        family = vision.FAMILIES[vision.family_of(sense.encoder)]
        tower = family.rows(sense.encoder, f"{ours}vision", f"{theirs}vision_tower.")
    return [*tower, *connector_keys.rows(sense.connector, f"{ours}connector", f"{theirs}connector")]


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def fits(config: LVLMConfig) -> bool:
    """Whether a model is of this kind: any with named senses."""
    return bool(config.senses)


def from_hf(config: Mapping[str, Any]) -> tuple[LVLMConfig, int]:
    """(model, image token id) from a config.json that `to_hf` wrote.

    Raises:
      ValueError: a part or value that cannot be run, naming the field and what is supported.
    """
    one_of("model_type", config.get("model_type"), [MODEL_TYPE])
    for part in ("base", "senses"):
        if not isinstance(config.get(part), Mapping):
            raise ValueError(f"config.json: {part} is missing; a model with named senses has it")
    family = _READS[one_of("base.model_type", config["base"].get("model_type"), _READS)]
    plain, image_token_id = family.from_hf(config["base"])
    senses = tuple((name, _sense(values, f"senses.{name}")) for name, values in config["senses"].items())
    return dataclasses.replace(plain, senses=senses), image_token_id


def to_hf(config: LVLMConfig, image_token_id: int, image: ImageSpec | None = None) -> dict[str, Any]:
    """A config.json of our own, which `from_hf` reads back."""
    family, plain = base_of(config)
    return {
        "model_type": MODEL_TYPE,
        "base": family.to_hf(plain, image_token_id, image),
        "senses": {name: _values(sense) for name, sense in config.senses},
    }


def pair_from_hf(config: Mapping[str, Any]) -> NamedSense:
    """A pair from a config.json that `pair_to_hf` wrote."""
    one_of("model_type", config.get("model_type"), [PAIR_TYPE])
    width = convert(int, config.get("decoder_width"), "config.json: decoder_width")
    return NamedSense(name=str(config.get("sense", "")), sense=_sense(config, "this pair"), width=width)


def pair_to_hf(config: NamedSense) -> dict[str, Any]:
    """The config.json of a pair alone."""
    named = {"sense": config.name, "decoder_width": config.width}
    return {"model_type": PAIR_TYPE, **named, **_values(config.sense)}


def processor(config: LVLMConfig) -> dict[str, Any]:
    """What the torch library's processor must know of the base."""
    family, plain = base_of(config)
    return family.processor(plain)


def _values(sense: Sense) -> dict[str, Any]:
    connector = connector_keys.to_dict(sense.connector)
    return {"encoder": to_dict(sense.encoder), "connector": connector, "image": to_dict(sense.image)}


def _sense(values: Mapping[str, Any], where: str) -> Sense:
    where = f"config.json: {where}"
    if not values.get("encoder") or not values.get("connector"):
        raise ValueError(f"{where}: encoder or connector is missing; each pair has both")
    encoder = convert(VisionConfig | FeatureSlot, values["encoder"], f"{where}.encoder")
    image = convert(ImageSpec | None, values.get("image"), f"{where}.image")
    return Sense(encoder=encoder, connector=connector_keys.from_dict(values["connector"]), image=image)
